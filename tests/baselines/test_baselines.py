"""The baselines: allocations at a cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fliqs_hf.baselines import manual, random_allocation, uniform
from fliqs_hf.cost import CostTable, Target, bops, trace_layers
from fliqs_hf.errors import TargetError
from fliqs_hf.formats import parse
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.models import tiny

MODEL = tiny("vit")
LAYERS = trace_layers(MODEL)
SPACE = SearchSpace(LAYERS, ["int2", "int4", "e2m1", "int8"])
TABLE = CostTable(LAYERS, SPACE.formats)


def test_uniform_and_manual() -> None:
    assert bops(LAYERS, uniform(LAYERS, "e2m2")) == sum(layer.macs for layer in LAYERS) * 25
    by_hand = manual(LAYERS)
    ends = [LAYERS[0].name, LAYERS[-1].name]
    assert {name for name, formats in by_hand.items() if formats.weight == parse("int8")} == set(ends)
    assert all(formats.weight == parse("int4") for name, formats in by_hand.items() if name not in ends)


def test_random_allocations_meet_the_target_and_differ() -> None:
    target = TABLE.uniform("int4")
    problem = SearchProblem(SPACE, TABLE, Target.of(target_bits=4))
    found = [random_allocation(problem, seed) for seed in range(5)]
    assert all(0.97 <= TABLE.of(allocation) / target <= 1 for allocation in found)
    assert len({allocation.summary() for allocation in found}) > 1
    assert random_allocation(problem, 3) == found[3]
    with pytest.raises(TargetError):
        random_allocation(replace(problem, target=Target("bops", target / 100)), 0)
