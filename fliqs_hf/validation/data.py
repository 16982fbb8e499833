"""Images and labels of any data set as a validation needs them: checked, numbered as the model numbers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training.data import Images, undecoded
from fliqs_hf.training.images import LazyText, decoded, mode_of, name_of
from fliqs_hf.training.labels import LabelReader, MatchLabels, generic_names, names_of
from fliqs_hf.training.splits import ROW, check_column


@dataclass(frozen=True)
class Batch:
    """Up to `batch_size` images with the labels [images, ...] that the model would give them; `rows` are the numbers
    of the images in the data set, or texts that name the split as well. Where the task reads images by itself,
    `images` are pixel values."""

    rows: list[int | str]
    images: list[Any]
    labels: NDArray[Any]


def class_names(original: Any, quantized: Any, task: Task = IMAGE_CLASSIFICATION) -> tuple[str, ...] | None:
    """Names of the classes, by label; None where neither model has names of its own (`LABEL_0` is none).

    Raises: DataError: the models have different numbers of classes, or different names. ConfigError: one of them does
        not choose one of several classes.
    """
    names: tuple[str, ...] | None = None
    size: int | None = None
    for model in (original, quantized):
        config = getattr(model, "config", None)
        table = getattr(config, "id2label", None)
        if not table:
            continue
        task.check(config)
        if size is not None and len(table) != size:
            raise DataError(f"the original has {size} classes, the quantized model {len(table)}: not the same task")
        size = len(table)
        own = tuple(names_of(config))
        if list(own) == generic_names(size):
            continue
        if names is not None and own != names:
            label = next(i for i in range(size) if own[i] != names[i])
            raise DataError(
                f"class {label} is {names[label]!r} for the original and {own[label]!r} for the quantized model; "
                "correct id2label in the config of one of them"
            )
        names = own
    return names


def check_match(task: Task, match: str) -> None:
    """Raises: ConfigError: classes of a task that has none per image would be matched otherwise than as they are."""
    if match != "name" and not task.class_per_image:
        raise ConfigError(
            f"match_labels={match!r} is for tasks with one class per image, not for {task.name!r}: leave it out"
        )


def label_reader(
    dataset: Any, column: str, names: tuple[str, ...] | None, classes: int | None, match: MatchLabels
) -> LabelReader:
    """The reader of a data set's label column, by the rules of `training.labels`.

    Args:
        names: of the models' classes, or None. classes: their number, or None where unknown.
    Raises: DataError: the data set's classes are not the models'.
    """
    import datasets

    feature = (getattr(dataset, "features", None) or {}).get(column)
    text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    words = None
    if text and isinstance(dataset, datasets.Dataset):
        words = sorted(set(dataset[column]) - {None})
    return LabelReader(feature, names, classes, match, words)


def read_batches(
    dataset: Iterable[Mapping[str, Any]],
    batch_size: int,
    image_column: str,
    label_column: str,
    read_label: Callable[[Any, object], int],
    mode: str = "RGB",
) -> Iterator[Batch]:
    """The whole data set, in its order; only the last batch may be smaller than `batch_size`.

    Args:
        mode: PIL mode that every image is converted to: what the models were trained on.

    Raises: DataError: a missing column, an image that cannot be read, a label that does not fit; it names the row.
    """
    images: list[Image.Image] = []
    labels: list[int] = []
    rows: list[int | str] = []
    split = getattr(dataset, "split", None)
    for number, example in _numbered(_plain(dataset, image_column, label_column)):
        for column, hint in ((image_column, "image_column"), (label_column, "label_column")):
            if column not in example:
                there = ", ".join(repr(name) for name in example if name != ROW)
                raise DataError(f"image {number} has no column {column!r}; there are {there}: choose with {hint}")
        image, row = example[image_column], example.get(ROW, number)
        name = LazyText(lambda image=image, row=row: name_of(image, row, None if isinstance(row, str) else split))  # type: ignore[misc]
        images.append(decoded(image, name, mode))
        labels.append(read_label(example[label_column], name))
        rows.append(row)
        if len(images) == batch_size:
            yield Batch(rows, images, np.array(labels, dtype=np.int64))
            images, labels, rows = [], [], []
    if images:
        yield Batch(rows, images, np.array(labels, dtype=np.int64))


@dataclass(frozen=True)
class Reading:
    """How a data set is read. `processor` makes pixel values of the images in `batches`; `names`: of the classes."""

    batches: Iterator[Batch]
    processor: Callable[..., Any]
    names: tuple[str, ...] | None = None
    labels: LabelReader | None = None

    @property
    def matched_by(self) -> str:
        """What labels were matched by; for text known at the end."""
        return "task" if self.labels is None else self.labels.by


def read(
    task: Task,
    models: tuple[Any, Any],
    dataset: Any,
    processor: Callable[..., Any],
    batch_size: int,
    columns: tuple[str, str],
    match: MatchLabels,
) -> Reading:
    """Labels as classes of the models; where the task has no one class per image, as the task reads its targets.

    Raises: ConfigError: models that are not of the task. DataError: classes that are not the models'.
    """
    config = getattr(models[0], "config", None)
    if task.class_per_image:
        names = class_names(*models, task)
        classes = len(names) if names else getattr(config, "num_labels", None)
        labels = label_reader(dataset, columns[1], names, classes, match)
        return Reading(read_batches(dataset, batch_size, *columns, labels, mode_of(config)), processor, names, labels)
    check_match(task, match)
    task.check_right()
    if not hasattr(dataset, "column_names"):
        raise DataError(f"the task {task.name!r} reads a datasets.Dataset, not a {type(dataset).__name__}")
    task.check(config)
    data = task.data(
        dataset, processor, getattr(config, "num_labels", 0), image_column=columns[0], label_column=columns[1]
    )
    rows = dataset[ROW] if ROW in dataset.column_names else range(len(data))
    return Reading(_task_batches(data, rows, batch_size), _stacked)


def targets(
    task: Task, rows: Any, columns: tuple[str, str], config: Any, processor: Any, match: MatchLabels
) -> torch.Tensor:
    """Of all images of a `datasets.Dataset`, [images, ...], as a model with this config would have them.

    Raises: DataError: a label that is none of its classes; where the task has one class per image, before any image is
        read.
    """
    names, (image_column, label_column) = tuple(names_of(config)), columns
    if not task.class_per_image:
        data = task.data(rows, processor, len(names), image_column=image_column, label_column=label_column)
        return torch.stack([torch.as_tensor(data[index][1]) for index in range(len(data))])
    reader, images = label_reader(rows, label_column, names, len(names), match), Images(rows, image_column)
    return torch.tensor([reader(value, images[index][1]) for index, value in enumerate(rows[label_column])])


def _task_batches(data: Any, rows: Sequence[int | str], batch_size: int) -> Iterator[Batch]:
    for first in range(0, len(data), batch_size):
        some = range(first, min(first + batch_size, len(data)))
        images, targets = zip(*(data[index] for index in some), strict=True)
        labels = torch.stack([torch.as_tensor(target) for target in targets])
        yield Batch([rows[index] for index in some], list(images), labels.numpy())


def _stacked(images: Sequence[torch.Tensor], return_tensors: str) -> dict[str, torch.Tensor]:
    """What an image processor makes of images, of those that a task has processed already."""
    return {"pixel_values": torch.stack(list(images))}


def _plain(dataset: Any, image_column: str, label_column: str) -> Any:
    """A `datasets` table with its images undecoded, so that errors know their files; anything else as it is."""
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    formatted = isinstance(dataset, datasets.Dataset) and dataset.format["type"] is not None
    if formatted or not dataset.features:  # a transform of the user's makes of the columns what it wants
        return dataset
    check_column(dataset, image_column)
    check_column(dataset, label_column, "label")
    return undecoded(dataset, image_column)


def _numbered(dataset: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = iter(dataset)
    number = 0
    while True:
        try:
            example = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever reading and decoding in the user's data set raise
            raise DataError(f"image {number} cannot be read: {error}") from error
        if not isinstance(example, Mapping):
            raise DataError(f"image {number}: expected a mapping of columns, got a {type(example).__name__}")
        yield number, example
        number += 1
