"""Changes of the loss, measured in pairs on the same images: intervals, and which of them have a known sign."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """Of the mean loss, with a two-sided interval [low, high] at the confidence that it was made for.

    Attributes:
        known: whether its sign is, among all changes of its family that were measured together.
    """

    value: float
    low: float
    high: float
    known: bool


def changes(differences: Tensor, families: Sequence[Hashable], confidence: float = 0.95) -> list[Change]:
    """
    Each interval is Student's for the mean of paired differences. Which signs are known is decided for all rows of a
    family together, as among hundreds of rows without any effect one in twenty would be outside of its own interval:
    of those that are called known, the expected share of wrong signs is at most 1 − confidence (the procedure of
    Benjamini and Hochberg 1995 at twice that level, since half of its false discoveries have the right sign:
    Benjamini and Yekutieli 2005).

    Args:
        differences: changed − unchanged loss of each image, [changes, images], at least two images.
        families: of each row. Where effects are rare in one of two families, it does not hide those of the other.
    Returns: of each row.
    """
    count, images = differences.shape
    if not count:
        return []
    values = differences.double()
    mean, error = values.mean(1), values.std(1) / images**0.5
    width = error * stats.t.ppf((1 + confidence) / 2, images - 1)
    ratio = torch.where(error > 0, mean.abs() / error, torch.where(mean == 0, 0.0, torch.inf))
    p_values = 2 * stats.t.sf(ratio.numpy(), images - 1)
    adjusted = np.ones(count)
    for family in set(families):
        own = np.array([one == family for one in families])
        adjusted[own] = stats.false_discovery_control(p_values[own])
    rows = zip(mean.tolist(), width.tolist(), (adjusted <= 2 * (1 - confidence)).tolist(), strict=True)
    return [Change(value, value - wide, value + wide, known) for value, wide, known in rows]
