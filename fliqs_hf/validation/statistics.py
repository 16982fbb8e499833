"""Statistics of two models on the same images: arrays in, numbers out, no model and no data. The tests, intervals and
corrections are those of SciPy and statsmodels.

Everywhere: `original` and `quantized` are bool [images], whether each model got each image right, and
    broken    images that only the original gets right
    repaired  images that only the quantized model gets right
    drop      (broken - repaired) / images = accuracy of the original - accuracy of the quantized model
All fractions are between 0 and 1 here; the reports show them as percentages and percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fliqs_hf.optional import needed_for

with needed_for("the comparison of two models"):
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.power import normal_sample_size_one_tail
    from statsmodels.stats.proportion import proportion_confint

from fliqs_hf.hf.gate import ACCURACY, POWER, Gate, Verdict

BINS = 15
"""Bins of the calibration error, equally wide between 0 and 1 (as in Guo et al. 2017)."""


@dataclass(frozen=True)
class Proportion:
    """`count` of `total`, with a two-sided Wilson interval [low, high]."""

    count: int
    total: int
    value: float
    low: float
    high: float


def proportion(count: int, total: int, confidence: float) -> Proportion:
    """Source: Wilson (1927), by `statsmodels.stats.proportion.proportion_confint`."""
    low, high = proportion_confint(count, total, alpha=1 - confidence, method="wilson")
    return Proportion(count, total, count / total, float(low), float(high))


def broken_and_repaired(original: NDArray[np.bool_], quantized: NDArray[np.bool_]) -> tuple[int, int]:
    """Number of images that only the original, and only the quantized model, gets right."""
    return int((original & ~quantized).sum()), int((quantized & ~original).sum())


def mcnemar_p_value(broken: int, repaired: int) -> float:
    """Two-sided p-value of McNemar's exact test that both models are equally accurate (1 if they never differ)."""
    return float(mcnemar([[0, broken], [repaired, 0]], exact=True).pvalue)


