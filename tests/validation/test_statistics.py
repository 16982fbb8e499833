"""The statistics of a validation against closed forms, exact enumeration and independent computation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from fliqs_hf.validation import statistics

Z = 1.6448536269514722  # 95 % quantile of the standard normal distribution


def outcomes(broken: int, repaired: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two bool arrays with these numbers of images."""
    original = [True] * broken + [False] * repaired + [True] * both + [False] * neither
    quantized = [False] * broken + [True] * repaired + [True] * both + [False] * neither
    return np.array(original), np.array(quantized)


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (7, 10), (781, 1000)])
def test_wilson_interval_is_the_closed_form(count: int, total: int) -> None:
    z, p = stats.norm.ppf(0.975), count / total
    middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    found = statistics.proportion(count, total, 0.95)
    assert (found.value, found.count, found.total) == (p, count, total)
    # rounding of a handful of float64 operations
    assert found.low == pytest.approx(middle - half, abs=1e-14)
    assert found.high == pytest.approx(middle + half, abs=1e-14)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for broken, repaired in itertools.product(range(13), repeat=2):
        expected = stats.binomtest(broken, broken + repaired, 0.5).pvalue if broken + repaired else 1.0
        # both sum the same binomial terms in another order
        assert statistics.mcnemar_p_value(broken, repaired) == pytest.approx(expected, rel=1e-12)


def test_broken_and_repaired_are_counted_apart() -> None:
    assert statistics.broken_and_repaired(*outcomes(4, 2, 30, 5)) == (4, 2)


@pytest.mark.parametrize("images", [10, 200, 5000])
def test_bound_of_models_that_never_differ(images: int) -> None:
    """Tango's statistic is then -n d / sqrt(n d (1 - d)), so the bound is z² / (n + z²)."""
    expected = Z**2 / (images + Z**2)
    assert statistics.drop_bound(0, 0, images, 0.95, "upper") == pytest.approx(
        expected, abs=1e-11
    )  # root finder's xtol
    assert statistics.drop_bound(0, 0, images, 0.95, "lower") == pytest.approx(-expected, abs=1e-11)


