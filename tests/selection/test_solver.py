"""The integer program against enumeration of every allocation."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fliqs_hf.cost import CostTable, LayerInfo, Target
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.networks import BLOCKS, LONE

FORMATS = ("int2", "e2m0", "e2m1", "int4", "int8")


def enumerate_all(space: SearchSpace, table: CostTable, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every choice [n, D], its cost and its total score, float64."""
    allowed = [row.nonzero().flatten().tolist() for row in space.allowed]
    choices = torch.tensor(list(itertools.product(*allowed)))
    costs = torch.tensor([table.of(space.allocation(choice)) for choice in choices], dtype=torch.float64)
    return choices, costs, scores.double()[torch.arange(len(space.decisions)), choices].sum(-1)


SPACES = {
    "same": lambda: SearchSpace(LONE, FORMATS),
    "tied": lambda: SearchSpace(BLOCKS, FORMATS),
    "excluded": lambda: SearchSpace(LONE, FORMATS, exclude={"layer3": ["int2", "e2m1"], "layer0": ["int8"]}),
    "separate": lambda: SearchSpace(LONE[:3], FORMATS, "separate"),
    "shared inputs": lambda: SearchSpace(BLOCKS[:4], FORMATS, "separate"),
    "separate, tied": lambda: SearchSpace(BLOCKS, FORMATS, "separate", ["block"]),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["bops", "weight_bytes"])
def test_no_allocation_is_better(name: str, kind: str) -> None:
    """Score and bounds, for scores of the size of log-probabilities, of post-training losses (a few huge ones, the
    rest tiny), and of nothing but ties."""
    space = SPACES[name]()
    table = CostTable(space.layers, space.formats, kind, fixed_cost=17)  # type: ignore[arg-type]
    problem = SearchProblem(space, table)
    generator = torch.Generator().manual_seed(0)
    shape = (len(space.decisions), len(FORMATS))
    choices, costs, _ = enumerate_all(space, table, torch.zeros(shape))
    for scores in (
        torch.randn(shape, generator=generator),
        -torch.rand(shape, generator=generator).double().pow(12) * 50,
        torch.randint(3, shape, generator=generator).double(),
    ):
        total = scores.double()[torch.arange(shape[0]), choices].sum(-1)
        for quantile in (0.0, 0.02, 0.3, 0.7, 1.0):
            high = costs.quantile(quantile).item()
            for low in (-torch.inf, 0.9 * high):
                inside = (costs >= low) & (costs <= high)
                if not inside.any():
                    with pytest.raises(TargetError):
                        problem.best_choice(scores, low=low, high=high)
                    continue
                found = problem.best_choice(scores, low=low, high=high)
                cost = table.of(space.allocation(found))
                assert low <= cost <= high
                best = total[inside].max().item()
                reached = scores.double()[torch.arange(shape[0]), found].sum().item()
                # the solver's gap, 1e-10 of the range of scores (50 at most), per decision
                assert reached == pytest.approx(best, abs=1e-7)
                assert bool(space.allowed[torch.arange(shape[0]), found].all())


@pytest.mark.parametrize("name", SPACES)
def test_the_reachable_range_is_that_of_all_allocations(name: str) -> None:
    space = SPACES[name]()
    for kind in ("bops", "weight_bytes"):
        table = CostTable(space.layers, space.formats, kind, fixed_cost=17)  # type: ignore[arg-type]
        problem = SearchProblem(space, table)
        _, costs, _ = enumerate_all(space, table, torch.zeros(len(space.decisions), len(FORMATS)))
        assert problem.reachable == (costs.min().item(), costs.max().item())


def test_a_cap_one_operation_below_an_allocation_excludes_it() -> None:
    """The solver's own tolerance is 1e-6 of the cap: here 20,000 operations. Bounds must hold to the last one."""
    layers = [LayerInfo(f"layer{i}", "linear", 10**9 + 1, 1, 1, i) for i in range(3)]
    space = SearchSpace(layers, "int2,int4")
    table = CostTable(layers, space.formats)
    problem = SearchProblem(space, table)
    scores = torch.tensor([[0.0, 1.0]] * 3)
    two_of_three = (10**9 + 1) * (4 + 16 + 16)
    assert problem.best_choice(scores, low=0, high=two_of_three).sum() == 2
    assert problem.best_choice(scores, low=0, high=two_of_three - 1).sum() == 1
    assert problem.best_choice(-scores, low=two_of_three, high=1e12).sum() == 2
    assert problem.best_choice(-scores, low=two_of_three + 1, high=1e12).sum() == 3
    with pytest.raises(TargetError, match="the space has a gap there"):
        problem.best_choice(scores, low=two_of_three - 1000, high=two_of_three - 1)


