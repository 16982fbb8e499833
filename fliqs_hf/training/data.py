"""Images and labels: from `datasets`, checked, processed as the checkpoint's image processor says."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fliqs_hf.errors import DataError
from fliqs_hf.optional import needed_for
from fliqs_hf.training.images import checked_label, pixels
from fliqs_hf.training.seeds import derived_seed
from fliqs_hf.training.stream import BUFFER_SIZE, StreamBatches, StreamData

logger = logging.getLogger(__name__)

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
    streaming: bool = False,
    seed: int = 0,
    cache_dir: str | None = None,
) -> tuple[Any, Any]:
    """Training and validation split as `datasets.Dataset`s, or `datasets.IterableDataset`s.

    Args:
        dataset_name: a Hub id, a local folder (parquet files or an image folder), or "digits": the 8 × 8 images that
            scikit-learn ships (1797, ten classes), which needs no network; "digits:1", … are other splits of them.
        train_dir, validation_dir: image folders, one sub-folder per class.
        validation_split: default: "validation" or "test" where there is one, else `train_val_split` of the training
            split.
        streaming: read the data set as it comes, instead of downloading it first.
        cache_dir: where downloads and prepared data are kept.
    Raises: DataError: nothing to load, a split that does not exist or is empty.
    """
    import datasets

    if dataset_name is not None and is_digits(dataset_name):
        return _digits(int(dataset_name.partition(":")[2] or 0))
    if dataset_name is not None:
        try:
            splits = datasets.load_dataset(dataset_name, dataset_config_name, streaming=streaming, cache_dir=cache_dir)
        except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
            raise DataError(f"cannot load the dataset {dataset_name!r}: {error}") from error
    elif train_dir is not None:
        folders = {"train": str(Path(train_dir) / "**")}
        if validation_dir is not None:
            folders["validation"] = str(Path(validation_dir) / "**")
        try:
            splits = datasets.load_dataset("imagefolder", data_files=folders, streaming=streaming, cache_dir=cache_dir)
        except (FileNotFoundError, ValueError, OSError) as error:
            raise DataError(f"cannot load the images of {' and '.join(folders.values())}: {error}") from error
    else:
        raise DataError("no data: give dataset_name (a Hub id, a folder or 'digits') or train_dir")
    names = list(splits)
    for split in (train_split, validation_split):
        if split is not None and split not in names:
            raise DataError(f"split {split!r} does not exist; the dataset has {', '.join(names)}")
    other = validation_split or next((name for name in ("validation", "test") if name in names), None)
    if other is None:
        if streaming:
            raise DataError(f"a stream cannot be split: name a validation_split; the dataset has {', '.join(names)}")
        if not 0 < train_val_split < 1:
            raise DataError(f"train_val_split={train_val_split} must be between 0 and 1")
        try:
            parts = splits[train_split].train_test_split(train_val_split, seed=seed)
        except ValueError as error:
            raise DataError(
                f"the split {train_split!r} holds {len(splits[train_split])} images, too few to hold out "
                f"train_val_split={train_val_split} of them: add images, or give a validation split"
            ) from error
        return parts["train"], parts["test"]
    return splits[train_split], splits[other]


def is_digits(name: str) -> bool:
    return re.fullmatch(rf"{DIGITS}(:\d+)?", name) is not None


def _digits(seed: int) -> tuple[Any, Any]:
    import datasets
    import numpy as np

    with needed_for(f"the data set {DIGITS!r}"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    parts = train_test_split(np.arange(len(pixels)), test_size=0.25, random_state=seed, stratify=digits.target)

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
        label_ids: Sequence[int] | None = None,
        max_samples: int | None = None,
        cache: bool = False,
    ) -> None:
        """
        Args:
            processor: a Transformers image processor.
            label_ids: the model's class of each of the split's labels, where they differ.
            max_samples: use the first so many images.
            cache: keep processed images in memory.
        """
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise DataError(f"column {column!r} does not exist; the dataset has {', '.join(split.column_names)}")
        if max_samples is not None:
            split = split.select(range(min(max_samples, len(split))))
        if len(split) == 0:
            raise DataError("the split is empty: it holds no image")
        known = len(label_ids) if label_ids is not None else num_labels
        self.labels = [
            checked_label(label, known, f"image {index}") for index, label in enumerate(split[label_column])
        ]
        if label_ids is not None:
            self.labels = [label_ids[label] for label in self.labels]
        self.split, self.processor, self.image_column = split, processor, image_column
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._cache is not None and index in self._cache:
            return self._cache[index], self.labels[index]
        try:
            image = self.split[index][self.image_column]
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"image {index}{self._file(index)} cannot be read: {error}") from error
        values = pixels(image, self.processor, f"image {index}")
        if self._cache is not None:
            self._cache[index] = values
        return values, self.labels[index]

    def _file(self, index: int) -> str:
        import datasets

        raw = self.split.cast_column(self.image_column, datasets.Image(decode=False))[index][self.image_column]
        return f" ({raw['path']})" if raw and raw.get("path") else ""


class StepBatches(Sampler[list[int]]):
    """Indices of every micro-batch of one rank from `first` on: a function of (seed, position) and nothing else.

    Each epoch is a new permutation, cut into global batches of `batch_size · world_size`; the incomplete last one is
    dropped. A split smaller than one global batch is shared out evenly.

    Raises: DataError: fewer images than ranks.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first: int, last: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if length < world_size:
            raise DataError(f"the split holds {length} images, fewer than the {world_size} processes")
        batch_size = min(batch_size, length // world_size)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.last, self.rank, self.world_size = first, last, rank, world_size
        self.per_epoch = length // (batch_size * world_size)

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
    data: ImageData | StreamData,
    batch_size: int,
    seed: int,
    first: int,
    last: int,
    rank: int,
    world_size: int,
    workers: int,
) -> DataLoader[tuple[Tensor, int]]:
    """Micro-batches `first` to `last` − 1 of one rank. A stream has one worker at most: `datasets` would divide it."""
    pin = torch.cuda.is_available()
    if isinstance(data, StreamData):
        stream = StreamBatches(data, batch_size, seed, first, last, rank, world_size)
        return DataLoader(stream, batch_size=None, num_workers=min(workers, 1), pin_memory=pin)  # type: ignore[arg-type]
    sampler = StepBatches(len(data), batch_size, seed, first, last, rank, world_size)
    return DataLoader(data, batch_sampler=sampler, num_workers=workers, pin_memory=pin)


