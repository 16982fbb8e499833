"""Limits beside the target: the reward and the policy's loss see them."""

from __future__ import annotations

import pytest
import torch

from fliqs_hf.cost import CostTable, LayerInfo, Target
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.selection import CostLimit, SearchProblem, SearchSpace


def test_limits_beside_the_target_are_seen() -> None:
    """Two layers of 100 and 300 MACs in int4 or int8, weights of 80 and 8 bytes: what exceeds a limit, by hand."""
    layers = (LayerInfo("a", "linear", 100, 80, 1, 0), LayerInfo("b", "linear", 300, 8, 1, 1))
    formats = ("int4", "int8")
    space, sizes = SearchSpace(layers, formats), CostTable(layers, formats, "weight_bytes")
    limit = CostLimit(sizes, Target("size_mb", 60e-6, cap=True))
    problem = SearchProblem(space, CostTable(layers, formats), Target("bits", 8, cap=True), (limit,))
    # 40 or 80 bytes and 4 or 8, with a scale of 4 bytes each.
    choices = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    expected = torch.tensor([0.0, 0.0, 92 / 60 - 1, 96 / 60 - 1], dtype=torch.float64)
    assert torch.allclose(problem.excess(choices), expected, rtol=1e-12)
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    mean = 4 + 40 * 0.25 + 80 * 0.75 + 4 + 6
    found = problem.expected_excess(p)
    assert float(found.detach()) == pytest.approx((mean / 60 - 1) ** 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(found, p)
    by_hand = 2 * (mean / 60 - 1) / 60 * torch.tensor([[44.0, 84.0], [8.0, 12.0]], dtype=torch.float64)
    assert torch.allclose(gradient, by_hand, rtol=1e-12)
    assert float(problem.expected_excess(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))) == 0

    config = SearchConfig(prior="none", explore_fraction=1.0, reward="capped", beta=-2.0, cost_weight=0.0)
    search = OneShotSearch(problem, config, 10)
    search._choices = choices
    search.end_step(0, torch.zeros(4))
    assert float(search.metrics()["reward"]) == pytest.approx(float(-2 * expected.mean()), rel=1e-6)


@pytest.mark.parametrize("limited", [False, True])
def test_the_policy_keeps_its_expected_cost_within_a_limit(limited: bool) -> None:
    layers = tuple(LayerInfo(str(n), "linear", 100, 80, 1, n) for n in range(4))
    formats = ("int4", "int8")
    space, sizes = SearchSpace(layers, formats), CostTable(layers, formats, "weight_bytes")
    limits = (CostLimit(sizes, Target("size_mb", 220e-6, cap=True)),) if limited else ()
    problem = SearchProblem(space, CostTable(layers, formats), Target("bits", 8, cap=True), limits)
    config = SearchConfig(prior="none", explore_fraction=1.0, policy_learning_rate=0.1, entropy_weight=0.0)
    search = OneShotSearch(problem, config, 300)
    for step in range(300):
        search.begin_step(step)
        search.end_step(step, torch.zeros(1))
    expected = float(SearchProblem(space, sizes).expected_cost(search.probabilities()))
    # From 256 bytes, where everything is as likely: only the limit, not the cap on bit operations, pulls it down.
    assert (expected < 225) == limited
