"""Image classification: one class per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.tasks.task import Losses, Task, register_task


@dataclass(frozen=True)
class Accuracy:
    """Counts over `n` images, the mean cross-entropy, and what metrics of the `evaluate` library say."""

    correct: int
    correct5: int
    n: int
    loss: float
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def top1(self) -> float:
        return self.correct / self.n

    @property
    def top5(self) -> float:
        return self.correct5 / self.n

    @property
    def value(self) -> float:
        return self.top1

    @property
    def measure(self) -> str:
        return "top-1"

    @property
    def key(self) -> str:
        """Of `value`, in logs."""
        return "top1"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"top1": self.top1, "top5": self.top5}


class ClassLosses(Losses):
    """Cross-entropies; labels that are no class mean nothing."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Sum over the batch.

        Args:
            prediction: [batch, classes]. target: int64 [batch].
        Raises: ConfigError: shapes that are not those of classification. DataError: on a CPU, a label that is no
            class, such as −1 or −100.
        """
        logits, labels = prediction, target
        if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ConfigError(
                f"logits of shape {tuple(logits.shape)} and labels {labels.dtype} of shape {tuple(labels.shape)} are "
                "not those of a classifier, [images, classes] with two classes or more and whole numbers [images]"
            )
        self.classes = logits.shape[1]
        known = labels.clamp(0, self.classes - 1)  # cross_entropy leaves −100 out and stops a GPU at others
        self.count(labels != known)
        return functional.cross_entropy(logits.float(), known, reduction="sum")

    def check(self, invalid: int, images: int) -> None:
        """Raises: DataError: there are `invalid` labels among the `images`."""
        if invalid:
            raise DataError(
                f"{invalid} of {images} images have a label that is not one of the model's {self.classes} classes, "
                f"0 to {self.classes - 1}; -1 and -100 mark images without one: leave these out"
            )


class ImageClassification(Task):
    """Predictions are logits [images, classes], targets int64 [images]; training may also have probabilities."""

    name = "image-classification"
    model = "AutoModelForImageClassification"
    models = "an image classifier"
    measure = "top-1 accuracy"
    share = "top-1 accuracy"
    class_per_image = True
    example = "print(model.config.id2label[output.logits.argmax(-1).item()])"

    def check(self, config: Any) -> None:
        """Raises: ConfigError: a model's config that says that it does not choose one of several classes:
        `num_labels=1`, or a `problem_type` of regression or of several labels at once."""
        labels, kind = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
        if labels == 1:
            raise ConfigError(
                "the model has num_labels=1, a regression: its loss is not that of classification, by which "
                "sensitivities and accuracies are measured; give a classifier of two classes or more, or formats of "
                "your own"
            )
        if kind not in (None, "single_label_classification"):
            raise ConfigError(
                f"the model has problem_type={kind!r}: sensitivities and accuracies are measured for models that "
                "choose one class per image; give one with problem_type='single_label_classification', or formats of "
                "your own"
            )

    def loss(self, prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return functional.cross_entropy(prediction, target, label_smoothing=label_smoothing)

    def imitation(self, prediction: Tensor, teacher: Tensor) -> Tensor:
        return functional.cross_entropy(prediction, teacher.softmax(-1))

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(-1) == target).float().mean()

    def answers(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(-1)

    def size(self, prediction: Tensor) -> int:
        if prediction.ndim != 2 or prediction.shape[1] < 2:
            raise DataError(f"logits of shape {tuple(prediction.shape)} are not [images, two classes or more]")
        return prediction.shape[1]

    def confidence(self, prediction: Tensor) -> Tensor:
        return prediction.softmax(-1).amax(-1)

    def among_first(self, prediction: Tensor, target: Tensor, count: int) -> Tensor:
        first = prediction.topk(min(count, prediction.shape[-1]), dim=-1).indices
        return (first == target[:, None]).any(-1)

    def target(self, label: Any, num_labels: int) -> int:
        one = isinstance(label, np.generic) or (isinstance(label, Tensor) and label.numel() == 1)
        number = label.item() if one else label
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < num_labels:
            raise DataError(f"the label {label!r:.60} is not a class of the model, 0 to {num_labels - 1}")
        return number

    def losses(self) -> Losses:
        return ClassLosses(self)

    def counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[correct, correct among the first five]."""
        top = prediction.topk(min(5, prediction.shape[-1]), dim=-1).indices == target[:, None]
        return torch.stack([top[:, 0].sum(), top.sum()]).double()

    def score(self, counts: Sequence[float], n: int, loss: float, metrics: dict[str, Any]) -> Accuracy:
        return Accuracy(round(counts[0]), round(counts[1]), n, loss, metrics)


IMAGE_CLASSIFICATION = register_task(ImageClassification())
