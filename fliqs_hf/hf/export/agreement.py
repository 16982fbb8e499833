"""An exported model against the packed one that it was made from, on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fliqs_hf.errors import DataError, ExportError
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task


@dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        images: compared. same: how many of them got the same answer, such as a class.
        rms: root mean square of the differences of the logits. logits_rms: that of the packed model's logits.
    """

    images: int
    same: int
    rms: float
    logits_rms: float

    @property
    def percent(self) -> float:
        return 100 * self.same / self.images


def compare(
    packed: Any, exported: Any, batches: Iterable[Tensor], scale: Any = None, task: Task = IMAGE_CLASSIFICATION
) -> Agreement:
    """
    Args:
        batches: pixel values [images, channels, height, width], as `packed` takes them.
        scale: what makes of them what `exported` takes, where that is something else.
    Raises: ExportError: `exported` answers with NaN or infinities, or with something of another shape. DataError: no
        images.
    """
    images = same = 0
    squares = total = count = 0.0
    for pixels in batches:
        with torch.no_grad():
            expected = task.prediction(packed(pixels)).double()
            found = task.prediction(exported(pixels if scale is None else scale(pixels))).double()
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            what = "NaN or infinities" if found.shape == expected.shape else f"logits of shape {list(found.shape)}"
            raise ExportError(f"the exported model answers with {what}, the packed one with finite {expected.shape}")
        images += len(expected)
        same += int((task.same(task.answers(found), task.answers(expected)) == 1).sum())
        squares += float((found - expected).square().sum())
        total += float(expected.square().sum())
        count += expected.numel()
    if not images:
        raise DataError("there are no images to compare the exported model on")
    return Agreement(images, same, math.sqrt(squares / count), math.sqrt(total / count))
