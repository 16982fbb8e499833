"""Images and labels: from `datasets`, checked, processed as the checkpoint's image processor says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fliqs_hf.errors import DataError

DIGITS = "digits"


def load_splits(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    train_val_split: float = 0.15,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Training and validation split as `datasets.Dataset`s.

    Args:
        dataset_name: a Hub id, a local folder (parquet files or an image folder), or "digits": the 8 × 8 images that
            scikit-learn ships (1797, ten classes), which needs no network.
        train_dir, validation_dir: image folders, one sub-folder per class.
        validation_split: default: "validation" or "test" where there is one, else `train_val_split` of the training
            split.
    Raises: DataError: nothing to load, a split that does not exist or is empty.
    """
    import datasets

    if dataset_name == DIGITS:
        return _digits()
    if dataset_name is not None:
        try:
            splits = datasets.load_dataset(dataset_name, dataset_config_name)
        except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
            raise DataError(f"cannot load the dataset {dataset_name!r}: {error}") from error
    elif train_dir is not None:
        folders = {"train": str(Path(train_dir) / "**")}
        if validation_dir is not None:
            folders["validation"] = str(Path(validation_dir) / "**")
        splits = datasets.load_dataset("imagefolder", data_files=folders)
    else:
        raise DataError("no data: give dataset_name (a Hub id, a folder or 'digits') or train_dir")
    names = list(splits)
    for split in (train_split, validation_split):
        if split is not None and split not in names:
            raise DataError(f"split {split!r} does not exist; the dataset has {', '.join(names)}")
    other = validation_split or next((name for name in ("validation", "test") if name in names), None)
    if other is None:
        parts = splits[train_split].train_test_split(train_val_split, seed=seed)
        return parts["train"], parts["test"]
    return splits[train_split], splits[other]


def _digits() -> tuple[Any, Any]:
    import datasets
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    parts = train_test_split(np.arange(len(pixels)), test_size=0.25, random_state=0, stratify=digits.target)

    def split(indices: Any) -> Any:
        from PIL import Image

        columns = {"image": [Image.fromarray(pixels[i]) for i in indices], "label": digits.target[indices].tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    return split(parts[0]), split(parts[1])


class ImageData(Dataset[tuple[Tensor, int]]):
    """A split as pairs of pixel values [channels, height, width], float32, and label.

    Labels are checked on construction; images when they are read.

    Raises: DataError: an empty split, a column that does not exist, a label outside 0 … `num_labels` − 1 (with its
        index), an image that cannot be decoded (with its index and file).
    """

    def __init__(
        self,
        split: Any,
        processor: Any,
        num_labels: int,
        *,
        image_column: str = "image",
        label_column: str = "label",
        max_samples: int | None = None,
        cache: bool = False,
    ) -> None:
        """
        Args:
            processor: a Transformers image processor.
            cache: keep processed images in memory.
        """
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise DataError(f"column {column!r} does not exist; the dataset has {', '.join(split.column_names)}")
        if max_samples is not None:
            split = split.select(range(min(max_samples, len(split))))
        if len(split) == 0:
            raise DataError("the split is empty: it holds no image")
        self.labels: list[int] = list(split[label_column])
        for index, label in enumerate(self.labels):
            if not (isinstance(label, int) and 0 <= label < num_labels):
                raise DataError(
                    f"image {index} has the label {label!r}, but the model's head has {num_labels} classes"
                )
        self.split, self.processor, self.image_column = split, processor, image_column
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._cache is not None and index in self._cache:
            return self._cache[index], self.labels[index]
        try:
            image = self.split[index][self.image_column].convert("RGB")
            pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except (OSError, ValueError, SyntaxError, AttributeError) as error:
            raise DataError(f"image {index}{self._file(index)} cannot be read: {error}") from error
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels, self.labels[index]

    def _file(self, index: int) -> str:
        import datasets

        raw = self.split.cast_column(self.image_column, datasets.Image(decode=False))[index][self.image_column]
        return f" ({raw['path']})" if raw and raw.get("path") else ""


def derived_seed(*parts: int | str) -> int:
    """A seed that depends on nothing but `parts`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StepBatches(Sampler[list[int]]):
    """Indices of every micro-batch of one rank from `first` on: a function of (seed, position) and nothing else.

    Each epoch is a new permutation, cut into global batches of `batch_size · world_size`; the incomplete last one is
    dropped (a split smaller than one batch is used whole).
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first: int, last: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.last, self.rank, self.world_size = first, last, rank, world_size
        self.per_epoch = max(1, length // (batch_size * world_size))

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for position in range(self.first, self.last):
            if position // self.per_epoch != epoch:
                epoch = position // self.per_epoch
                generator = torch.Generator().manual_seed(derived_seed("order", self.seed, epoch))
                order = torch.randperm(self.length, generator=generator)
            start = ((position % self.per_epoch) * self.world_size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def train_loader(
    data: ImageData, batch_size: int, seed: int, first: int, last: int, rank: int, world_size: int, workers: int
) -> DataLoader[tuple[Tensor, int]]:
    sampler = StepBatches(len(data), batch_size, seed, first, last, rank, world_size)
    return DataLoader(data, batch_sampler=sampler, num_workers=workers, pin_memory=torch.cuda.is_available())
