"""Images of every mode as 8-bit RGB, or refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fliqs_hf.errors import DataError
from fliqs_hf.training.images import decoded, pixels
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