def labelled(train: Any, validation: Any, column: str) -> tuple[Any, Any, list[str]]:
    """Both splits with whole-number labels, and the names of the classes.

    Classes are those of the column's `ClassLabel`; of a column of words, the words in alphabetical order; of one of
    whole numbers, 0 to the largest.

    Raises: DataError: the column does not exist, is of another type, or validation has a class that training lacks.
    """
    import datasets

    features = train.features or {}
    if column not in features:
        raise DataError(f"column {column!r} does not exist; the dataset has {', '.join(features)}")
    names = getattr(features[column], "names", None)
    if names is not None:
        return train, validation, list(names)
    if isinstance(train, datasets.IterableDataset):
        raise DataError(f"column {column!r} does not name its classes, which a stream needs: stream is for ClassLabel")
    kind = str(getattr(features[column], "dtype", features[column]))
    present = set(train[column])
    if "int" in kind and present:
        return train, validation, [str(label) for label in range(max(present) + 1)]
    if "string" not in kind or not present:
        raise DataError(f"column {column!r} holds {kind if present else 'nothing'}, not classes")
    names = sorted(present)
    for label in validation[column]:
        if label not in present:
            raise DataError(f"the validation split has the class {label!r}, which the training split lacks")
    classes = datasets.ClassLabel(names=names)
    return train.cast_column(column, classes), validation.cast_column(column, classes), names


def held_in_memory(
    stream: Any,
    names: Sequence[str],
    max_samples: int | None,
    *,
    image_column: str = "image",
    label_column: str = "label",
) -> Any:
    """Images of a stream, still encoded, as a `datasets.Dataset`: for evaluating again and again.

    `max_samples` of them are chosen by shuffling, with a fixed seed, the order of the stream's files and then images
    within a buffer of `BUFFER_SIZE`. All of them are thus among the first `BUFFER_SIZE` + `max_samples` images read:
    a longer stream that is sorted by class does not show every class. Those of `names` that are missing are logged.

    Raises: DataError: a column that does not exist.
    """
    import datasets

    columns = list(stream.features or {})
    for column in (image_column, label_column):
        if column not in columns:
            raise DataError(f"column {column!r} does not exist; the dataset has {', '.join(columns)}")
    raw = stream.cast_column(image_column, datasets.Image(decode=False))
    chosen = raw if max_samples is None else raw.shuffle(seed=0, buffer_size=BUFFER_SIZE).take(max_samples)
    held = datasets.Dataset.from_list(list(chosen), features=raw.features)
    present = set(held[label_column])
    missing = [name for index, name in enumerate(names) if index not in present]
    if missing:
        logger.warning(
            "the %d evaluation images show %d of the %d classes, %r is missing: raise max_eval_samples, or store the "
            "validation split in random order",
            len(held), len(names) - len(missing), len(names), missing[0],
        )  # fmt: skip
    return held.cast_column(image_column, datasets.Image())
