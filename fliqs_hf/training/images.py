"""One image and its label, as a model takes them, or an error that says which one cannot be used."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fliqs_hf.errors import DataError


def pixels(image: Any, processor: Any, name: str) -> Tensor:
    """Pixel values [channels, height, width], float32.

    Args:
        image: a PIL image of any mode, or an undecoded one, {"bytes": …, "path": …}.
        processor: a Transformers image processor.
    Raises: DataError: `image` cannot be decoded or processed; `name` says which one it is.
    """
    import datasets

    try:
        if isinstance(image, dict):
            image = datasets.Image().decode_example(image)
        values: Tensor = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    except (OSError, ValueError, SyntaxError, AttributeError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    return values


def checked_label(label: Any, num_labels: int, name: str) -> int:
    """`label`. Raises: DataError: it is not one of the model's classes, 0 … `num_labels` − 1."""
    if not (isinstance(label, int) and 0 <= label < num_labels):
        raise DataError(f"{name} has the label {label!r}, but the model's head has {num_labels} classes")
    return label
