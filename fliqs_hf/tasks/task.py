"""A task: what a model's output means, its loss and its measure, in one object; and the tasks that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fliqs_hf.errors import ConfigError


@dataclass(frozen=True)
class Score:
    """What a task measures of a model over `n` images.

    Attributes:
        value: a fraction; higher is better.
        measure: what `value` is, in words, such as "mean IoU".
        loss: mean over images.
        metrics: what those of the `evaluate` library say.
        more: other figures, by name.
    """

    value: float
    measure: str
    n: int
    loss: float
    metrics: dict[str, Any] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Of `value`, in logs."""
        return self.measure.replace(" ", "_").lower()

    def to_dict(self) -> dict[str, Any]:
        """For records; `recorded` reads it."""
        rest = {"n": self.n, "loss": self.loss, "metrics": self.metrics}
        return {"measure": self.measure, "value": self.value, **self.more, **rest}


def recorded(entry: Mapping[str, Any]) -> tuple[str, float]:
    """Measure and value of what a `Score` has recorded. Raises: KeyError, TypeError, ValueError: it is none."""
    if "measure" in entry:
        return str(entry["measure"]), float(entry["value"])
    return "top-1", float(entry["top1"])


class Losses:
    """Losses of batches, summed over images. Targets that mean nothing are counted, and refused by `check`: on an
    accelerator, where looking at every batch would wait for it, only once.

    Attributes:
        images: targets seen. invalid: how many of them mean nothing, int64 [], on their device.
        classes: that the last prediction chose from, where the task has any.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.images, self.invalid = task, 0, torch.zeros((), dtype=torch.int64)
        self.classes = 0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Sum over the batch."""
        self.count(torch.zeros(len(target), dtype=torch.bool, device=target.device))
        return self.task.loss(prediction, target) * len(target)

    def count(self, bad: Tensor) -> None:
        """Args: bad: which targets of a batch mean nothing, bool [batch]. Raises: DataError: on a CPU, some."""
        self.images += len(bad)
        self.invalid = self.invalid.to(bad.device) + bad.sum()
        if bad.device.type == "cpu":
            self.check(int(self.invalid), self.images)

    def check(self, invalid: int, images: int) -> None:
        """Raises: DataError: `invalid` of the targets of `images` mean nothing."""


