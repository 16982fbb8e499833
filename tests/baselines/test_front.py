"""All budgets at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fliqs_hf.baselines import sensitivity_front
from fliqs_hf.cost import CostTable, trace_layers
from fliqs_hf.cost.models import Cost
from fliqs_hf.errors import ConfigError
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.models import tiny

LAYERS = trace_layers(tiny("vit"))


def random_scores(space: SearchSpace) -> torch.Tensor:
    """Falling with the number of bits, as sensitivities do, with noise."""
    bits = torch.tensor([float(fmt.bits) for fmt in space.formats])
    noise = torch.rand(len(space.decisions), len(space.formats), generator=torch.Generator().manual_seed(0))
    return 4.0**-bits * (0.5 + noise)


@pytest.mark.parametrize("kind", ["bops", "weight_bytes"])
@pytest.mark.parametrize("activation", ["same", "separate"])
def test_the_front_is_monotone_and_each_point_is_the_best_at_its_cost(kind: Any, activation: Any) -> None:
    space = SearchSpace(LAYERS, ["int2", "int3", "e2m1", "int4", "int8"], activation)
    table = CostTable(LAYERS, space.formats, kind, fixed_cost=1000.0)
    problem = SearchProblem(space, table)
    scores = random_scores(space)
    front = sensitivity_front(problem, scores, points=8)
    assert 6 <= len(front) <= 8
    assert all(a.cost < b.cost and a.increase > b.increase for a, b in pairwise(front))
    for allocation, cost, increase in front:
        assert table.of(allocation) == cost
        best = problem.best_choice(-scores, low=-torch.inf, high=cost)
        expected = scores.gather(1, best[:, None]).double().sum().item()
        assert increase == pytest.approx(expected, rel=1e-8)
    low, high = problem.reachable
    assert front[0].cost == low
    assert front[-1].cost <= high
    assert front[-1].increase == pytest.approx(scores.amin(1).double().sum().item())


def test_dominated_points_are_dropped() -> None:
    """With scores that prefer the cheapest format everywhere, there is one point."""
    space = SearchSpace(LAYERS, ["int2", "int8"])
    scores = torch.tensor([[0.0, 1.0]]).expand(len(space.decisions), 2)
    table = CostTable(LAYERS, space.formats)
    problem = SearchProblem(space, table)
    (point,) = sensitivity_front(problem, scores)
    assert (point.cost, point.increase) == (table.uniform("int2"), 0.0)


def test_one_format_is_one_point_and_one_budget_none() -> None:
    space = SearchSpace(LAYERS, ["int4"])
    table, scores = CostTable(LAYERS, space.formats), torch.ones(len(space.decisions), 1)
    problem = SearchProblem(space, table)
    assert len(sensitivity_front(problem, scores)) == 1
    with pytest.raises(ConfigError, match="points=1"):
        sensitivity_front(problem, scores, points=1)


def test_a_space_of_one_cost_is_one_point_whatever_the_rounding() -> None:
    """Budgets between two equal costs, spaced by factors, come out a little below them."""
    for kind, fixed in (("memory_bytes", 12345.678), ("weight_bytes", 0.1), ("energy_uj", 12345.678)):
        space = SearchSpace(LAYERS, ["int8"])
        problem = SearchProblem(space, CostTable(LAYERS, space.formats, kind, fixed_cost=fixed))
        (point,) = sensitivity_front(problem, torch.ones(len(space.decisions), 1))
        assert (point.cost, point.cost) == problem.reachable


def test_a_cheapest_allocation_that_costs_nothing() -> None:
    """Of which there is no multiple."""
    free = Cost("free_of", "wide weights", lambda layer, formats: float(formats is None or formats.weight.bits > 4))
    space = SearchSpace(LAYERS, ["int4", "int8"])
    problem = SearchProblem(space, CostTable(LAYERS, space.formats, free))
    front = sensitivity_front(problem, random_scores(space), points=4)
    assert all(point.cost <= budget for point, budget in zip(front, (0, 14 / 3, 28 / 3, 14), strict=True))
    assert (front[0].cost, front[-1].cost) == problem.reachable == (0, 14)
