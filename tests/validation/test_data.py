"""Images and labels that do not fit are refused by name, those that fit are numbered as the models number them."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fliqs_hf.errors import DataError
from fliqs_hf.training.labels import LabelReader
from fliqs_hf.validation.data import class_names, read_batches

ANIMALS = ("cat", "dog", "emu")


def model(names: tuple[str, ...]) -> Any:
    return SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names))))


def picture(value: int = 0, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (4, 4), value)


def read(rows: Any, reader: Any = lambda value, row: int(value), batch_size: int = 2, **columns: str) -> list[Any]:
    settings = {"image_column": "image", "label_column": "label", **columns}
    return list(read_batches(rows, batch_size, read_label=reader, **settings))


def test_class_names_come_from_the_model_that_has_them() -> None:
    unnamed = model(("LABEL_0", "LABEL_1", "LABEL_2"))
    assert class_names(unnamed, model(ANIMALS)) == class_names(model(ANIMALS), unnamed) == ANIMALS
    assert class_names(unnamed, unnamed) is None
    assert class_names(object(), object()) is None


@pytest.mark.parametrize(
    ("other", "message"), [(("cat", "emu", "dog"), "class 1 is 'dog'.*'emu'"), (("cat", "dog"), "3 classes.*2")]
)
def test_models_with_other_classes_are_refused(other: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_names(model(ANIMALS), model(other))


def test_named_classes_are_matched_by_name_whatever_their_order() -> None:
    feature = datasets.ClassLabel(names=["emu", "Cat "])
    reader = LabelReader(feature, ANIMALS, 3, "name")
    assert [reader(0, 0), reader(1, 1)] == [2, 0]
    by_index = LabelReader(feature, ANIMALS, 3, "index")
    assert [by_index(0, 0), by_index(1, 1)] == [0, 1]


def test_equal_lists_of_names_are_taken_in_order_even_with_duplicates() -> None:
    names = ("crane", "hen", "crane")  # ImageNet has such pairs
    assert LabelReader(datasets.ClassLabel(num_classes=3), names, 3, "name")(2, 0) == 2
    assert LabelReader(SimpleNamespace(names=list(names)), names, 3, "name")(2, 0) == 2
    with pytest.raises(DataError, match="'crane' is the name of 2 classes of the models"):
        LabelReader(SimpleNamespace(names=["crane"]), names, 3, "name")


def test_text_labels_are_matched_by_name() -> None:
    assert LabelReader(None, ANIMALS, 3, "name")("Dog", 0) == 1
    with pytest.raises(DataError, match="id2label"):
        LabelReader(None, None, 3, "name")("dog", 0)


def test_label_sets_that_do_not_match_are_refused() -> None:
    with pytest.raises(DataError, match=r"'horse' is no class of the models.*match_labels='index'"):
        LabelReader(datasets.ClassLabel(names=["cat", "horse"]), ANIMALS, 3, "name")
    with pytest.raises(DataError, match="'3' has the number of no class of the models"):
        LabelReader(datasets.ClassLabel(num_classes=10), ANIMALS, 3, "name")
    LabelReader(datasets.ClassLabel(num_classes=10), ANIMALS, 3, "index")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "image 7 has the label 3, which is not one of the models' 3 classes"),
        (-1, "image 7 has the label -1.*choose another split"),
        (True, "image 7 has the label True, which is not a class number"),
        (1.0, "image 7 has the label 1.0, which is not a class number"),
        (None, "image 7 has the label None, which is not a class number"),
    ],
)
def test_labels_out_of_range_are_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelReader(None, ANIMALS, 3, "name")(value, "image 7")


def test_minus_one_is_refused_with_named_classes_too() -> None:
    reader = LabelReader(datasets.ClassLabel(names=["emu", "cat"]), ANIMALS, 3, "name")
    for value in (-1, 2):
        with pytest.raises(DataError, match=r"image 0 has the label .* not one of the data set's own 2 classes"):
            reader(value, "image 0")


def test_batches_keep_the_order_and_the_rest() -> None:
    rows = ({"image": picture(i), "label": np.int64(i)} for i in range(5))
    batches = read(rows)
    assert [batch.rows for batch in batches] == [batch.labels.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [len(batch.images) for batch in batches] == [2, 2, 1]


def test_a_datasets_table_with_other_column_names() -> None:
    table = datasets.Dataset.from_dict(
        {"img": [picture(9, "L"), picture(8, "L")], "fine": [1, 0]},
        features=datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])}),
    )
    (batch,) = read(table, image_column="img", label_column="fine")
    assert batch.labels.tolist() == [1, 0]
    assert batch.images[0].mode == "RGB"
    assert batch.images[0].getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(DataError, match="'image' does not exist; the dataset has img, fine"):
        read(table)


def test_arrays_are_images_and_a_mode_can_be_asked_for() -> None:
    colour = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (batch,) = read([{"image": colour, "label": 0}, {"image": colour[..., 0], "label": 0}])
    assert (np.asarray(batch.images[0]) == colour).all()
    assert (np.asarray(batch.images[1]) == colour[..., :1]).all()
    reader = lambda value, row: 0  # noqa: E731
    (grey,) = read_batches([{"image": picture(7), "label": 0}], 4, "image", "label", reader, "L")
    assert grey.images[0].mode == "L"


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()[:700]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("cat.jpg", "image 1 is a str.*cast_column"),
        (None, "image 1 cannot be read: the data set has nothing there"),
        (np.zeros((4, 4, 3)), r"image 1 cannot be read.*float64 \[4, 4, 3\]"),
        (picture(700, "I"), "image 1 cannot be read.*mode 'I'"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read([{"image": picture(), "label": 0}, {"image": image, "label": 0}])


def test_damaged_files_are_named() -> None:
    with pytest.raises(DataError, match="image 0 cannot be read"):
        read([{"image": Image.open(io.BytesIO(truncated_jpeg())), "label": 0}])
    rows = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    with pytest.raises(DataError, match="image 0 cannot be read"):
        read(datasets.Dataset.from_dict(rows, features=features))


def test_rows_must_be_mappings() -> None:
    with pytest.raises(DataError, match="image 0: expected a mapping of columns, got a tuple"):
        read([(picture(), 0)])
