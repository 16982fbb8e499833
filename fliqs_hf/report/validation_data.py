"""Images and labels of any data set as a validation needs them: checked, numbered as the model numbers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fliqs_hf.errors import DataError

MatchLabels = Literal["name", "index"]


@dataclass(frozen=True)
class Batch:
    """Up to `batch_size` images with the labels [images] that the model would give them; `first` is the number of the
    first one in the data set."""

    first: int
    images: list[Image.Image]
    labels: NDArray[np.int64]


def class_names(original: Any, quantized: Any) -> tuple[str, ...] | None:
    """Names of the classes, by label; None where neither model has names of its own (`LABEL_0` is none).

    Raises: DataError: the models have different numbers of classes, or different names.
    """
    names: tuple[str, ...] | None = None
    size: int | None = None
    for model in (original, quantized):
        table = getattr(getattr(model, "config", None), "id2label", None)
        if not table:
            continue
        if size is not None and len(table) != size:
            raise DataError(f"the original has {size} classes, the quantized model {len(table)}: not the same task")
        size = len(table)
        own = tuple(str(table.get(label, table.get(str(label), f"LABEL_{label}"))) for label in range(size))
        if own == tuple(f"LABEL_{label}" for label in range(size)):
            continue
        if names is not None and own != names:
            label = next(i for i in range(size) if own[i] != names[i])
            raise DataError(
                f"class {label} is {names[label]!r} for the original and {own[label]!r} for the quantized model; "
                "correct id2label in the config of one of them"
            )
        names = own
    return names


def label_reader(
    feature: Any, names: Sequence[str] | None, classes: int | None, match: MatchLabels
) -> Callable[[Any, int], int]:
    """A function (label as the data set has it, number of its row) -> label as the models have it.

    A data set that names its classes (`datasets.ClassLabel`) is matched by name, so that another order or a subset of
    the classes is read correctly; text labels are matched by name, plain numbers are taken as they are.

    Args:
        feature: what the data set says about its label column, or None.
        names: of the models' classes, or None.
        classes: number of the models' classes, or None where unknown.
    Raises: DataError: here, or from the function: a label that is no class of the models.
    """
    own = getattr(feature, "names", None)
    translation: list[int] | None = None
    if own is not None and match == "name":
        own = [str(name) for name in own]
        if names is not None and own != [str(i) for i in range(len(own))]:
            if tuple(own) != tuple(names):
                translation = [_by_name(name, names) for name in own]
        elif classes is not None and len(own) != classes:
            raise DataError(
                f"the data set has {len(own)} classes, the models {classes}, and no names to match them by; "
                "if the numbers mean the same classes pass match_labels='index'"
            )

    def read(value: Any, row: int) -> int:
        if isinstance(value, str):
            if names is None:
                raise DataError(f"image {row}: label {value!r} is text, but the models' config has no id2label names")
            return _by_name(value, names)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise DataError(f"image {row}: label {value!r} is not a class number; choose another label_column")
        label = int(value)
        known = classes if translation is None else len(translation)
        if label < 0 or (known is not None and label >= known):
            hint = "; -1 marks the images of a split without labels: choose another split" if label == -1 else ""
            owner = "the models'" if translation is None else "the data set's own"
            count = "" if known is None else f"{known} "
            raise DataError(f"image {row}: label {label} is not one of {owner} {count}classes{hint}")
        return label if translation is None else translation[label]

    return read


def _by_name(name: str, names: Sequence[str]) -> int:
    matches = [label for label, other in enumerate(names) if other.strip().casefold() == name.strip().casefold()]
    if len(matches) != 1:
        problem = "no class of the models" if not matches else f"the name of {len(matches)} classes of the models"
        raise DataError(
            f"label {name!r} is {problem} (such as {', '.join(map(repr, names[:3]))}); "
            "use a data set with the models' names, or pass match_labels='index' if its numbers mean the same classes"
        )
    return matches[0]


def read_batches(
    dataset: Iterable[Mapping[str, Any]],
    batch_size: int,
    image_column: str,
    label_column: str,
    read_label: Callable[[Any, int], int],
    mode: str = "RGB",
) -> Iterator[Batch]:
    """The whole data set, in its order; only the last batch may be smaller than `batch_size`.

    Args:
        mode: PIL mode that every image is converted to: what the models were trained on.

    Raises: DataError: a missing column, an image that cannot be read, a label that does not fit; it names the row.
    """
    images: list[Image.Image] = []
    labels: list[int] = []
    row = 0
    for row, example in _numbered(dataset):
        for column in (image_column, label_column):
            if column not in example:
                raise DataError(
                    f"image {row} has no column {column!r}; there are {', '.join(map(repr, example))}: "
                    "choose with image_column and label_column"
                )
        images.append(_image(example[image_column], row, mode))
        labels.append(read_label(example[label_column], row))
        if len(images) == batch_size:
            yield Batch(row + 1 - len(images), images, np.array(labels, dtype=np.int64))
            images, labels = [], []
    if images:
        yield Batch(row + 1 - len(images), images, np.array(labels, dtype=np.int64))


def _numbered(dataset: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = iter(dataset)
    number = 0
    while True:
        try:
            example = next(rows)
        except StopIteration:
            return
        except OSError as error:  # what PIL raises for a damaged file
            raise DataError(f"image {number} cannot be read: {error}") from error
        if not isinstance(example, Mapping):
            raise DataError(f"image {number}: expected a mapping of columns, got a {type(example).__name__}")
        yield number, example
        number += 1


def _image(value: Any, row: int, mode: str) -> Image.Image:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] in ((), (3,), (4,)):
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        raise DataError(
            f"image {row} is a {type(value).__name__}, not a PIL image or a uint8 array [height, width, 3]; "
            "a datasets column of paths or bytes becomes images with dataset.cast_column(column, datasets.Image())"
        )
    if value.mode.startswith(("I", "F")):
        raise DataError(f"image {row} has mode {value.mode!r}: convert it to 8 bits per channel first")
    try:
        value.load()  # PIL opens files lazily: a truncated one shows only here
        return value.convert(mode)
    except OSError as error:
        raise DataError(f"image {row} cannot be read: {error}") from error
