"""Why a format was chosen, in words: the figures in them are those of the problem, by hand and by brute force."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch

from fliqs_hf.cost import CostTable, LayerInfo, bops
from fliqs_hf.report.reasons import Bound, reasons
from fliqs_hf.selection import SearchProblem, SearchSpace

#: MACs 100, 200, 300: bit operations of a layer in n bits are MACs × n².
LAYERS = tuple(LayerInfo(name, "linear", macs, macs, 1, group) for group, (name, macs) in enumerate(
    zip("abc", (100, 200, 300), strict=True)
))  # fmt: skip
FORMATS = ("int4", "int8")


def told(
    scores: Any, choice: list[int], most: float, space: SearchSpace | None = None, **rules: str
) -> dict[str, str]:
    space = space or SearchSpace(LAYERS, FORMATS)
    allocation = space.allocation(torch.tensor(choice))
    now = bops(LAYERS, allocation)
    signals = {decision.name: row for decision, row in zip(space.decisions, scores, strict=True)}
    return reasons(space.to_dict(), LAYERS, allocation, signals, [Bound("bops", "target bits 5", now, most)], rules)


def test_by_hand() -> None:
    # a: 4800 more for int8, b: 9600, c: 14400; all in int4 are 9600, and 15000 are allowed.
    scores = [[0.030, 0.010], [0.024, 0.020], [0.013, 0.010]]
    found = told(scores, [1, 0, 0], 15000)
    assert found["a"] == (
        "int4 instead of int8 would add 0.02 to the predicted loss for 33.33 % of the bit operations, dearer than the "
        "2 exchanges made elsewhere; no format it may have is better."
    )
    assert found["b"] == (
        "int4 is as cheap as it may be (the space has nothing that costs less here); int8 would take 0.004 off the "
        "predicted loss and takes 66.67 % more of the bit operations, of which 4.17 % is left: held by target bits 5."
    )
    # The other way round a layer is better off than by its price: the exchange would be worth it.
    assert "by the scores alone another one would have been better" in told(scores, [0, 0, 1], 30000)["c"]
    roomy = told(scores, [0, 0, 0], 1e6)
    assert "within every limit, and was outweighed by what training showed" in roomy["a"]


def test_rules_are_named() -> None:
    scores = [[0.030, 0.010], [0.024, 0.020], [0.013, 0.010]]
    space = SearchSpace(LAYERS, FORMATS, require={"b": ["int8"]})
    found = told(scores, [1, 1, 0], 1e6, space, b="--require b=int8")
    assert found["b"] == "int8 is the only format it may have: held by --require b=int8."
    three = SearchSpace(LAYERS, ("int2", *FORMATS), min_bits={"c": 4})
    more = [[0.1, *row] for row in scores]
    found = told(more, [1, 1, 1], 9600, three, c="--min_bits c=4")
    assert found["c"].startswith("int4 is as cheap as it may be (held by --min_bits c=4); int8 would take 0.003 off")
    assert found["a"].startswith("int2 instead of int4 would add 0.07 to the predicted loss for 12.50 % of the bit")


@pytest.mark.parametrize("seed", range(6))
def test_of_an_optimum_no_sentence_calls_another_choice_better(seed: int) -> None:
    """The solver is exact, so no single exchange, and no swap of two, may beat what it chose."""
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(
        LayerInfo(str(n), "linear", int(torch.randint(50, 500, (), generator=generator)), 100, 1, n) for n in range(6)
    )
    formats = ("int2", "int4", "int6", "int8")
    space, table = SearchSpace(layers, formats), CostTable(layers, formats)
    scores = torch.rand(6, 4, generator=generator, dtype=torch.float64).sort(descending=True).values
    problem = SearchProblem(space, table)
    low, high = problem.reachable
    most = low + 0.4 * (high - low)
    choice = problem.best_choice(-scores, low=-math.inf, high=most)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)))
    fits = every[problem.cost(every) <= most]
    assert float(scores.gather(1, choice[:, None]).sum()) == pytest.approx(
        float(scores[range(6), fits].sum(1).min()), abs=1e-9
    )
    allocation = space.allocation(choice)
    bound = Bound("bops", "target", float(problem.cost(choice)), most)
    signals = {decision.name: row for decision, row in zip(space.decisions, scores.tolist(), strict=True)}
    found = reasons(space.to_dict(), layers, allocation, signals, [bound], {})
    assert set(found) == {decision.name for decision in space.decisions}
    assert not [text for text in found.values() if "training" in text]
    for number, text in enumerate(found.values()):
        fmt = allocation[layers[number].name].weight
        down = re.match(r"int(\d) instead of int(\d) would add ([\d.e-]+) to", text)
        assert (down is None) == (fmt.bits == 2)
        if down is not None:
            step = float(scores[number, formats.index(f"int{down[1]}")] - scores[number, formats.index(fmt.name)])
            assert float(down[3]) == pytest.approx(step, rel=5e-3)  # three digits are shown
