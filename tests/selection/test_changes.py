"""Changes of the loss and the formats that are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fliqs_hf.formats import parse
from fliqs_hf.selection.changes import changes
from fliqs_hf.selection.neighbours import neighbours

FORMATS = [parse(name) for name in ("int2", "int4", "e2m1", "int8", "e4m3")]


def rows(effects: np.ndarray, images: int, seed: int = 0) -> torch.Tensor:
    """Differences with these means and standard deviation 1."""
    noise = np.random.default_rng(seed).standard_normal((len(effects), images))
    return torch.from_numpy(noise + effects[:, None])


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_and_signs_are_those_of_scipy_and_statsmodels(confidence: float) -> None:
    differences = rows(np.linspace(-0.7, 0.7, 40), 30)
    families = [row % 3 for row in range(40)]
    found = changes(differences, families, confidence)
    tests = [stats.ttest_1samp(row, 0) for row in differences.numpy()]
    for family in range(3):
        values = [test.pvalue for test, own in zip(tests, families, strict=True) if own == family]
        known, *_ = multipletests(values, 2 * (1 - confidence), method="fdr_bh")
        assert [change.known for change in found[family::3]] == known.tolist()
    assert 0 < sum(change.known for change in found) < 40
    for change, row, test in zip(found, differences.numpy(), tests, strict=True):
        interval = test.confidence_interval(confidence)
        assert change.value == pytest.approx(row.mean(), abs=1e-12)  # float64, summed in another order
        assert (change.low, change.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_few_of_the_signs_that_are_called_known_are_wrong() -> None:
    """700 of 1000 changes are next to nothing: by their own intervals 35 of these would have a sign."""
    effects = np.concatenate([np.full(700, 1e-9), np.full(300, -0.5)])
    wrong = known = alone = 0
    for seed in range(10):
        found = changes(rows(effects, 64, seed), [0] * 1000)
        right = [(change.value > 0) == (effect > 0) for change, effect in zip(found, effects, strict=True)]
        wrong += sum(change.known and not ok for change, ok in zip(found, right, strict=True))
        known += sum(change.known for change in found)
        alone += sum(change.low > 0 or change.high < 0 for change in found[:700])
    assert known > 2800  # of 3000: the effects are four standard errors
    assert wrong / known < 0.05  # what is promised
    assert 0.04 < alone / 7000 < 0.06  # what 95 % intervals are expected to miss


def test_changes_without_spread() -> None:
    zero, same, other = changes(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3.0, -2.0, 0.0]]), [1, 1, 2])
    assert (zero.value, zero.low, zero.high, zero.known) == (0, 0, 0, False)
    assert (same.value, same.low, same.high, same.known) == (1, 1, 1, True)
    assert other.low < 0 < other.high and not other.known
    assert changes(torch.empty(0, 5), []) == []


def test_neighbours_are_the_best_of_the_next_bits() -> None:
    every = [True] * 5
    assert neighbours(FORMATS, every, 1, [0.0, 0.0, 5.0, 2.0, 1.0]) == {"down": 0, "same": 2, "up": 4}
    assert neighbours(FORMATS, every, 1) == {"down": 0, "same": 2, "up": 3}
    assert neighbours(FORMATS, every, 0, [0.0, 2.0, 1.0, 0.0, 0.0]) == {"up": 2}
    assert neighbours(FORMATS, [True, True, False, False, True], 4, [0.0] * 5) == {"down": 1}
    assert neighbours(FORMATS, [False, True, False, False, False], 1) == {}
