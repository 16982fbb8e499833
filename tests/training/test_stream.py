"""Streamed images: an order that depends on the seed and the position, shares of the ranks, and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fliqs_hf.errors import DataError
from fliqs_hf.training import ImageData, load_splits
from fliqs_hf.training.data import held_in_memory, labelled, train_loader
from fliqs_hf.training.stream import StreamData
from tests.training.test_data import PROCESSOR, split_of


def stream(count: int = 20, **changes: Any) -> StreamData:
    split = split_of([i % 3 for i in range(count)], changes.pop("broken", None))
    return StreamData(split.to_iterable_dataset(), PROCESSOR, 3, **changes)


def batches(data: StreamData, first: int, last: int, rank: int = 0, world_size: int = 1, workers: int = 0) -> Any:
    return list(train_loader(data, 6 // world_size, 1, first, last, rank, world_size, workers))


def test_an_epoch_shows_images_once_and_a_resumed_stream_goes_on() -> None:
    whole = batches(stream(), 0, 7)
    assert all(images.shape == (6, 3, 8, 8) and labels.shape == (6,) for images, labels in whole)
    epochs = [torch.cat([images[:, 0, 0, 0] for images, _ in whole[i : i + 3]]) for i in (0, 3)]
    for epoch in epochs:  # images hold their own index: 3 batches of 6 of the 20 images
        assert epoch.unique().numel() == 18
    assert not torch.equal(*epochs)
    for (images, labels), (later, later_labels) in zip(whole[4:], batches(stream(), 4, 7), strict=True):
        assert torch.equal(images, later) and torch.equal(labels, later_labels)


def test_ranks_share_a_batch() -> None:
    whole, first, second = batches(stream(), 0, 4), batches(stream(), 0, 4, 0, 2), batches(stream(), 0, 4, 1, 2)
    for (images, labels), *halves in zip(whole, first, second, strict=True):
        assert torch.equal(images, torch.cat([half[0] for half in halves]))
        assert torch.equal(labels, torch.cat([half[1] for half in halves]))


def test_a_worker_repeats_itself() -> None:
    one, two = (batches(stream(), 0, 4, workers=2) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True)) and len(one) == 4


def test_faults_are_named() -> None:
    with pytest.raises(DataError, match=r"\(photo-5\.png\) cannot be read"):
        batches(stream(18, broken=5), 0, 3)  # three batches of 6 show every image
    split = split_of([0, 1, 7, 2, 1, 0]).to_iterable_dataset()
    with pytest.raises(DataError, match=r"photo-2\.png\) has the label 7.*3 classes"):
        batches(StreamData(split, PROCESSOR, 3), 0, 1)
    with pytest.raises(DataError, match="5 images, fewer than one batch of 6"):
        batches(stream(5), 0, 1)
    with pytest.raises(DataError, match="'img' does not exist"):
        stream(image_column="img")


def test_a_folder_of_parquet_files_is_streamed(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    for name, labels in (("train", [0, 1, 2, 0]), ("test", [2, 1, 0])):
        split_of(labels).cast_column("label", classes).to_parquet(tmp_path / f"{name}.parquet")
    train, test, names = labelled(*load_splits(str(tmp_path), streaming=True), "label")
    assert isinstance(train, datasets.IterableDataset) and names == ["a", "b", "c"]
    held = held_in_memory(test, "image", 2)
    assert list(held["label"]) == [2, 1]
    assert torch.equal(ImageData(held, PROCESSOR, 3)[1][0], ImageData(split_of([2, 1]), PROCESSOR, 3)[1][0])
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(DataError, match="name a validation_split; the dataset has train"):
        load_splits(str(tmp_path), streaming=True)
