"""Images with a class for each pixel, as a model takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.training.data import Images
from fliqs_hf.training.images import LazyText, decoded
from fliqs_hf.training.splits import check_column


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """A split as pairs of pixel values [channels, height, width], float32, and classes int64 [height, width]."""

    def __init__(
        self,
        split: Any,
        processor: Any,
        target: Callable[[Any], Tensor],
        *,
        image_column: str = "image",
        label_column: str = "label",
        cache: bool = False,
    ) -> None:
        """
        Args: as of `ImageData`; `processor` takes `segmentation_maps`; `target` makes a target of what it makes of
            them, or raises a DataError that does not say which image it is.
        Raises: ConfigError: it does not. DataError: an empty split, or a column that does not exist.
        """
        if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
            raise ConfigError(
                f"{type(processor).__name__} takes no segmentation_maps: use a segmenter's image processor"
            )
        check_column(split, label_column, "label")
        if len(split) == 0:
            raise DataError("the split is empty: it holds no image")
        self.images, self.masks = Images(split, image_column), Images(split, label_column)
        self.processor, self.target = processor, target
        self._cache: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.images)

    def first(self) -> tuple[Tensor, Tensor]:
        return self[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        (image, name), (mask, _) = self.images[index], self.masks[index]
        made = self.processor(decoded(image, name), segmentation_maps=classes_of(mask, name), return_tensors="pt")
        try:
            found = torch.as_tensor(made["pixel_values"][0]), self.target(made["labels"][0])
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        if self._cache is not None:
            self._cache[index] = found
        return found


def classes_of(mask: Any, name: LazyText) -> NDArray[np.uint8]:
    """[height, width]. Raises: DataError: no image of whole numbers, one per pixel."""
    try:
        found = np.asarray(datasets.Image().decode_example(mask) if isinstance(mask, dict) else mask)
    except Exception as error:  # a damaged file leads Pillow's decoders into whatever error there is
        raise DataError(f"the classes of {name} cannot be read: {error}") from error
    if found.ndim != 2 or found.dtype.kind not in "iu" or found.max(initial=0) > 255:
        raise DataError(
            f"the classes of {name} are {found.dtype} {list(found.shape)}, not numbers from 0 to 255 for each pixel"
        )
    return found.astype(np.uint8)


def highest_class(split: Any, column: str, no_class: int, processor: Any) -> int:
    """Of all pixels that have a class, other than `no_class`; reads every mask.

    Args: processor: where it has `do_reduce_labels`, 0 is no class either and 1 becomes 0, as ADE20K has it.
    Raises: DataError: no pixel has a class.
    """
    check_column(split, column, "label")
    masks = Images(split, column)
    arrays = (classes_of(*masks[index]) for index in range(len(masks)))
    found = max((int(values.max()) for mask in arrays if (values := mask[mask != no_class]).size), default=-1)
    found -= bool(getattr(processor, "do_reduce_labels", False))
    if found < 0:
        raise DataError(f"no pixel of column {column!r} has a class")
    return found
