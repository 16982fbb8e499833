"""Semantic segmentation: one class per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.tasks.task import Score, Task, register_task

#: Of pixels that have no class, as data sets and image processors of Transformers have it.
NO_CLASS = 255


class SemanticSegmentation(Task):
    """Predictions are logits [images, classes, rows, columns], which are interpolated to the size of targets, int64
    [images, height, width], where 255 is a pixel without a class."""

    name = "image-segmentation"
    model = "AutoModelForSemanticSegmentation"
    models = "a semantic segmenter"
    measure = "mean IoU"
    right_in_part = True
    example = "print(output.logits.argmax(1).shape)  # a class for each pixel, at the model's own resolution"

    def loss(self, prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean over images of the mean over their pixels that have a class."""
        losses = functional.cross_entropy(
            _sized(prediction, target),
            target,
            ignore_index=NO_CLASS,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return (losses.sum((1, 2)) / _labelled(target)).mean()

    def imitation(self, prediction: Tensor, teacher: Tensor) -> Tensor:
        return functional.cross_entropy(prediction, teacher.softmax(1))

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Share of the pixels that are right, mean over images."""
        return ((self.answers(_sized(prediction, target)) == target).sum((1, 2)) / _labelled(target)).mean()

    def answers(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)

    def counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Of each class: pixels of it that are right, and those that are of it or taken for it."""
        classes, known = prediction.shape[1], target != NO_CLASS
        truth, found = target[known], self.answers(_sized(prediction, target))[known]
        right, true, taken = (torch.bincount(x, minlength=classes) for x in (truth[truth == found], truth, found))
        return torch.cat([right, true + taken - right]).double()

    def score(self, counts: Sequence[float], n: int, loss: float, metrics: dict[str, Any]) -> Score:
        """Classes that no pixel is of or taken for do not count."""
        right, either = torch.tensor(counts, dtype=torch.float64).chunk(2)
        return Score((right / either)[either > 0].mean().nan_to_num(0.0).item(), self.measure, n, loss, metrics)

    def fits_head(self, own: int, found: int) -> bool:
        """Images need not show every class."""
        return own >= found

    def classes(self, train: Any, validation: Any, column: str) -> tuple[Any, Any, list[str]]:
        from fliqs_hf.training.masks import highest_class

        return train, validation, [str(label) for label in range(highest_class(train, column, NO_CLASS) + 1)]

    def data(self, split: Any, processor: Any, num_labels: int, **options: Any) -> Any:
        from fliqs_hf.training.masks import MaskedImages

        options.pop("label_ids", None)  # None: numbers of pixels are the model's
        return MaskedImages(split, processor, num_labels, no_class=NO_CLASS, **options)


def _sized(prediction: Tensor, target: Tensor) -> Tensor:
    return functional.interpolate(prediction, target.shape[-2:], mode="bilinear", align_corners=False)


def _labelled(target: Tensor) -> Tensor:
    return (target != NO_CLASS).sum((1, 2)).clamp(min=1)


SEMANTIC_SEGMENTATION = register_task(SemanticSegmentation())
