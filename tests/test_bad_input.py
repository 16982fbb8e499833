"""Values that fit nowhere, given to the functions and settings of a search: each is named by a typed error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fliqs_hf import make_searchable
from fliqs_hf.baselines import (
    DifferentiableConfig,
    manual,
    multi_trial,
    random_allocation,
    sensitivity_front,
)
from fliqs_hf.baselines.differentiable import DifferentiableHook, DifferentiableSearch
from fliqs_hf.cost import CostTable, LayerInfo, Target
from fliqs_hf.errors import AllocationError, FliqsError, TrainingError
from fliqs_hf.formats import FloatFormat, IntFormat, parse
from fliqs_hf.formats.packing import packed_bytes
from fliqs_hf.formats.spaces import parse_formats
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.pipeline.compare_methods import check_methods
from fliqs_hf.ptq import static_scale
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.selection.scores import HessianTrace, scores
from tests.helpers.models import images, tiny
from tests.helpers.networks import BLOCKS, LONE

SPACE = SearchSpace(LONE, "int2,int4,int8")
TABLE = CostTable(LONE, SPACE.formats)
ZEROS = torch.zeros(5, 3)
TARGET = Target.of(target_bits=4)
HUGE = 10**400  # no float holds it
NUMBERS: tuple[Any, ...] = ("x", None, math.nan, -1, HUGE, True, [1], 1j)

#: What takes a number, a whole number or a list -> values that it cannot take.
SETTINGS: dict[Callable[[Any], Any], tuple[Any, ...]] = {
    lambda v: IntFormat(v): ("4", None, 4.0, HUGE, -3, True, [4]),
    lambda v: FloatFormat(v, 3): ("4", None, 4.0, HUGE, -3, True, [4]),
    lambda v: FloatFormat(4, v): ("3", None, 3.0, HUGE, -3, True, [3]),
    lambda v: packed_bytes(8, v): ("4", None, 4.5, HUGE, -3, True, [4]),
    lambda v: packed_bytes(v, 4): ("8", None, 8.5, -3, True, [8]),
    lambda v: parse_formats(v): (5, None, 1.5, "int" + "9" * 5000, ""),
    lambda v: SearchSpace(LONE, v): (5, None, [5], "e" + "9" * 5000 + "m1"),
    lambda v: SearchSpace(LONE, "int4", tie=v): (None, 5, "qkv", [None], [5], math.nan),
    lambda v: SearchSpace(LONE, "int4", exclude=v): ("x", 5, ["layer0"], {5: ["int4"]}, {"layer0": None}),
    lambda v: LayerInfo("a", "linear", v, 1, 1, 0): ("x", None, 1.5, 0, True),
    lambda v: LayerInfo("a", "linear", 1, v, 1, 0): ("x", None, 1.5, 0, True),
    lambda v: LayerInfo("a", "linear", 1, 1, v, 0): ("x", None, 1.5, 0, True),
    lambda v: CostTable(LONE, ["int4"], fixed_cost=v): (*NUMBERS, math.inf),
    lambda v: TABLE.uniform_bits(v): (*NUMBERS[:-3], 33),
    **{lambda v, kind=kind: Target(kind, v): NUMBERS for kind in ("bits", "bops", "size_mb", "ratio")},  # type: ignore[misc]
    lambda v: Target(v, 4): ([1], None, 5),
    lambda v: SearchConfig.preset(v): ([1], None, 5),
    **{
        lambda v, name=name: SearchConfig(**{name: v}): (*(n for n in NUMBERS if n != -1 and n is not none), math.inf)  # type: ignore[misc]
        for name, none in (
            ("prior_entropy", 0), ("prior_strength", None), ("prior_images", 0), ("explore_fraction", 0), ("beta", 0),
            ("cost_weight", 0), ("policy_learning_rate", 0), ("entropy_weight", 0), ("band", 0),
        )
    },
    lambda v: DifferentiableConfig(cost_weight=v): (*NUMBERS, math.inf),
    lambda v: DifferentiableConfig(temperature_start=v): (*NUMBERS, math.inf, 0),
    lambda v: SearchProblem(SPACE, TABLE).best_choice(ZEROS, low=v, high=1e9): ("x", None, math.nan, HUGE, [1], 1j),
    lambda v: SearchProblem(SPACE, TABLE).best_choice(ZEROS, low=0, high=v): ("x", None, math.nan, HUGE, [1], 1j),
    lambda v: SearchProblem(SPACE, TABLE, TARGET).choice_at_target(ZEROS, v): ("x", None, math.nan, HUGE, [1], 1j),
    lambda v: sensitivity_front(SearchProblem(SPACE, TABLE), ZEROS, v): (*NUMBERS, 1, 2.5),
    lambda v: multi_trial(SearchProblem(SPACE, TABLE, TARGET), lambda *_: 0.0, v): (*NUMBERS, 0, 1.5),
    lambda v: HessianTrace(probes=v): (*NUMBERS, 0),
    lambda v: static_scale(torch.ones(3), parse("int4"), v): ([1], None, 5),
    lambda v: static_scale(torch.ones(3), parse("int4"), "percentile", v): (*NUMBERS, 0, 101),
    lambda v: check_methods([f"search-{v}"]): ("xinf", "xnan", "x1.5", "p9", "kx", "1e999"),
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_values_that_fit_nowhere_are_named(number: int) -> None:
    call, values = list(SETTINGS.items())[number]
    for value in values:
        with pytest.raises(FliqsError) as caught:
            call(value)
        assert len(str(caught.value)) > 20, value


SCORES = {
    "another space's": torch.zeros(4, 3),
    "fewer formats": torch.zeros(5, 2),
    "flat": torch.zeros(15),
    "one row": torch.zeros(1, 3),
    "a number": torch.zeros(()),
    "NaN": ZEROS * math.nan,
    "infinite": ZEROS - math.inf,
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_scores_that_do_not_fit_are_named(scores: torch.Tensor) -> None:
    for call in (
        lambda: SearchProblem(SPACE, TABLE).best_choice(scores, low=0, high=1e9),
        lambda: SearchProblem(SPACE, TABLE, TARGET).choice_at_target(scores),
        lambda: sensitivity_front(SearchProblem(SPACE, TABLE), scores),
        lambda: OneShotSearch(SearchProblem(SPACE, TABLE, TARGET), SearchConfig(), 10).start_from(scores),
    ):
        with pytest.raises(FliqsError, match=r"finite.*\[5, 3\]"):
            call()


TABLES = {
    "fewer formats": CostTable(LONE, ["int2", "int4"]),
    "other order": CostTable(LONE, ["int8", "int4", "int2"]),
    "fewer layers": CostTable(LONE[:3], SPACE.formats),
    "other layers": CostTable(BLOCKS, SPACE.formats),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_cost_table_of_another_space_is_named(table: CostTable) -> None:
    for call in (
        lambda: SearchProblem(SPACE, table).reachable,
        lambda: SearchProblem(SPACE, table).best_choice(ZEROS, low=0, high=1e9),
        lambda: OneShotSearch(SearchProblem(SPACE, table, TARGET), SearchConfig(), 10),
        lambda: random_allocation(SearchProblem(SPACE, table, TARGET), 0),
        lambda: multi_trial(SearchProblem(SPACE, table, TARGET), lambda *_: 0.0, 1),
        lambda: DifferentiableSearch(SearchProblem(SPACE, table, TARGET), DifferentiableConfig(), 10),
    ):
        with pytest.raises(FliqsError, match="the cost table is of"):
            call()


def test_a_model_of_another_space_is_named() -> None:
    batches = [(images(2), torch.zeros(2, dtype=torch.long))]
    for score in scores().values():
        with pytest.raises(AllocationError, match="'layer0'"):
            score(tiny("vit"), batches, lambda x: x, SearchProblem(SPACE, TABLE, TARGET))


def test_a_hook_over_other_layers_or_formats_is_refused() -> None:
    one_shot = OneShotSearch(SearchProblem(SPACE, TABLE, TARGET), SearchConfig(), 10)
    mixed = DifferentiableSearch(SearchProblem(SPACE, TABLE, TARGET), DifferentiableConfig(), 10)
    model = tiny("vit")
    switch = make_searchable(model, ["int4"])
    for make in (lambda: SearchHook(one_shot, switch), lambda: DifferentiableHook(mixed, model, switch)):
        with pytest.raises(FliqsError, match="searchable over 14 layers that are not the 5"):
            make()
    switch.names = tuple(layer.name for layer in LONE)
    with pytest.raises(FliqsError, match=re.escape("searchable over int4, the search space has int2, int4, int8")):
        SearchHook(one_shot, switch)
    with pytest.raises(TrainingError, match="step 3: no backward pass"):
        mixed.update(3)


def test_no_layers_by_hand_are_no_allocation() -> None:
    assert not manual([])
