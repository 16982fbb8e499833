"""Memory: weights, and the largest input and output of a layer; in closed form, and exact against every allocation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import CostTable, LayerInfo, Target, trace_layers
from fliqs_hf.cost.models import MEMORY
from fliqs_hf.errors import TargetError
from fliqs_hf.selection import CostLimit, SearchProblem, SearchSpace

#: name, kind, MACs, weights, outputs, group, elements of input and output.
LAYERS = (
    LayerInfo("wide", "linear", 800, 80, 10, 0, 80, 100),
    LayerInfo("narrow", "linear", 400, 400, 20, 1, 20, 20),
    LayerInfo("last", "linear", 300, 30, 3, 2, 100, 30),
)
FORMATS = ("int2", "int4", "int8")


def by_hand(formats: dict[str, tuple[int, int]]) -> int:
    """Bytes: packed weights with a scale per output, and the largest (input in its bits + output in 32 bits)."""
    weights = sum(math.ceil(one.weight_numel * formats[one.name][0] / 8) + 4 * one.out_channels for one in LAYERS)
    return weights + max(
        math.ceil(one.input_numel * formats[one.name][1] / 8) + 4 * one.output_numel for one in LAYERS
    )


@pytest.mark.parametrize("bits", list(itertools.product((2, 4, 8), repeat=3)))
def test_closed_form(bits: tuple[int, int, int]) -> None:
    pairs = {layer.name: (w, 8 if w == 2 else 4) for layer, w in zip(LAYERS, bits, strict=True)}
    allocation = Allocation({name: LayerFormats.of(f"int{w}", f"int{a}") for name, (w, a) in pairs.items()})
    expected = by_hand(pairs)
    table = CostTable(LAYERS, FORMATS, MEMORY)
    index = [[FORMATS.index(f"int{pair[role]}") for pair in pairs.values()] for role in (0, 1)]
    assert MEMORY.of(LAYERS, allocation) == table.of(allocation) == expected
    assert float(table.cost(*map(torch.tensor, index))) == expected


def test_in_fp32_and_beside_other_layers() -> None:
    assert MEMORY.of(LAYERS, {}) == 4 * (80 + 400 + 30) + 4 * (80 + 100)
    old = LayerInfo("old", "linear", 400, 400, 20, 1)
    assert MEMORY.known([*LAYERS, old], {}) is None  # its input was not traced
    fixed = CostTable(LAYERS, FORMATS, MEMORY, fixed_cost=7, fixed_peak=5000)
    everything = Allocation.uniform([layer.name for layer in LAYERS], "int2")
    assert fixed.of(everything) == by_hand(dict.fromkeys(everything, (2, 2))) - 420 + 5000 + 7
    assert fixed.reachable[0] == fixed.of(everything)


@pytest.mark.parametrize("activation", ["same", "separate"])
@pytest.mark.parametrize("seed", range(4))
def test_the_solver_is_exact(activation: str, seed: int) -> None:
    space = SearchSpace(LAYERS, FORMATS, activation)  # type: ignore[arg-type]
    table = CostTable(LAYERS, FORMATS, MEMORY)
    scores = torch.rand(len(space.decisions), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    every = torch.tensor(list(itertools.product(range(3), repeat=len(space.decisions))))
    costs, values = table.cost(*space.indices(every)), scores[range(len(space.decisions)), every].sum(1)
    problem = SearchProblem(space, table)
    assert problem.reachable == (float(costs.min()), float(costs.max()))
    for high in (float(costs.min()), float(costs.median()), float(costs.quantile(0.2)), float(costs.max())):
        choice = problem.best_choice(scores, low=-math.inf, high=high)
        assert float(scores.gather(1, choice[:, None]).sum()) == pytest.approx(float(values[costs <= high].max()))
        assert float(problem.cost(choice)) <= high
    bops = CostTable(LAYERS, FORMATS)
    most = float(costs.quantile(0.3))
    limit = CostLimit(table, Target("memory_mb", most / 1e6, cap=True))
    both = SearchProblem(
        space, bops, Target("bops", float(bops.cost(*space.indices(every)).max()), cap=True), (limit,)
    )
    choice = both.choice_at_target(scores)
    assert float(scores.gather(1, choice[:, None]).sum()) == pytest.approx(float(values[costs <= most].max()))


def test_as_a_target() -> None:
    space, table = SearchSpace(LAYERS, FORMATS), CostTable(LAYERS, FORMATS, MEMORY)
    problem = SearchProblem(space, table, Target.of(target_memory_mb=0.001, cap=True))
    assert float(problem.cost(problem.choice_at_target(torch.zeros(3, 3)))) <= 1000
    with pytest.raises(TargetError, match=r"target_memory_mb=0\.0001 is below the cheapest"):
        _ = SearchProblem(space, table, Target.of(target_memory_mb=0.0001, cap=True)).target_cost


@pytest.mark.parametrize("batch", [1, 3])
def test_elements_are_traced_per_image(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 5))
    found = trace_layers(model, torch.zeros(batch, 3, 16, 16))
    assert [(layer.input_numel, layer.output_numel) for layer in found] == [(3 * 256, 8 * 16), (8 * 16, 8 * 5)]