def bootstrap_drop(
    original: NDArray[np.bool_], quantized: NDArray[np.bool_], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Two-sided percentile interval of the drop by a paired bootstrap over images (`scipy.stats.bootstrap`).

    It has no width where the models never differ: it shows the spread of what was seen, and decides nothing. The
    decision rests on `drop_bound`.
    """
    difference = original.astype(np.float64) - quantized.astype(np.float64)
    result = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 2**22 // len(difference)),  # about 32 MB at a time
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def drop_bound(
    broken: float, repaired: float, images: float, confidence: float, side: Literal["upper", "lower"]
) -> float:
    """One-sided confidence bound of the drop: the drop at which Tango's score test is just not rejected.

    Neither SciPy nor statsmodels has an interval for a paired difference of proportions, so the test statistic is
    here and the root is SciPy's. Among the usual ones (Wald, Bonett-Price, bootstrap) it is the one whose error stays
    near the nominal one where quantized models live, few images that differ: a nominal 5 % is at most 5.5 % over 200
    to 5000 images, drops of 0.3 to 2 points and 0 to 3 % repaired images, where Bonett-Price has up to 8.9 %.

    Args: `broken` and `repaired` need not be whole numbers (planning).
    Source: Tango, Statistics in Medicine 17 (1998), equations 2 to 4.
    """
    if side == "lower":  # swap the models
        return -drop_bound(repaired, broken, images, confidence, "upper")
    z = float(stats.norm.ppf(confidence))
    estimate = (broken - repaired) / images

    def distance(drop: float) -> float:
        spread = _spread_if(drop, broken / images, repaired / images)
        return estimate - drop + z * spread / math.sqrt(images)

    if estimate >= 1:
        return 1.0
    # `distance` is positive just above the estimate; at the estimate itself it is zero if the models never differ.
    return float(optimize.brentq(distance, estimate + 1e-12, 1.0, xtol=1e-12))


def _spread_if(drop: float, broken: float, repaired: float) -> float:
    """Standard deviation of one image's difference (-1, 0, 1) if the true drop is `drop`, at the fraction of repaired
    images that is then most likely; `broken` and `repaired` are the observed fractions."""
    b = (2 - broken + repaired) * drop - broken - repaired
    c = -repaired * drop * (1 - drop)
    fraction = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4
    return math.sqrt(max(2 * fraction + drop * (1 - drop), 0.0))


def gate(broken: int, repaired: int, images: int, max_drop: float, confidence: float, measure: str = ACCURACY) -> Gate:
    lower = drop_bound(broken, repaired, images, confidence, "lower")
    upper = drop_bound(broken, repaired, images, confidence, "upper")
    verdict: Verdict = "pass" if upper < max_drop else "fail" if lower > max_drop else "undecided"
    needed = images_to_settle(broken, repaired, images, max_drop, confidence) if verdict == "undecided" else None
    return Gate(max_drop, confidence, lower, upper, verdict, needed, measure)


def images_to_settle(broken: int, repaired: int, images: int, max_drop: float, confidence: float) -> int | None:
    """How many images in all would decide, if the fractions of broken and repaired images are really those observed.

    The larger of two: the number at which `drop_bound` crosses `max_drop` at these fractions, and the number that
    gives the normal approximation of the test a power of `POWER` (`normal_sample_size_one_tail` of statsmodels).
    Returns: None if the observed drop is `max_drop`: more of the same never decides.
    """
    p, q = broken / images, repaired / images
    if math.isclose(p - q, max_drop, abs_tol=1e-9):
        return None
    side: Literal["upper", "lower"] = "upper" if p - q < max_drop else "lower"
    sign = 1 if side == "upper" else -1

    def decided(count: int) -> bool:
        return sign * (max_drop - drop_bound(p * count, q * count, count, confidence, side)) > 0

    observed = math.sqrt(p + q - (p - q) ** 2)
    at_limit = _spread_if(max_drop, p, q) if side == "upper" else _spread_if(-max_drop, q, p)
    powered: int = math.ceil(
        normal_sample_size_one_tail(abs(max_drop - p + q), POWER, 1 - confidence, at_limit, observed)
    )
    low = high = max(images + 1, powered)
    if decided(high):
        return high
    while not decided(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class ConfidenceCalibration:
    """Expected calibration error and what it is made of; lists are per bin of `edges`, None where a bin is empty."""

    error: float
    mean_confidence: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


def calibration(confidences: NDArray[np.float64], correct: NDArray[np.bool_]) -> ConfidenceCalibration:
    """Sum over `BINS` bins of (share of images) × |mean confidence - accuracy|; confidence is the largest probability.

    Source: Guo et al., On Calibration of Modern Neural Networks (2017), equation 3.
    """
    binned = stats.binned_statistic(
        confidences, [confidences, correct.astype(np.float64)], statistic="mean", bins=BINS, range=(0.0, 1.0)
    )
    counts = np.bincount(binned.binnumber - 1, minlength=BINS)[:BINS]
    mean, accuracy = binned.statistic
    filled = counts > 0
    error = float((counts[filled] * np.abs(mean[filled] - accuracy[filled])).sum() / counts.sum())
    return ConfidenceCalibration(
        error,
        float(confidences.mean()),
        tuple(binned.bin_edges.tolist()),
        tuple(counts.tolist()),
        tuple(float(value) if full else None for value, full in zip(mean, filled, strict=True)),
        tuple(float(value) if full else None for value, full in zip(accuracy, filled, strict=True)),
    )


@dataclass(frozen=True)
class ClassChange:
    """One class: `p_value` of McNemar's exact test on its images, `p_corrected` after Holm's correction over all
    classes that have images."""

    label: int
    images: int
    original_correct: int
    quantized_correct: int
    broken: int
    repaired: int
    p_value: float
    p_corrected: float

    @property
    def lost(self) -> int:
        return self.broken - self.repaired


def class_changes(
    labels: NDArray[np.int64], original: NDArray[np.bool_], quantized: NDArray[np.bool_]
) -> tuple[ClassChange, ...]:
    """Every class that has images, most net losses first, then by p-value, then by label.

    Holm's method keeps the chance of even one false alarm below the level, whatever the dependence.
    """
    rows = []
    for label in np.unique(labels):
        of_class = labels == label
        rows.append((int(label), original[of_class], quantized[of_class]))
    pairs = [broken_and_repaired(a, b) for _, a, b in rows]
    p_values = [mcnemar_p_value(*pair) for pair in pairs]
    corrected: Sequence[float] = multipletests(p_values, method="holm")[1]
    changes = [
        ClassChange(label, len(a), int(a.sum()), int(b.sum()), *pair, p_value, float(p_corrected))
        for (label, a, b), pair, p_value, p_corrected in zip(rows, pairs, p_values, corrected, strict=True)
    ]
    return tuple(sorted(changes, key=lambda change: (-change.lost, change.p_value, change.label)))


def smallest_detectable_loss(classes: int, confidence: float) -> int:
    """How many images of a class must break, and none be repaired, to count after Holm's correction over `classes`."""
    broken = 1
    while mcnemar_p_value(broken, 0) * classes > 1 - confidence:
        broken += 1
    return broken