class Task:
    """What search, training, evaluation and commands ask about a model's output and the data set's targets.

    Predictions and targets are tensors whose first dimension is the image.

    Attributes:
        name: as `pipeline(…)` of Transformers has it.
        model: the Auto class that loads its models, by name.
        models: its models, in words.
        measure: what `Score.value` is, in words.
        share: what the share of images that are `right` is called, in words.
        columns: of the data set, where nothing else is said: images and targets.
        example: a line of Python for model cards, after the `output` of one image.
        class_per_image: a target is one class of its image, so that images can be streamed, mixed and augmented, and
            looked at class by class.
        right_in_part: an image is not right or wrong as a whole, so that there is no `right`.
    """

    name: ClassVar[str]
    model: ClassVar[str]
    models: ClassVar[str]
    measure: ClassVar[str]
    share: ClassVar[str] = "share of right answers"
    columns: ClassVar[tuple[str, str]] = ("image", "label")
    class_per_image: ClassVar[bool] = False
    right_in_part: ClassVar[bool] = False
    example: ClassVar[str] = "print(output)"

    def auto_class(self) -> Any:
        """The class that `model` names."""
        import transformers  # heavy parts of it are loaded by name

        return getattr(transformers, self.model)

    def has_model(self, model: Any) -> bool:
        """Whether a model is of a class that the Auto class makes."""
        entries = self.auto_class()._model_mapping._model_mapping.values()
        names = {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
        return type(model).__name__ in names

    def check(self, config: Any) -> None:
        """Raises: ConfigError: a model's config that says that it is not for this task."""

    def prediction(self, output: Any) -> Tensor:
        """Of a model's output. Raises: ConfigError: it has none, as of a model without a head."""
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(f"the model returns a {type(output).__name__} without logits: give {self.models}")
        return logits

    def loss(self, prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean over images, []."""
        raise NotImplementedError

    def imitation(self, prediction: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of a prediction that should be the teacher's, []."""
        raise ConfigError(f"the task {self.name!r} has no loss for imitating a teacher: leave distill out")

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Share of what is right, mean over images, []: what a search may maximise in place of the loss."""
        raise NotImplementedError

    def answers(self, prediction: Tensor) -> Tensor:
        """What the model says, in the form of targets."""
        raise NotImplementedError

    def same(self, answers: Tensor, others: Tensor) -> Tensor:
        """Share of each image's answers that are the same in both, float64 [images]."""
        return (answers == others).reshape(len(answers), -1).double().mean(1)

    def check_right(self) -> None:
        """Raises: ConfigError: images of the task are right in part."""
        if self.right_in_part:
            raise ConfigError(
                f"images of the task {self.name!r} are right in part, and what compares two models image by image "
                "counts those that are right: compare what `evaluate` says of both"
            )

    def right(self, answers: Tensor, target: Tensor) -> Tensor:
        """Which images are answered right, bool [images]: what two models are compared by, image by image."""
        return self.same(answers, target) == 1

    # What only tasks with one class per image are asked.

    def size(self, prediction: Tensor) -> int:
        """Number of the classes that predictions choose from. Raises: DataError: they are none of this task."""
        raise NotImplementedError

    def confidence(self, prediction: Tensor) -> Tensor:
        """Probability of each answer, [images]."""
        raise NotImplementedError

    def among_first(self, prediction: Tensor, target: Tensor, count: int) -> Tensor:
        """Whether each target is among the `count` most likely classes, bool [images]."""
        raise NotImplementedError

    def target(self, label: Any, num_labels: int) -> Any:
        """Of an image that somebody else has prepared, as `loss` takes it before images are put together to batches.

        Args: num_labels: classes of the model.
        Raises: DataError: it means nothing to a model of so many classes; without saying which image it is.
        """
        return label

    # What is measured on a split.

    def losses(self) -> Losses:
        return Losses(self)

    def counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Float64 [k]: what, summed over all images, `score` needs."""
        raise NotImplementedError

    def score(self, counts: Sequence[float], n: int, loss: float, metrics: dict[str, Any]) -> Any:
        """A `Score`, or what has its attributes, from summed `counts`."""
        raise NotImplementedError

    def fits_head(self, own: int, found: int) -> bool:
        """Whether a head of `own` classes is kept for data that show `found`."""
        return own == found

    def classes(self, train: Any, validation: Any, column: str, processor: Any) -> tuple[Any, Any, list[str]]:
        """Both splits, in which `column` holds whole numbers, and the names of the classes that `data` makes of them
        with the image processor."""
        from fliqs_hf.training.data import labelled  # which training data alone needs

        return labelled(train, validation, column)

    def data(self, split: Any, processor: Any, num_labels: int, **options: Any) -> Any:
        """A split as pairs of pixel values and target. Args: options: of `ImageData`."""
        from fliqs_hf.training.data import ImageData

        return ImageData(split, processor, num_labels, **options)


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known to `--task`. Returns: `task`. Raises: ConfigError: another one of this name is registered."""
    if type(_TASKS.setdefault(task.name, task)) is not type(task):
        raise ConfigError(f"a task {task.name!r} is registered already: choose another name, or unregister it")
    return _TASKS[task.name]


def unregister_task(name: str) -> None:
    """Forget a task. Raises: ConfigError: it is none."""
    find_task(name)
    del _TASKS[name]


def tasks() -> tuple[Task, ...]:
    """All that are registered."""
    return tuple(_TASKS.values())


def find_task(name: str) -> Task:
    """A task by its name. Raises: ConfigError: there is none."""
    if not isinstance(name, str) or name not in _TASKS:
        raise ConfigError(
            f"task={name!r:.60} does not exist: use {' or '.join(map(repr, _TASKS))}, or register one of your own "
            "with fliqs_hf.tasks.register_task"
        )
    return _TASKS[name]
