"""The loss of classification, of which everything here is a measure; and who may be measured by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.errors import ConfigError, DataError


def check_problem(config: Any) -> None:
    """Raises: ConfigError: a model's config that says that it does not choose one of several classes: `num_labels=1`,
    or a `problem_type` of regression or of several labels at once."""
    labels, kind = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
    if labels == 1:
        raise ConfigError(
            "the model has num_labels=1, a regression: its loss is not that of classification, by which sensitivities "
            "and accuracies are measured; give a classifier of two classes or more, or formats of your own"
        )
    if kind not in (None, "single_label_classification"):
        raise ConfigError(
            f"the model has problem_type={kind!r}: sensitivities and accuracies are measured for models that choose "
            "one class per image; give one with problem_type='single_label_classification', or formats of your own"
        )


def logits_of(output: Any) -> Tensor:
    """Of a model's output. Raises: ConfigError: it has none, as of a model without a head."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(f"the model returns a {type(output).__name__} without logits: give an image classifier")
    return logits


class ClassLoss:
    """Cross-entropies of batches, summed. Labels that are no class are counted, and refused by `check`: on an
    accelerator, where looking at every batch would wait for it, only once.

    Attributes:
        images: labels seen. invalid: how many of them are no class, int64 [], on their device.
    """

    def __init__(self) -> None:
        self.images, self.classes, self.invalid = 0, 0, torch.zeros((), dtype=torch.int64)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over the batch.

        Args:
            logits: [batch, classes]. labels: int64 [batch].
        Raises: ConfigError: shapes that are not those of classification. DataError: on a CPU, a label that is no
            class, such as −1 or −100.
        """
        if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ConfigError(
                f"logits of shape {tuple(logits.shape)} and labels {labels.dtype} of shape {tuple(labels.shape)} are "
                "not those of a classifier, [images, classes] with two classes or more and whole numbers [images]"
            )
        self.classes = logits.shape[1]
        known = labels.clamp(0, self.classes - 1)  # cross_entropy leaves −100 out and stops a GPU at others
        self.images += len(labels)
        self.invalid = self.invalid.to(labels.device) + (labels != known).sum()
        if labels.device.type == "cpu":
            self.check(int(self.invalid), self.images)
        return functional.cross_entropy(logits.float(), known, reduction="sum")

    def check(self, invalid: int, images: int) -> None:
        """Raises: DataError: there are `invalid` labels among the `images`."""
        if invalid:
            raise DataError(
                f"{invalid} of {images} images have a label that is not one of the model's {self.classes} classes, "
                f"0 to {self.classes - 1}; -1 and -100 mark images without one: leave these out"
            )
