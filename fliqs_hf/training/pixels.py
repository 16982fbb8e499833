"""Pixel values and labels that somebody else has made, as the recipe reads images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fliqs_hf.errors import DataError
from fliqs_hf.tasks import Task


class PixelData(Dataset[tuple[Tensor, Any]]):
    """A dataset of pixel values and labels as the recipe reads them."""

    def __init__(self, data: Any, num_labels: int, task: Task) -> None:
        """
        Args: num_labels: of the model. task: says what a label may be.
        Raises: DataError: it is empty.
        """
        if not len(data):
            raise DataError("the dataset is empty: it holds no image")
        self.data, self.num_labels, self.task = data, num_labels, task

    def __len__(self) -> int:
        return len(self.data)

    def first(self) -> tuple[Tensor, Any]:
        return self[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        item = self.data[index]
        if isinstance(item, Mapping) and "pixel_values" in item:
            item = item["pixel_values"], item["labels"] if "labels" in item else item.get("label")
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise DataError(
                f"item {index} is a {type(item).__name__}: give pairs (pixel values, label), or dictionaries with "
                "'pixel_values' and 'labels'"
            )
        pixels, label = torch.as_tensor(item[0]), item[1]
        if pixels.ndim != 3 or not pixels.is_floating_point():
            raise DataError(
                f"item {index}: pixel values are floats [channels, height, width], not {list(pixels.shape)}"
            )
        try:
            return pixels.float(), self.task.target(label, self.num_labels)
        except DataError as error:
            raise DataError(f"item {index}: {error}") from error
