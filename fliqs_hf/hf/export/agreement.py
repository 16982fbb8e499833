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
        itself: how many images the packed model answers as before when their pixels move by a millionth; None where
            that was not asked.
    """

    images: int
    same: int
    rms: float
    logits_rms: float
    itself: int | None = None

    @property
    def percent(self) -> float:
        return 100 * self.same / self.images

    @property
    def least(self) -> float | None:
        """Percent below which chance does not explain why the exported model agrees less often than the packed one
        with itself: by three standard errors of the difference of two shares, here of `itself` with one more image on
        either side, so that a share of one has an error too. None where `itself` is."""
        if self.itself is None:
            return None
        share = (self.itself + 1) / (self.images + 2)
        error = math.sqrt(2 * share * (1 - share) / self.images)
        return 100 * max(0.0, self.itself / self.images - 3 * error)


#: What pixels move by, of their size: about what another order of sums in float32 moves a result by.
_MOVED = 1e-6


def compare(
    packed: Any, exported: Any, batches: Iterable[Tensor], scale: Any = None, task: Task = IMAGE_CLASSIFICATION,
    itself: bool = False,
) -> Agreement:  # fmt: skip
    """
    Args:
        batches: pixel values [images, channels, height, width], as `packed` takes them.
        scale: what makes of them what `exported` takes, where that is something else.
        itself: also how often `packed` agrees with itself, for another pass of it.
    Raises: ExportError: `exported` answers with NaN or infinities, or with something of another shape. DataError: no
        images.
    """
    generator = torch.Generator().manual_seed(0)
    images = same = unmoved = 0
    squares = total = count = 0.0
    for pixels in batches:
        with torch.no_grad():
            expected = task.prediction(packed(pixels)).double()
            found = task.prediction(exported(pixels if scale is None else scale(pixels))).double()
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            what = "NaN or infinities" if found.shape == expected.shape else f"logits of shape {list(found.shape)}"
            raise ExportError(f"the exported model answers with {what}, the packed one with finite {expected.shape}")
        images += len(expected)
        same += _same(task, found, expected)
        if itself:
            moved = pixels * (1 + _MOVED * torch.randn(pixels.shape, generator=generator))
            with torch.no_grad():
                unmoved += _same(task, task.prediction(packed(moved)).double(), expected)
        squares += float((found - expected).square().sum())
        total += float(expected.square().sum())
        count += expected.numel()
    if not images:
        raise DataError("there are no images to compare the exported model on")
    return Agreement(images, same, math.sqrt(squares / count), math.sqrt(total / count), unmoved if itself else None)


def _same(task: Task, found: Tensor, expected: Tensor) -> int:
    return int((task.same(task.answers(found), task.answers(expected)) == 1).sum())