@pytest.mark.parametrize(
    ("broken", "repaired", "images"), [(3, 0, 100), (0, 3, 100), (12, 9, 400), (1, 2, 50), (40, 5, 60)]
)
def test_bound_solves_the_score_test(broken: int, repaired: int, images: int) -> None:
    """The score test with its nuisance parameter found by maximising the trinomial likelihood numerically."""
    bound = statistics.drop_bound(broken, repaired, images, 0.95, "upper")

    def surprise(fraction: float) -> float:  # of repaired images, if the drop is `bound`
        terms = (
            (broken, fraction + bound),
            (repaired, fraction),
            (images - broken - repaired, 1 - 2 * fraction - bound),
        )
        return -sum(count * math.log(share) for count, share in terms if count)

    least, most = max(0.0, -bound) + 1e-12, (1 - bound) / 2 - 1e-12
    fraction = optimize.minimize_scalar(surprise, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
    deviation = math.sqrt(images * (2 * fraction + bound * (1 - bound)))
    # the minimum of a smooth function is located to about the square root of float64's precision
    assert (broken - repaired - images * bound) / deviation == pytest.approx(-Z, abs=1e-5)


def test_lower_bound_mirrors_the_upper_one() -> None:
    assert statistics.drop_bound(7, 3, 90, 0.9, "lower") == -statistics.drop_bound(3, 7, 90, 0.9, "upper")
    assert statistics.drop_bound(20, 0, 20, 0.95, "upper") == 1
    assert statistics.drop_bound(0, 20, 20, 0.95, "lower") == -1


@pytest.mark.parametrize(("limit", "repaired"), [(0.01, 0.0), (0.01, 0.003), (0.02, 0.01), (0.02, 0.03)])
def test_gate_passes_a_model_at_the_limit_about_one_time_in_twenty(limit: float, repaired: float) -> None:
    """Exact: all outcomes of 200 images, weighted by their probability. Score tests of discrete data keep their level
    only approximately; 5.5 % is the most seen for this one (see `drop_bound`)."""
    images, mass, passed = 200, 0.0, 0.0
    for broken, mended in itertools.product(range(28), range(22)):
        shares = [limit + repaired, repaired, 1 - limit - 2 * repaired]
        probability = stats.multinomial.pmf([broken, mended, images - broken - mended], images, shares)
        mass += probability
        if probability > 1e-9:
            passed += probability * (statistics.drop_bound(broken, mended, images, 0.95, "upper") < limit)
    assert mass > 0.9995  # the outcomes left out cannot matter
    assert passed < 0.056


def test_bootstrap_is_that_of_the_paired_differences() -> None:
    """With only broken images the resampled drop is binomial, so its percentiles are known."""
    low, high = statistics.bootstrap_drop(*outcomes(30, 0, 50, 20), confidence=0.95, resamples=9999, seed=0)
    expected = [stats.binom.ppf(q, 100, 0.3) / 100 for q in (0.025, 0.975)]
    assert [low, high] == pytest.approx(expected, abs=0.0101)  # one image: the quantile of 9999 draws may miss by one
    again = statistics.bootstrap_drop(*outcomes(30, 0, 50, 20), confidence=0.95, resamples=9999, seed=0)
    assert again == (low, high)


def test_bootstrap_of_equal_models_has_no_width() -> None:
    assert statistics.bootstrap_drop(*outcomes(0, 0, 8, 2), confidence=0.95, resamples=200, seed=0) == (0, 0)


def test_ten_images_without_a_difference_prove_nothing() -> None:
    gate = statistics.gate(0, 0, 10, 0.005, 0.95)
    assert gate.verdict == "undecided"
    # closed form of the bound: z² / (n + z²) < limit
    assert gate.images == math.floor(Z**2 * (1 / 0.005 - 1)) + 1
    assert statistics.gate(0, 0, gate.images, 0.005, 0.95).verdict == "pass"
    assert statistics.gate(0, 0, gate.images - 1, 0.005, 0.95).verdict == "undecided"


@pytest.mark.parametrize(
    ("broken", "repaired", "verdict"), [(3, 2, "pass"), (0, 30, "pass"), (40, 2, "fail"), (12, 6, "undecided")]
)
def test_verdicts(broken: int, repaired: int, verdict: str) -> None:
    gate = statistics.gate(broken, repaired, 1000, 0.01, 0.95)
    assert gate.verdict == verdict
    assert (gate.images is None) == (verdict != "undecided")


def test_bound_equal_to_the_limit_does_not_pass() -> None:
    upper = statistics.drop_bound(5, 3, 500, 0.95, "upper")
    assert statistics.gate(5, 3, 500, upper, 0.95).verdict == "undecided"
    assert statistics.gate(5, 3, 500, math.nextafter(upper, 1), 0.95).verdict == "pass"


def test_no_number_of_images_settles_a_drop_at_the_limit() -> None:
    gate = statistics.gate(15, 5, 1000, 0.01, 0.95)
    assert (gate.verdict, gate.images) == ("undecided", None)


@pytest.mark.parametrize(("limit", "expected"), [(0.02, "pass"), (0.003, "fail")])
def test_the_planned_number_of_images_decides_four_times_in_five(limit: float, expected: str) -> None:
    gate = statistics.gate(14, 6, 800, limit, 0.95)  # observed drop: 0.01
    assert gate.verdict == "undecided"
    shares = [14 / 800, 6 / 800, 780 / 800]
    draws = np.random.default_rng(0).multinomial(gate.images, shares, size=1000)
    settled = [statistics.gate(b, c, gate.images, limit, 0.95).verdict == expected for b, c, _ in draws.tolist()]
    # 4 standard errors of 1000 draws is 0.05; the plan is a normal approximation
    assert np.mean(settled) == pytest.approx(statistics.POWER, abs=0.05)


def test_calibration_error_by_hand() -> None:
    """Bins of 1/15: 0.95 and 1.0 share the last one, 0.62 and 0.65 the tenth (0.6 to 0.667)."""
    confidences = np.array([0.95, 1.0, 0.62, 0.65, 0.21])
    correct = np.array([True, False, True, True, False])
    found = statistics.calibration(confidences, correct)
    expected = (2 * abs(0.975 - 0.5) + 2 * abs(0.635 - 1.0) + 1 * abs(0.21 - 0.0)) / 5
    assert found.error == pytest.approx(expected, abs=1e-15)  # sums of five numbers
    assert found.mean_confidence == pytest.approx(0.686)
    assert {i: count for i, count in enumerate(found.counts) if count} == {3: 1, 9: 2, 14: 2}
    assert found.accuracy[9] == 1
    assert found.accuracy[0] is None
    assert found.confidence[0] is None


def test_a_model_that_knows_its_chances_is_calibrated() -> None:
    assert statistics.calibration(np.full(4, 0.75), np.array([True, True, True, False])).error == 0


def test_class_changes_are_corrected_by_holm_and_sorted_by_loss() -> None:
    # class: (broken, repaired, both right, neither)
    cases = {0: (1, 1, 5, 0), 3: (12, 0, 2, 1), 5: (7, 0, 3, 0), 8: (0, 9, 1, 1)}
    labels = np.concatenate([np.full(sum(case), label) for label, case in cases.items()])
    pairs = [outcomes(*case) for case in cases.values()]
    original, quantized = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    order = np.random.default_rng(0).permutation(len(labels))
    found = statistics.class_changes(labels[order], original[order], quantized[order])
    assert [change.label for change in found] == [3, 5, 0, 8]
    assert [change.lost for change in found] == [12, 7, 0, -9]
    first = found[0]
    assert (first.images, first.original_correct, first.quantized_correct) == (15, 14, 2)
    # Holm (1979): the k-th smallest p-value times the number of those not smaller, never below the one before
    ordered = sorted(found, key=lambda change: change.p_value)
    highest = 0.0
    for rank, change in enumerate(ordered):
        highest = max(highest, min(1.0, change.p_value * (len(ordered) - rank)))
        assert change.p_corrected == pytest.approx(highest, rel=1e-12)
    assert ordered[0].p_value == pytest.approx(2 * 0.5**12, rel=1e-12)


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_smallest_detectable_loss(classes: int) -> None:
    """All images that changed broke: p = 2 / 2^images."""
    images = statistics.smallest_detectable_loss(classes, 0.95)
    assert 2 * 0.5**images * classes <= 0.05 < 2 * 0.5 ** (images - 1) * classes
