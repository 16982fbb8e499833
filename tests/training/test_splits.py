"""Data sets by name: parts of splits, rows that stay with their images, and what is not a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fliqs_hf.errors import DataError
from fliqs_hf.training import ImageData, load_splits
from fliqs_hf.training.data import labelled, train_loader
from fliqs_hf.training.splits import load_all, load_split, sample
from tests.training.test_data import PROCESSOR, png


def folder(path: Path, *classes: str, each: int = 10) -> Path:
    """An image folder; image i of the whole has the grey value i."""
    for number, (name, i) in enumerate((name, i) for name in classes for i in range(each)):
        file = path / name / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return path


def values(split: Any) -> list[int]:
    return [int(np.asarray(image)[0, 0, 0]) for image in split["image"]]


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("train", range(20)),
        ("train[:5]", range(5)),
        ("train[-3:]", range(17, 20)),
        ("train[10%:50%]", range(2, 10)),
        ("train[2:4]+train[:1]", [2, 3, 0]),
    ],
)
def test_parts_of_a_split(tmp_path: Path, spec: str, rows: Any) -> None:
    split, parts = load_split(str(folder(tmp_path / "photos", "cat", "dog")), spec)
    assert values(split) == list(rows)
    assert [row for _, first, last in parts for row in range(first, last)] == list(rows)


def test_parts_of_the_digits() -> None:
    whole, some = load_split("digits", "test")[0], load_split("digits", "test[100:]+train[:7]")[0]
    assert len(some) == 350 + 7 and some[0]["image"] == whole[100]["image"]
    assert len(load_split("digits", None, ("test",))[0]) == len(whole)
    with pytest.raises(DataError, match=r"splits train, test: name one"):
        load_split("digits", None, ("validation",))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("val", "no split 'val'; choose one of train, or a part of one"),
        ("train[:", "no split"),
        ("", "no split ''"),
        ("train[4:4]", "is empty"),
        ("train[9:3]", "is empty"),
        ("train[:5]+train[4:6]", "names images twice"),
        ("train[50:60]", "no split|empty"),
    ],
)
def test_what_is_no_part(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_split(str(folder(tmp_path / "photos", "cat", "dog")), spec)


def test_validation_images_are_not_trained_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(folder(tmp_path / "photos", "cat", "dog"))
    train, validation = load_splits(name, validation_split="train[5:15]")
    assert (values(train), values(validation)) == ([*range(5), *range(15, 20)], list(range(5, 15)))
    train, validation = load_splits(name, validation_split="train")
    assert len(train) == len(validation) == 20 and "evaluated on its training images" in caplog.text
    with pytest.raises(DataError, match=r"streams have no parts"):
        load_splits(name, validation_split="train[:5]", streaming=True)


def test_a_share_to_hold_out_is_for_data_without_a_validation_split(tmp_path: Path) -> None:
    for name in ("train", "test"):
        folder(tmp_path / name, "cat", "dog")
    with pytest.raises(DataError, match=r"train_val_split=0\.2 is for data without a validation split, and 'test' is"):
        load_splits(str(tmp_path), train_val_split=0.2)
    assert [len(split) for split in load_splits(str(tmp_path))] == [20, 20]


def broken(path: Path) -> Path:
    """Image 13, `dog/03.png`, cannot be decoded."""
    (folder(path, "cat", "dog") / "dog" / "03.png").write_bytes(png(13)[:40])
    return path


@pytest.mark.parametrize(
    ("kind", "workers"), [("held out", 0), ("sample", 2), ("part", 0), ("parts", 0), ("words", 0)]
)
def test_errors_name_the_row_of_the_data_set(tmp_path: Path, kind: str, workers: int) -> None:
    """However the images were chosen, shuffled, or read in other processes."""
    name = str(broken(tmp_path / "photos"))
    if kind == "held out":
        split, other = load_splits(name, train_val_split=0.5, seed=1)
        split = split if any(p.endswith("dog/03.png") for p in paths(split)) else other
    elif kind == "sample":
        split = sample(load_split(name, "train")[0], 20)
    elif kind == "part":
        split = sample(load_split(name, "train[11:]")[0], 9)
    elif kind == "parts":
        split = load_split(name, "train[15:18]+train[12:14]")[0]
    else:  # text becomes class numbers, which copies the table
        whole = load_split(name, "train")[0].cast_column("label", datasets.Value("string"))
        held = sample(whole, 20)
        split, _, _ = labelled(held, held, "label")
    data = ImageData(split, PROCESSOR, 2)
    with pytest.raises(DataError) as caught:
        list(train_loader(data, len(data), 0, 0, 1, 0, 1, workers))
    assert str(caught.value).startswith(f"image 13 of train ({tmp_path}/photos/dog/03.png) cannot be read: ")
    assert "Traceback" not in str(caught.value)


def paths(split: Any) -> list[str]:
    return [image["path"] for image in split.cast_column("image", datasets.Image(decode=False))["image"]]


def test_a_bad_label_is_named_by_its_row_too(tmp_path: Path) -> None:
    split = load_split(str(folder(tmp_path / "photos", "cat", "dog", "emu")), "train")[0]
    with pytest.raises(DataError, match=r"image \d+ of train \(.*/emu/") as caught:
        ImageData(sample(split, 30), PROCESSOR, 2)
    row = int(str(caught.value).split()[1])
    assert f"/emu/{row - 20:02}.png" in str(caught.value)


def test_choosing_images_is_what_it_was(tmp_path: Path) -> None:
    """The same seed gives the same images as before rows were kept."""
    split = load_split(str(folder(tmp_path / "photos", "cat", "dog")), "train")[0]
    assert values(sample(split, 6)) == values(split.shuffle(seed=0).select(range(6)))
    parts = split.train_test_split(0.15, seed=3)
    assert [values(part) for part in load_splits(str(tmp_path / "photos"), seed=3)] == [
        values(parts["train"]), values(parts["test"]),
    ]  # fmt: skip


def test_a_folder_without_classes_has_images(tmp_path: Path) -> None:
    flat = folder(tmp_path / "photos", ".")
    assert len(load_split(str(flat), None)[0]) == 10
    for splits in (load_splits(str(flat)), load_splits(train_dir=str(flat))):
        with pytest.raises(DataError, match=r"'label' does not exist.*one sub-folder per class, two at least"):
            labelled(*splits, "label")


@pytest.mark.parametrize("way", ["dataset_name", "train_dir"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("empty", "the folder is empty"),
        ("text", "no file in it is an image or a table.*one sub-folder per class"),
        ("model", "the folder of a model"),
        ("model/config.json", "is a file"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, way: str, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("text/notes.heicx", "model/model.safetensors"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("x")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(DataError, match=message) as caught:
        load_splits(**{way: str(tmp_path / name)})  # type: ignore[arg-type]
    assert str(tmp_path / name) in str(caught.value) and "Instruction" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "{}", "validation_dir": "{}"}, "validation_dir=.* goes with train_dir"),
        ({"train_dir": "{}", "dataset_config_name": "plain"}, "leave dataset_config_name='plain' out"),
        ({"dataset_name": "digits", "dataset_config_name": "plain"}, "'digits' has no configurations"),
    ],
)
def test_names_that_nothing_would_be_read_by(tmp_path: Path, given: dict[str, str], message: str) -> None:
    photos = str(folder(tmp_path / "photos", "cat", "dog"))
    with pytest.raises(DataError, match=message):
        load_splits(**{name: value.format(photos) for name, value in given.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", " ", "./photos", "a/b/photos", "photos/", "~/photos", "digits:4294967296"])
def test_names_that_can_be_no_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"does not exist|is no name"):
        load_all(name)


def test_a_folder_with_the_signs_of_a_pattern(tmp_path: Path) -> None:
    split, _ = load_splits(train_dir=str(folder(tmp_path / "photos [1]*", "cat", "dog")))
    assert len(split) == 17


def test_classes_are_enough_and_numbers_are_classes() -> None:
    table = datasets.Dataset.from_dict({"label": [0, 0]})
    with pytest.raises(DataError, match=r"1 class \(0\), where two or more"):
        labelled(table, table, "label")
    table = datasets.Dataset.from_dict({"label": [1440764, 0]})
    with pytest.raises(DataError, match="label 1440764: whole numbers are classes from 0 on"):
        labelled(table, table, "label")
    table = datasets.Dataset.from_dict({"label": [[0, 1], [1]]})
    with pytest.raises(DataError, match="holds a List, not classes"):
        labelled(table, table, "label")
    table = datasets.Dataset.from_dict({"label": [1, None, 0], "image": ["a", "b", "c"]})
    train, _, names = labelled(table, table, "label")
    assert names == ["0", "1"]
    with pytest.raises(DataError, match="image 1 has the label None"):
        ImageData(train, PROCESSOR, 2)


def test_pixels_are_what_they_were(tmp_path: Path) -> None:
    """An image of a folder, undecoded, against Pillow's."""
    split = load_split(str(folder(tmp_path / "photos", "cat", "dog")), "train")[0]
    expected = PROCESSOR(images=split[7]["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImageData(split, PROCESSOR, 2)[7][0], expected)
