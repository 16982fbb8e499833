"""Streamed images: an order that depends on the seed and the position, shares of the ranks, and faults."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

import fliqs_hf.training.data as data_module
import fliqs_hf.training.stream as stream_module
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.pipeline.checks import check_arguments
from fliqs_hf.pipeline.job import load
from fliqs_hf.training import ImageData, load_splits
from fliqs_hf.training.arguments import parse
from fliqs_hf.training.data import held_in_memory, labelled, train_loader, undecoded
from fliqs_hf.training.stream import StreamData
from tests.training.test_data import PROCESSOR, png, split_of


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


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_stream_name_the_row_of_the_data_set(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Which a shuffled stream does not know: it is read again."""
    train = split_of([0, 1, 2, 0] * 3, broken=9).to_iterable_dataset(num_shards=3)  # these are shuffled as well
    with pytest.raises(DataError) as caught:
        batches(StreamData(train, PROCESSOR, 3), 0, 2, workers=workers)
    assert str(caught.value).startswith("image 9 (photo-9.png) cannot be read: ")
    held = held_in_memory(train, list("abc"), 12)
    data = ImageData(held, PROCESSOR, 3, stream=undecoded(train, "image"))
    with pytest.raises(DataError, match=r"^image 9 \(photo-9"):
        [data[index] for index in range(12)]
    monkeypatch.setattr(stream_module, "LOOKED_THROUGH", 3)
    with pytest.raises(DataError, match=r"^image beyond row 3 "):
        batches(StreamData(train, PROCESSOR, 3), 0, 2)


def test_the_first_image_of_a_stream_is_checked() -> None:
    with pytest.raises(DataError, match=r"image 0 \(photo-0"):
        stream(broken=0).first()
    with pytest.raises(DataError, match="the stream is empty"):
        StreamData(split_of([0]).to_iterable_dataset().take(0), PROCESSOR, 3).first()


def test_a_folder_of_parquet_files_is_streamed(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    for name, labels in (("train", [0, 1, 2, 0]), ("test", [2, 1, 0])):
        split_of(labels).cast_column("label", classes).to_parquet(tmp_path / f"{name}.parquet")
    train, test, names = labelled(*load_splits(str(tmp_path), streaming=True), "label")
    assert isinstance(train, datasets.IterableDataset) and names == ["a", "b", "c"]
    held = held_in_memory(test, names, None)
    assert list(held["label"]) == [2, 1, 0]
    assert torch.equal(ImageData(held, PROCESSOR, 3)[1][0], ImageData(split_of([2, 1]), PROCESSOR, 3)[1][0])
    with pytest.raises(DataError, match="'class' does not exist"):
        held_in_memory(test, names, 2, label_column="class")
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(DataError, match="name a validation_split; the dataset has train"):
        load_splits(str(tmp_path), streaming=True)


def arguments(folder: Path, *more: str) -> Any:
    """Of a recipe that streams an image folder, which is sorted by class: 10 images of each of 3."""
    for index in range(60):
        file = folder / ("train" if index < 30 else "validation") / "abc"[index % 30 // 10] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(index))
    folders = ["--train_dir", str(folder / "train"), "--validation_dir", str(folder / "validation")]
    model = ["--model_type", "vit", "--image_size", "8", "--config_overrides", "{patch_size: 4, hidden_size: 12}"]
    return parse([*folders, *model, "--streaming", "--use_cpu", "--output_dir", str(folder / "run"), *more])


def test_held_images_are_of_every_class_and_the_same_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with caplog.at_level(logging.WARNING, "fliqs_hf"):
        first, second = (load(*arguments(tmp_path, "--max_eval_samples", "12")).eval_data for _ in range(2))
    assert len(first) == 12 and set(first.labels) == {0, 1, 2} and first.labels == second.labels
    assert not [record for record in caplog.records if "evaluation images" in record.getMessage()]
    monkeypatch.setattr(data_module, "BUFFER_SIZE", 2)  # as where a sorted stream is longer than the buffer
    with caplog.at_level(logging.WARNING, "fliqs_hf"):
        assert set(load(*arguments(tmp_path, "--max_eval_samples", "5")).eval_data.labels) == {0}
    assert "the 5 evaluation images show 1 of the 3 classes, 'b' is missing: raise max_eval_samples" in caplog.text


def test_a_limit_of_a_stream_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_train_samples=6 does not go with streaming"):
        check_arguments(*arguments(tmp_path, "--max_train_samples", "6"))
