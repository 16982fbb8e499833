"""Images of every mode as 8-bit RGB, or refused by name."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.training.images import decoded, mode_of, pixels
from fliqs_hf.validation.data import read_batches
from tests.training.test_data import PROCESSOR


def encoded(values: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_every_16_bit_grey_is_rounded_to_the_nearest_of_8_bits(kind: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = decoded(Image.open(io.BytesIO(encoded(values, kind))), "it")
    assert image.mode == "RGB"
    expected = np.rint(values / 257).astype(np.uint8)  # 65535 / 255; an odd number, so there are no ties
    assert (np.asarray(image) == expected[..., None]).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_photographs_are_turned_as_their_exif_data_say(turn: int, kind: type) -> None:
    """However they come: `datasets` turns what it decodes, Pillow does not."""
    values = np.arange(6, dtype=kind).reshape(2, 3) * kind(np.iinfo(kind).max // 5)
    picture, exif, buffer = Image.fromarray(values), Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = turn
    picture.save(buffer, "PNG", exif=exif)
    flipped = values if turn in (1, 6, 8, 3) else values[:, ::-1]  # the mirrored ones are 2, 4, 5 and 7
    quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[turn]
    expected = np.rot90(flipped, quarters).astype(int) * 255 // np.iinfo(kind).max
    for image in ({"bytes": buffer.getvalue(), "path": None}, Image.open(buffer)):
        assert (np.asarray(decoded(image, "it"))[..., 0] == expected).all()


def test_big_endian_grey() -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], dtype=">u2"))
    assert image.mode == "I;16B" and np.asarray(decoded(image, "it"))[0, :, 0].tolist() == [0, 1, 255]


def test_8_bits_stay_as_they_are() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (Image.fromarray(values), Image.fromarray(np.stack([values] * 3, axis=-1))):
        assert (np.asarray(decoded(image, "it")) == values[..., None]).all()


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_modes_without_a_range_are_refused(kind: type, mode: str) -> None:
    file = {"bytes": encoded(np.ones((8, 8), dtype=kind), "TIFF"), "path": "scan.tif"}
    with pytest.raises(DataError, match=rf"image 3 cannot be read.*mode '{mode}'.*8 bits"):
        pixels(file, PROCESSOR, "image 3")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bytes": jpeg()[:700], "path": "a.jpg"}, "cannot be read"),
        ({"bytes": b"", "path": "a.jpg"}, "cannot be read"),
        ({"bytes": b"no image", "path": None}, "cannot be read"),
        ({"bytes": None, "path": "/nowhere/a.jpg"}, "cannot be read"),
        ({"bytes": None, "path": None}, "cannot be read"),
        (
            {"bytes": encoded(np.zeros((8, 8), np.uint8), "PNG").replace(b"IDAT", b"IDAX"), "path": None},
            "cannot be read",
        ),
        ({"bytes": encoded(np.zeros((8, 8, 3), np.uint8), "TIFF")[:40], "path": None}, "cannot be read"),
        (Image.open(io.BytesIO(jpeg()[:700])), "cannot be read"),
        (None, "nothing there"),
        ("a.jpg", "is a str.*cast_column"),
        (b"bytes", "is a bytes.*cast_column"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \[4, 4, 2\]"),
        ([[0, 0], [0, 0]], "is a list"),
    ],
)
def test_every_way_in_which_an_image_can_fail(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^image 3 .*{message}"):
        pixels(image, PROCESSOR, "image 3")


def test_a_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of 179 million, which would take as much memory
    with pytest.raises(DataError, match=r"image 3 cannot be read.*decompression bomb"):
        pixels({"bytes": jpeg(), "path": None}, PROCESSOR, "image 3")


def test_whatever_a_decoder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Image.Image, "load", fails)
    with pytest.raises(DataError, match="image 3 cannot be read: AssertionError"):
        pixels(Image.new("RGB", (4, 4)), PROCESSOR, "image 3")


def test_what_the_processor_does_not_take() -> None:
    with pytest.raises(DataError, match="image 3, 8 × 8 pixels, is not taken by ViTImageProcessor"):
        pixels(np.zeros((8, 8), np.uint8), PROCESSOR, "image 3", "L")  # its mean has 3 channels


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (8, 8, 4)])
def test_arrays_are_images(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = Image.fromarray(values[..., 0] if shape[2:] == (1,) else values)
    for mode in ("RGB", "L"):
        assert np.array_equal(np.asarray(decoded(values, "it", mode)), np.asarray(expected.convert(mode)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_validation_and_training_read_alike(mode: str) -> None:
    """16-bit grey among others."""
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)[::32, ::32].copy()
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    palette = Image.fromarray(colour[..., :3]).quantize(8)
    cmyk = io.BytesIO()
    Image.fromarray(colour[..., :3]).convert("CMYK").save(cmyk, "JPEG")
    files = [encoded(grey, "PNG"), encoded(grey, "TIFF"), encoded(colour, "PNG"), cmyk.getvalue()]
    images = [{"bytes": file, "path": None} for file in files] + [grey, colour, palette]
    rows = [{"image": image, "label": 0} for image in images]
    (batch,) = read_batches(rows, 99, "image", "label", lambda *_: 0, mode)
    table = datasets.Dataset.from_dict(
        {"image": images[:4], "label": [0] * 4},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    (again,) = read_batches(table, 99, "image", "label", lambda *_: 0, mode)
    for index, image in enumerate(images):
        expected = np.asarray(decoded(image, "it", mode))
        assert np.array_equal(np.asarray(batch.images[index]), expected)
        assert index > 3 or np.array_equal(np.asarray(again.images[index]), expected)


@pytest.mark.parametrize(
    ("config", "mode"),
    [({}, "RGB"), ({"num_channels": 1}, "L"), ({"vision_config": SimpleNamespace(num_channels=1)}, "L")],
)
def test_modes_of_models(config: dict[str, Any], mode: str) -> None:
    assert mode_of(SimpleNamespace(**config)) == mode
    with pytest.raises(ConfigError, match="num_channels=4"):
        mode_of(SimpleNamespace(num_channels=4))
