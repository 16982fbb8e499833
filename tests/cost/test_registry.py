"""A cost of one's own: registered in a few lines, then known to targets, commands, results, report and card."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fliqs_hf_cli
from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import Cost, CostTable, LayerInfo, Target, register, registered, target_kinds, unregister
from fliqs_hf.cost.target import given_targets
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.hf.card import model_card
from fliqs_hf.report.run_report import write_report
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training.arguments import SearchArguments
from tests.helpers.models import tiny
from tests.helpers.runs import write_run

LAYERS = tuple(LayerInfo(name, "linear", 100 * n, 10 * n, n, n) for n, name in enumerate("abc", 1))


def of_layer(layer: LayerInfo, formats: LayerFormats | None) -> float:
    """Energy that depends on weights and inputs apart: a W4A8 layer is no W8A4 layer."""
    if formats is None:
        return 4.6 * layer.macs
    return layer.macs * (0.05 * formats.weight.bits + 0.2 * (formats.activation.bits if formats.activation else 32))


@pytest.fixture
def energy() -> Iterator[Cost]:
    yield register(Cost("energy_pj", "pJ per image", of_layer))
    unregister("energy_pj")


def test_a_table_and_a_target_of_it(energy: Cost) -> None:
    formats = ("int4", "int8")
    space = SearchSpace(LAYERS, formats, "separate")
    table = CostTable(LAYERS, formats, "energy_pj")
    assert table.measure == energy and table.fp32 == pytest.approx(4.6 * 600)
    assert Target.of(target_energy_pj=600).cost_kind == "energy_pj"
    target = Target.of(target_energy_pj=900, cap=True)
    scores = torch.rand(len(space.decisions), 2, generator=torch.Generator().manual_seed(0))
    found = SearchProblem(space, table, target).choice_at_target(scores)
    options = [torch.tensor(c) for c in itertools.product(range(2), repeat=len(space.decisions))]
    within = [c for c in options if 0.97 * 900 <= float(SearchProblem(space, table).cost(c)) <= 900]
    best = max(float(scores.gather(1, c[:, None]).sum()) for c in within)
    assert float(scores.gather(1, found[:, None]).sum()) == pytest.approx(best, abs=1e-6)  # float32 sums
    with pytest.raises(TargetError, match=r"target_energy_pj=1 is below the cheapest.*from 600 to 1200"):
        Target.of(target_energy_pj=1).resolve(table)
    with pytest.raises(TargetError, match="energy_pj of 5 bits is not known"):
        table.uniform_bits(5)


def test_quantize_estimate_report_and_card_know_it(
    energy: Cost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    capsys.readouterr()  # progress bars
    assert fliqs_hf_cli.main(["estimate", str(tmp_path / "fp32"), "--json"]) == 0
    fp32, int8 = json.loads(capsys.readouterr().out)["models"][:2]
    assert fp32["energy_pj"] > int8["energy_pj"] > 0
    run = tmp_path / "run"
    write_run(run)
    assert "pJ per image" in str(model_card(run)) and "pJ per image" in write_report(run).read_text(encoding="utf-8")
    unregister("energy_pj")
    assert "pJ per image" not in str(model_card(run))
    register(energy)


def test_what_is_not_known_is_said() -> None:
    def only_int8(layer: LayerInfo, formats: LayerFormats | None) -> float | None:
        return None if formats is not None and formats.weight.name != "int8" else 1.0

    measured = register(Cost("measured_ms", "ms", only_int8))
    try:
        with pytest.raises(ConfigError, match=r"measured_ms of a in .*int4.* is not known"):
            CostTable(LAYERS, ["int8", "int4"], "measured_ms")
        assert measured.known(LAYERS, Allocation.uniform(list("abc"), "int4")) is None
        assert measured.known(LAYERS, Allocation.uniform(list("abc"), "int8")) == 3
        assert (measured.shown(None), measured.shown(3.0)) == ("–", "3")
    finally:
        unregister("measured_ms")


@pytest.mark.parametrize("value", [-1, float("nan"), "much"])
def test_no_costs(value: object) -> None:
    with pytest.raises(ConfigError, match="must be a finite number of at least 0"):
        CostTable(LAYERS, ["int8"], Cost("odd", "odd", lambda layer, formats: value))  # type: ignore[arg-type,return-value]


def test_names_are_taken_once(energy: Cost) -> None:
    assert register(energy) is energy
    with pytest.raises(ConfigError, match="registered already"):
        register(dataclasses.replace(energy, unit="J"))
    with pytest.raises(ConfigError, match="name of a cost"):
        Cost("energy in pJ", "pJ", of_layer)
    with pytest.raises(ConfigError, match="no cost that was registered from outside"):
        unregister("bops")


def test_targets_by_name_and_value(energy: Cost) -> None:
    found = given_targets({"target_bits": 4, "target": ["energy_pj=3", "bits=5"], "target_bops": None})
    assert found == {"bits": [4, 5.0], "energy_pj": [3.0]}
    for text, message in {
        "watts=3": "NAME of bits, bops, size_mb, memory_mb, ratio, energy_uj, energy_pj",
        "bits": "'' is no number",
    }.items():
        with pytest.raises(TargetError, match=message):
            given_targets({"target": [text]})


def test_commands_have_an_argument_for_every_kind_of_target() -> None:
    """They are parsed before the package is imported, or typed: so they are written out there."""
    assert [cost.name for cost in registered()] == ["bops", "weight_bytes", "memory_bytes", "energy_uj"]
    names = {f"target_{kind}" for kind in target_kinds()}
    assert {f.name for f in dataclasses.fields(SearchArguments) if f.name.startswith("target_")} == names | {
        "target_latency_ms"
    }
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    assert names <= set(vars(parser.parse_args(["quantize", "a", "b"])))
