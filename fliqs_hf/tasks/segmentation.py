"""Semantic segmentation: one class per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.tasks.task import Losses, Score, Task, register_task

#: Of pixels that have no class, as data sets and image processors of Transformers have it.
NO_CLASS = 255


class PixelLosses(Losses):
    """Images with pixels of classes that the model does not have mean nothing."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            prediction: [batch, classes, rows, columns]. target: int64 [batch, height, width].
        Raises: ConfigError: shapes that are not those of segmentation. DataError: on a CPU, a class that the model
            does not have.
        """
        fits = prediction.ndim == 4 and prediction.shape[1] > 1 and target.ndim == 3
        if not fits or len(target) != len(prediction) or target.dtype != torch.int64:
            raise ConfigError(
                f"logits of shape {tuple(prediction.shape)} and targets {target.dtype} of shape {tuple(target.shape)} "
                "are not those of a segmenter, [images, classes, rows, columns] with two classes or more and int64 "
                "[images, height, width]"
            )
        self.classes = prediction.shape[1]
        bad = _foreign(target, self.classes)
        self.count(bad.flatten(1).any(1))
        return self.task.loss(prediction, target.masked_fill(bad, NO_CLASS)) * len(target)

    def check(self, invalid: int, images: int) -> None:
        """Raises: DataError: there are `invalid` images with such pixels among the `images`."""
        if invalid:
            raise DataError(
                f"{invalid} of {images} images have pixels of a class that is not one of the model's {self.classes}, "
                f"0 to {self.classes - 1}; {NO_CLASS} marks pixels without one"
            )


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

    def target(self, label: Any, num_labels: int) -> Tensor:
        try:
            classes = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"the label is a {type(label).__name__}, not classes [height, width]") from error
        if classes.ndim != 2 or classes.is_floating_point() or classes.dtype == torch.bool:
            raise DataError(f"the label is {classes.dtype} {list(classes.shape)}, not whole numbers [height, width]")
        classes = classes.long()
        if (bad := _foreign(classes, num_labels)).any():
            raise DataError(
                f"the label has pixels of class {int(classes[bad][0])}, but the model has {num_labels} classes; "
                f"{NO_CLASS} marks pixels without one"
            )
        return classes

    def losses(self) -> Losses:
        return PixelLosses(self)

    def counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Of each class: pixels of it that are right, and those that are of it or taken for it."""
        classes = prediction.shape[1]
        known = (target >= 0) & (target < classes)
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

    def classes(self, train: Any, validation: Any, column: str, processor: Any) -> tuple[Any, Any, list[str]]:
        from fliqs_hf.training.masks import highest_class

        highest = max(highest_class(split, column, NO_CLASS, processor) for split in (train, validation))
        if highest < 1:
            raise DataError(f"column {column!r} has fewer than two classes")
        return train, validation, [str(label) for label in range(highest + 1)]

    def data(self, split: Any, processor: Any, num_labels: int, **options: Any) -> Any:
        from fliqs_hf.training.masks import MaskedImages

        options.pop("label_ids", None)  # None: numbers of pixels are the model's
        return MaskedImages(split, processor, partial(self.target, num_labels=num_labels), **options)


def _sized(prediction: Tensor, target: Tensor) -> Tensor:
    return functional.interpolate(prediction, target.shape[-2:], mode="bilinear", align_corners=False)


def _foreign(target: Tensor, classes: int) -> Tensor:
    """Bool, as `target`: pixels whose class the model does not have."""
    return ((target < 0) | (target >= classes)) & (target != NO_CLASS)


def _labelled(target: Tensor) -> Tensor:
    return (target != NO_CLASS).sum((1, 2)).clamp(min=1)


SEMANTIC_SEGMENTATION = register_task(SemanticSegmentation())
