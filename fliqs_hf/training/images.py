"""One image and its label, as a model takes them, or an error that says why they cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from fliqs_hf.errors import ConfigError, DataError


class LazyText:
    """A text that is made where it is wanted: in an error."""

    def __init__(self, make: Callable[[], str]) -> None:
        self.make = make

    def __str__(self) -> str:
        return self.make()


def pixels(image: Any, processor: Any, name: object, mode: str = "RGB") -> Tensor:
    """Pixel values [channels, height, width], float32.

    Args:
        image: what `decoded` takes.
        processor: a Transformers image processor.
        name: its text says which image it is; asked for only where something is wrong.
        mode: of Pillow, "RGB" or "L": what the model takes.
    Raises: DataError: `image` cannot be decoded or processed.
    """
    whole = decoded(image, name, mode)
    try:
        values: Tensor = processor(images=whole, return_tensors="pt")["pixel_values"][0]
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{name}, {whole.width} × {whole.height} pixels, is not taken by {type(processor).__name__}: {error}"
        ) from error
    return values


def decoded(image: Any, name: object, mode: str = "RGB") -> Image.Image:
    """`image` with 8 bits per channel, in `mode`, the right way up where its EXIF data say which that is.

    Args:
        image: a PIL image; an undecoded one, {"bytes": …, "path": …}; or an array [height, width] or [height, width,
            channels] of 1, 3 or 4 channels, uint8, or uint16 if grey.
    Raises: DataError: it is none of these, is damaged, or its mode does not say which value is white.
    """
    import datasets

    if image is None:
        raise DataError(f"{name} cannot be read: the data set has nothing there")
    try:
        if isinstance(image, dict):
            image = datasets.Image().decode_example(image)
        elif isinstance(image, np.ndarray):
            image = _of_array(image)
        if isinstance(image, Image.Image):
            image.load()  # PIL opens files lazily: a truncated one shows only here
            if image.getexif().get(ExifTags.Base.Orientation) is not None:  # `datasets` has turned its own already
                image = ImageOps.exif_transpose(image)
            return eight_bits(image).convert(mode)
    except Exception as error:  # a damaged file leads Pillow's decoders into whatever error there is
        raise DataError(f"{name} cannot be read: {str(error) or type(error).__name__}") from error
    raise DataError(
        f"{name} is a {type(image).__name__}, not a PIL image or a uint8 array [height, width, 3]; "
        "a datasets column of paths or bytes becomes images with dataset.cast_column(column, datasets.Image())"
    )


def name_of(image: Any, row: Any, split: Any = None) -> str:
    """What an image is called in errors: by its row in the data set, its split and its file, where they are known.

    Args:
        image: undecoded, or a PIL image. row: its number, or text that names the split as well.
    """
    path = image.get("path") if isinstance(image, dict) else getattr(image, "filename", None)
    return f"image {row}" + (f" of {split}" if split else "") + (f" ({path})" if path else "")


def mode_of(config: Any) -> str:
    """The mode of Pillow that a model's images have. Raises: ConfigError: neither 1 nor 3 channels."""
    for part in (config, getattr(config, "vision_config", None)):
        channels = getattr(part, "num_channels", None)
        if channels not in (None, 1, 3):
            raise ConfigError(
                f"the model takes images of num_channels={channels}, but images have 3 (RGB) or 1 (grey)"
            )
        if channels == 1:
            return "L"
    return "RGB"


def _of_array(array: np.ndarray) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not (grey or (array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8)):
        raise ValueError(
            f"it is an array of {array.dtype} {list(array.shape)}, not of uint8 [height, width, 3] or [height, width]"
        )
    return Image.fromarray(array)


def eight_bits(image: Image.Image) -> Image.Image:
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
    return image


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
