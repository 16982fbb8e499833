"""Energy against the published figures, by hand."""

from __future__ import annotations

import pytest
import torch

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import ENERGY, CostTable, LayerInfo, Target, unregister
from fliqs_hf.cost.energy import DRAM_READ, multiply_pj
from fliqs_hf.errors import ConfigError
from fliqs_hf.selection import SearchProblem, SearchSpace

LAYER = LayerInfo("fc", "linear", 1000, 100, 10, 0)


def of(weight: str, activation: str | None) -> LayerFormats:
    return LayerFormats.of(weight, activation)


@pytest.mark.parametrize(("weight", "activation", "pj"), [
    ("int8", "int8", 0.2), ("int16", "int4", 0.2), ("bf16", "bf16", 1.1), ("int8", None, 3.7), ("int4", None, 3.7),
    ("bf16", "int16", 1.1),  # one float makes it a product of floats
])  # fmt: skip
def test_published_figures(weight: str, activation: str | None, pj: float) -> None:
    assert multiply_pj(of(weight, activation)) == pytest.approx(pj, rel=1e-12)


def test_a_layer_by_hand() -> None:
    codes = (100 + 4 * 10) * 8 * DRAM_READ  # one byte per weight, four per output
    assert ENERGY.layer(LAYER, of("int8", "int8")) == pytest.approx((1000 * (0.2 + 0.1) + codes) / 1e6, rel=1e-12)
    fp32 = (1000 * (3.7 + 0.9) + 100 * 32 * DRAM_READ) / 1e6
    assert ENERGY.layer(LAYER, None) == pytest.approx(fp32, rel=1e-12)
    assert ENERGY.layer(LayerInfo("p", "fp32", 1000, 100, 10, 0), None) == pytest.approx(fp32, rel=1e-12)


def test_weights_and_inputs_count_apart() -> None:
    costs = [ENERGY.layer(LAYER, of(*pair)) for pair in (
        ("int4", "int4"), ("int4", "int8"), ("int8", "int4"), ("int8", "int8"), ("e4m3", "e4m3"), ("bf16", "bf16"),
    )]  # fmt: skip
    assert costs == sorted(costs) and len(set(costs)) == len(costs)  # W8A4 reads more than W4A8


def test_it_is_a_cost_like_any_other() -> None:
    layers = [LayerInfo(f"l{i}", "linear", 1000 * (i + 1), 100, 10, i) for i in range(3)]
    space = SearchSpace(layers, ["int4", "int8"], "separate")
    table = CostTable(layers, space.formats, "energy_uj")
    target = Target.of(target_energy_uj=0.05, cap=True)
    assert target.cost_kind == "energy_uj"
    scores = torch.rand(len(space.decisions), 2, generator=torch.Generator().manual_seed(0))
    found = SearchProblem(space, table, target).choice_at_target(scores)
    assert table.of(space.allocation(found)) <= 0.05
    with pytest.raises(ConfigError, match="no cost that was registered from outside"):
        unregister("energy_uj")
