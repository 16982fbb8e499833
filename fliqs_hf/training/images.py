"""One image and its label, as a model takes them, or an error that says why they cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fliqs_hf.errors import ConfigError, DataError


def pixels(image: Any, processor: Any, name: str) -> Tensor:
    """Pixel values [channels, height, width], float32.

    Args:
        image: a PIL image, or an undecoded one, {"bytes": …, "path": …}.
        processor: a Transformers image processor.
    Raises: DataError: `image` cannot be decoded or processed, or its mode does not say which value is white; `name`
        says which one it is.
    """
    import datasets

    try:
        if isinstance(image, dict):
            image = datasets.Image().decode_example(image)
        values: Tensor = processor(images=rgb(image), return_tensors="pt")["pixel_values"][0]
    except (OSError, ValueError, SyntaxError, AttributeError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    return values


def rgb(image: Image.Image) -> Image.Image:
    """`image` with 8 bits per channel; 16-bit grey is rounded to the nearest, 65535 to 255 (there are no ties).

    Pillow by itself cuts 16 bits off at 255. It decodes PNG and PGM files of 16 bits as mode I;16 or I.

    Raises: ValueError: mode F, or mode I from another source: nothing says which value is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 257 = 65535 / 255
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode!r} have no defined range; convert the images to 8 bits or to 16-bit grey"
        )
    return image.convert("RGB")


def resize_to(processor: Any, side: int) -> None:
    """Make `processor` give square images of `side` pixels.

    Its sizes keep their proportions, so that a crop shows the part of an image that it showed before. Where that does
    not give such images, they are resized to the square whole.

    Raises: ConfigError: that does not give images [3, side, side] either.
    """
    before = _shape(processor)
    ways: list[dict[str, Any]] = [{"size": {"height": side, "width": side}, "do_center_crop": False}]
    if isinstance(before, tuple) and before[1] == before[2]:
        sizes = {key: value for key in ("size", "crop_size") if (value := getattr(processor, key, None))}
        ways.insert(0, {key: _scaled(value, side, before[1]) for key, value in sizes.items()})
    for way in ways:
        for key, value in way.items():
            setattr(processor, key, value)
        made = _shape(processor)
        if made == (3, side, side):
            return
    raise ConfigError(
        f"image_size={side} cannot be set for {type(processor).__name__}: of a 96 × 64 image it makes {made}, not "
        f"{(3, side, side)}; leave image_size out, or save a processor for this size with the checkpoint"
    )


def _shape(processor: Any) -> tuple[int, int, int] | str:
    """What becomes of an image that is not square: its [channels, height, width], or the error."""
    try:
        values = processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"][0]
        channels, height, width = values.shape
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"an error ({error})"
    return channels, height, width


def _scaled(size: Any, side: int, before: int) -> dict[str, int]:
    return {key: round(value * side / before) for key, value in dict(size).items()}


def checked_label(label: Any, num_labels: int, name: str) -> int:
    """`label`. Raises: DataError: it is not one of the model's classes, 0 … `num_labels` − 1."""
    if not (isinstance(label, int) and 0 <= label < num_labels):
        raise DataError(f"{name} has the label {label!r}, but the model's head has {num_labels} classes")
    return label
