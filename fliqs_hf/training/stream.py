"""Training images that are read as they come, from the Hub or a disk, and never stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fliqs_hf.errors import DataError
from fliqs_hf.training.images import LazyText, name_of, pixels
from fliqs_hf.training.labels import checked_label
from fliqs_hf.training.seeds import derived_seed
from fliqs_hf.training.splits import check_column

#: images of a stream, undecoded, among which the next one is chosen at random
BUFFER_SIZE = 2000
#: images of a stream that are read again to find the row of one that cannot be used
LOOKED_THROUGH = 50_000


class StreamData:
    """A streamed split, shuffled within a buffer.

    Raises: DataError: a column that does not exist; while reading, like `ImageData`, a label outside the head's range
        or an image that cannot be decoded.
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
        buffer_size: int = BUFFER_SIZE,
    ) -> None:
        """
        Args:
            split: a `datasets.IterableDataset`.
            label_ids: the model's class of each of the split's labels, where they differ.
            buffer_size: images, undecoded, among which the next one is chosen at random.
        """
        import datasets

        check_column(split, image_column)
        check_column(split, label_column, "label")
        self.split = split.cast_column(image_column, datasets.Image(decode=False))
        self.processor, self.num_labels, self.buffer_size = processor, num_labels, buffer_size
        self.image_column, self.label_column, self.label_ids = image_column, label_column, label_ids

    def first(self) -> tuple[Tensor, int]:
        """The first image as it is stored. Raises: DataError: the stream is empty, or as `decode`."""
        for example in self.split:
            return self.decode(example)
        raise DataError("the stream is empty: it holds no image")

    def epoch(self, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Undecoded examples in the order of this epoch."""
        order = derived_seed("order", seed, epoch) >> 31  # NumPy takes 32 bits
        return iter(self.split.shuffle(seed=order, buffer_size=self.buffer_size))

    def decode(self, example: dict[str, Any]) -> tuple[Tensor, int]:
        """Pixel values and label. Raises: DataError: they cannot be used; it says which row of the data set it is."""
        image, label = example[self.image_column], example[self.label_column]
        known = len(self.label_ids) if self.label_ids is not None else self.num_labels
        name = LazyText(lambda: name_in_stream(self.split, image, self.image_column))
        label = checked_label(label, known, name)
        return pixels(image, self.processor, name), self.label_ids[label] if self.label_ids is not None else label


def name_in_stream(stream: Any, image: Any, column: str) -> str:
    """What an undecoded image is called in errors. Its row is that of the order in which the data set is stored, in
    which the stream is read again."""
    rows = enumerate(itertools.islice(stream, LOOKED_THROUGH))
    row: Any = next((row for row, other in rows if other[column] == image), f"beyond row {LOOKED_THROUGH}")
    return name_of(image, row, stream.split)


class StreamBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Micro-batches of one rank from `first` on, a function of (seed, position) like `StepBatches`.

    Every rank reads the whole stream and decodes its own images. After an interruption the images of earlier batches
    are read again, but not decoded.
    """

    def __init__(
        self, data: StreamData, batch_size: int, seed: int, first: int, last: int, rank: int, world_size: int
    ) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.first, self.last, self.rank, self.world_size = first, last, rank, world_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, position = self.batch_size * self.world_size, 0
        for epoch in itertools.count():
            examples = self.data.epoch(self.seed, epoch)
            before = position
            while len(block := list(itertools.islice(examples, size))) == size:
                if position >= self.first:
                    mine = block[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                    pairs = [self.data.decode(example) for example in mine]
                    yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
                position += 1
                if position >= self.last:
                    return
            if position == before:
                raise DataError(f"the stream holds {len(block)} images, fewer than one batch of {size}")