def test_a_choice_at_the_cap_is_found_behind_one_that_only_the_tolerance_admits() -> None:
    """The best one is 12 operations over the cap: what is then cut off is that choice, not all that cost as much."""
    layers = [LayerInfo("dear", "linear", 10**9 + 1, 1, 1, 0), LayerInfo("exact", "linear", 10**9, 1, 1, 1)]
    space = SearchSpace(layers, "int2,int4")
    table = CostTable(layers, space.formats)
    problem = SearchProblem(space, table)
    high = (10**9 + 1) * 4 + 10**9 * 16
    assert problem.best_choice(torch.tensor([[0.0, 1.0], [0.0, 0.9]]), low=0, high=high).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_better_among_more_allocations_than_can_be_enumerated(seed: int) -> None:
    """24 layers in 6 formats, against dynamic programming over the cost: a solver that stops near the best is seen."""
    generator = torch.Generator().manual_seed(seed)
    macs = torch.randint(2, 9, (24,), generator=generator).tolist()
    layers = [LayerInfo(f"layer{i}", "linear", macs[i], 9, 1, i) for i in range(24)]
    space = SearchSpace(layers, "int2,int3,int4,int5,int6,int8")
    table = CostTable(layers, space.formats)
    problem = SearchProblem(space, table)
    hurt = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.01]).double()
    scores = -(hurt + 0.02 * torch.rand(24, 6, generator=generator)) * (0.2 + torch.rand(24, 1, generator=generator))
    high = int(table.uniform_bits(3.7))
    best = np.full(high + 1, -np.inf)  # total score by cost
    best[0] = 0.0
    for row, costs in zip(scores.tolist(), table.table.diagonal(dim1=1, dim2=2).long().tolist(), strict=True):
        longer = [
            np.pad(best, (cost, 0), constant_values=-np.inf)[: high + 1] + s
            for s, cost in zip(row, costs, strict=True)
        ]
        best = np.maximum.reduce(longer)
    found = problem.best_choice(scores, low=0, high=high)
    # both are float64 sums of 24 scores of at most 1.2
    assert float(scores.gather(1, found[:, None]).sum()) == pytest.approx(best.max(), abs=1e-7)


def test_many_choices_within_the_tolerance_of_a_cap() -> None:
    """Twelve equal layers: 924 ways to spend half the range, all one operation over the cap."""
    layers = [LayerInfo(f"layer{i}", "linear", 10**9 + 1, 1, 1, i) for i in range(12)]
    space = SearchSpace(layers, "int2,int4")
    table = CostTable(layers, space.formats)
    problem = SearchProblem(space, table)
    high = (10**9 + 1) * (6 * 4 + 6 * 16) - 1
    assert problem.best_choice(torch.tensor([[0.0, 1.0]] * 12), low=0, high=high).sum() == 5


def test_a_decision_for_the_whole_model_is_possible() -> None:
    space = SearchSpace(LONE, FORMATS, tie=["model"])
    table = CostTable(LONE, space.formats)
    problem = SearchProblem(space, table)
    scores = torch.tensor([[0.0, 1.0, 3.0, 2.0, 9.0]])
    choice = problem.best_choice(scores, low=0, high=table.uniform("int4"))
    assert choice.tolist() == [2]


def test_an_unreachable_range_names_what_is_reachable() -> None:
    space = SearchSpace(LONE, "int2,int4")
    table = CostTable(LONE, space.formats)
    problem = SearchProblem(space, table)
    scores = torch.zeros(5, 2)
    with pytest.raises(
        TargetError, match="between 1 and 2; the space reaches from 4800 to 19200; choose a target within"
    ):
        problem.best_choice(scores, low=1, high=2)
    with pytest.raises(TargetError, match="reaches from 4800 to 19200"):
        problem.best_choice(scores, low=19201, high=1e9)


def test_scores_that_are_not_finite_are_refused() -> None:
    space = SearchSpace(LONE, "int2,int4")
    scores = torch.zeros(5, 2)
    scores[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="finite"):
        SearchProblem(space, CostTable(LONE, space.formats)).best_choice(scores, low=0, high=1e9)


@pytest.mark.parametrize("cap", [False, True])
def test_a_target_between_allocations_is_met_within_its_tolerance(cap: bool) -> None:
    """The band first; where it is empty, what the target allows: its tolerance to both sides, or all below a cap."""
    space = SearchSpace(LONE[:3], ("int2", "int8"))
    table = CostTable(space.layers, space.formats)
    scores = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    choices, costs, total = enumerate_all(space, table, scores)
    widened = 0
    for cost in torch.linspace(costs.min().item() * 1.0001, costs.max().item() * 0.9999, 60).tolist():
        target = Target("bops", cost, cap=cap)
        for low, high in ((0.99, 1.0), (0.0, 1.0) if cap else (1 - Target.TOLERANCE, 1 + Target.TOLERANCE)):
            inside = (costs >= low * cost) & (costs <= high * cost)
            if inside.any():
                break
        if not inside.any():
            with pytest.raises(TargetError, match="no allocation costs between"):
                SearchProblem(space, table, target).choice_at_target(scores, band=0.01)
            continue
        widened += low < 0.99
        found = SearchProblem(space, table, target).choice_at_target(scores, band=0.01)
        assert found.tolist() == choices[inside][total[inside].argmax()].tolist(), cost
    assert widened > 1


def test_a_problem_without_a_target_says_so_where_one_is_needed() -> None:
    space = SearchSpace(LONE, FORMATS)
    problem = SearchProblem(space, CostTable(LONE, space.formats))
    assert problem.reachable == (4800, 76800)
    for use in (lambda: problem.target_cost, lambda: problem.choice_at_target(torch.zeros(5, 5))):
        with pytest.raises(ConfigError, match="has no target"):
            use()


def test_what_the_solver_prints_is_no_part_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import fliqs_hf.selection.solver as module

    def printing(*args: object, found: object = module.milp, **options: object) -> object:
        ctypes.CDLL(None).puts(b"HighsMipSolverData::")
        return found(*args, **options)  # type: ignore[operator]

    monkeypatch.setattr(module, "milp", printing)
    space = SearchSpace(BLOCKS, ["int4", "int8"])
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target("bits", 8))
    print("before")
    assert problem.reachable[0] > 0
    print("after")
    printed = capfd.readouterr()
    assert printed.out == "before\nafter\n" and "HighsMipSolverData" in printed.err
