"""Images and labels: from `datasets`, checked, processed as the checkpoint's image processor says."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fliqs_hf.errors import DataError
from fliqs_hf.training.images import LazyText, name_of, pixels
from fliqs_hf.training.labels import MOST_CLASSES, checked_label
from fliqs_hf.training.seeds import derived_seed
from fliqs_hf.training.splits import ROW, check_column
from fliqs_hf.training.stream import BUFFER_SIZE, StreamBatches, StreamData, name_in_stream

logger = logging.getLogger(__name__)


class Images:
    """The images of a split: what is stored of each, and what it is called in errors."""

    def __init__(self, split: Any, column: str, stream: Any = None) -> None:
        """
        Args:
            stream: what `split` was taken from in another order. It is undecoded.
        Raises: DataError: there is no such column.
        """
        check_column(split, column)
        self.column, self.stream = column, stream
        columns = [name for name in split.column_names if name in (column, ROW)]
        self._view = undecoded(split, column).select_columns(columns)

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: int) -> tuple[Any, LazyText]:
        """What `images.pixels` takes, and its name."""
        try:
            row = self._view[index]
        except Exception as error:  # whatever a column that is no `datasets.Image` decodes by
            raise DataError(f"image {index} cannot be read: {error}") from error
        return row[self.column], LazyText(lambda: self._name(row, index))

    def _name(self, row: Mapping[str, Any], index: int) -> str:
        image, number = row[self.column], row.get(ROW, index)
        if self.stream is not None:
            return name_in_stream(self.stream, image, self.column)
        return name_of(image, number, None if isinstance(number, str) else self._view.split)


def undecoded(split: Any, column: str) -> Any:
    """`split` with the bytes and paths of its images, where it has a column of encoded ones."""
    import datasets

    if not isinstance((split.features or {}).get(column), datasets.Image):
        return split
    return split.cast_column(column, datasets.Image(decode=False))


class ImageData(Dataset[tuple[Tensor, int]]):
    """A split as pairs of pixel values [channels, height, width], float32, and label.

    Labels are checked on construction; images when they are read.

    Raises: DataError: an empty split, a column that does not exist, a label outside 0 … `num_labels` − 1, an image
        that cannot be decoded (both with their row in the data set and their file).
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
        cache: bool = False,
        stream: Any = None,
    ) -> None:
        """
        Args:
            processor: a Transformers image processor.
            label_ids: the model's class of each of the split's labels, where they differ.
            cache: keep processed images in memory.
            stream: what `split` was taken from in another order, undecoded; its rows are those that errors name.
        """
        check_column(split, label_column, "label")
        if len(split) == 0:
            raise DataError("the split is empty: it holds no image")
        self.images, self.processor = Images(split, image_column, stream), processor
        known = len(label_ids) if label_ids is not None else num_labels
        self.labels = [
            checked_label(label, known, LazyText(lambda index=index: str(self.images[index][1])))  # type: ignore[misc]
            for index, label in enumerate(split[label_column])
        ]
        if label_ids is not None:
            self.labels = [label_ids[label] for label in self.labels]
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self) -> tuple[Tensor, int]:
        return self[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._cache is not None and index in self._cache:
            return self._cache[index], self.labels[index]
        image, name = self.images[index]
        values = pixels(image, self.processor, name)
        if self._cache is not None:
            self._cache[index] = values
        return values, self.labels[index]


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


class Loader(DataLoader[tuple[Tensor, int]]):
    """A `DataLoader` whose workers' `DataError`s say what they say in this process, without a traceback in them."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        try:
            yield from batches
        except DataError as error:
            raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error


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
        return Loader(stream, batch_size=None, num_workers=min(workers, 1), pin_memory=pin)  # type: ignore[arg-type]
    sampler = StepBatches(len(data), batch_size, seed, first, last, rank, world_size)
    return Loader(data, batch_sampler=sampler, num_workers=workers, pin_memory=pin)


def labelled(train: Any, validation: Any, column: str) -> tuple[Any, Any, list[str]]:
    """Both splits with whole-number labels, and the names of the classes.

    Classes are those of the column's `ClassLabel`; of a column of words, the words in alphabetical order; of one of
    whole numbers, 0 to the largest.

    Raises: DataError: the column does not exist, is of another type, has less than two classes, or validation has a
        class that training lacks.
    """
    train, validation, names = _with_classes(train, validation, column)
    if len(names) < 2:
        raise DataError(f"column {column!r} has {len(names)} class ({', '.join(names)}), where two or more are needed")
    return train, validation, names


def _with_classes(train: Any, validation: Any, column: str) -> tuple[Any, Any, list[str]]:
    import datasets

    check_column(train, column, "label")
    feature = (train.features or {}).get(column)
    names = getattr(feature, "names", None)
    if names is not None:
        return train, validation, list(names)
    if isinstance(train, datasets.IterableDataset):
        raise DataError(f"column {column!r} does not name its classes, which a stream needs: stream is for ClassLabel")
    kind = feature.dtype if isinstance(feature, datasets.Value) else f"a {type(feature).__name__}"
    number, text = re.fullmatch("u?int[0-9]+", kind) is not None, kind in ("string", "large_string")
    if not (number or text):
        raise DataError(f"column {column!r} holds {'nothing' if kind == 'null' else kind}, not classes")
    present = set(train[column]) - {None}  # which `ImageData` refuses by row
    if not present:
        raise DataError(f"column {column!r} holds nothing, not classes")
    if number and max(present) >= MOST_CLASSES:
        raise DataError(
            f"column {column!r} has the label {max(present)}: whole numbers are classes from 0 on; make it a column "
            "of text, of which each value is a class"
        )
    if number:
        return train, validation, [str(label) for label in range(max(present) + 1)]
    names = sorted(present)
    for label in validation[column]:
        if label not in present and label is not None:
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

    check_column(stream, image_column)
    check_column(stream, label_column, "label")
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
