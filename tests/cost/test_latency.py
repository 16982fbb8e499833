"""Tables of times: a device whose times are known, the sum as a cost, files, and estimates by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTImageProcessor

import fliqs_hf_cli
from fliqs_hf import Allocation, LayerFormats, quantize
from fliqs_hf.cost import CostTable, LayerInfo, Target, registered, trace_layers, unregister
from fliqs_hf.cost.hardware import load_profile
from fliqs_hf.cost.latency import BETWEEN, LatencyRow, LatencyTable, use
from fliqs_hf.cost.roofline import roofline
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.pipeline.profiling import profile
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.models import tiny

PAIRS = [LayerFormats.of("int8", "int8"), LayerFormats.of("int4", "int8"), LayerFormats.of("int4", None)]
#: Of the device below: seconds per weight, by the bits of weights and inputs, and of each layer norm.
PER_WEIGHT, NORM = 1e-6, 0.25


def speed(formats: LayerFormats | None) -> float:
    if formats is None:
        return 1024.0
    return formats.weight.bits * float(formats.activation.bits if formats.activation else 32)


class FakeDevice:
    """Time passes in layers and layer norms only, and by exactly what is known."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def install(self, patch: pytest.MonkeyPatch) -> FakeDevice:
        def slow(cls: Any, name: str, seconds: Callable[[Any], float]) -> None:
            inner = getattr(cls, name)

            def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
                self.now += seconds(layer)
                return inner(layer, *args, **kwargs)

            patch.setattr(cls, name, forward)

        slow(PackedLayer, "forward", lambda layer: layer.weight_shape.numel() * speed(layer.formats) * PER_WEIGHT)
        for cls in (nn.Linear, nn.Conv2d):
            slow(cls, "forward", lambda layer: layer.weight.numel() * speed(None) * PER_WEIGHT)
        slow(nn.LayerNorm, "forward", lambda layer: NORM)
        return self


@pytest.fixture
def forgotten() -> Iterator[None]:
    yield
    if any(cost.name == "latency_ms" for cost in registered()):
        unregister("latency_ms")


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.LayerNorm) for module in model.modules())


def test_known_times_come_out(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    model = tiny("vit")
    layers = trace_layers(model)
    clock = FakeDevice().install(monkeypatch)
    table = profile(model, layers, PAIRS, rounds=3, clock=clock)
    assert table.between_ms == pytest.approx(1e3 * NORM * norms(model), rel=1e-9)  # sums of floats
    for row in table.rows:
        if row.layer == BETWEEN:
            continue
        inputs = None if row.activation == "fp32" else row.activation
        formats = None if row.weight == "fp32" else LayerFormats.of(row.weight, inputs)
        wanted = 1e3 * row.weight_numel * speed(formats) * PER_WEIGHT
        assert (row.ms, row.low_ms, row.high_ms) == pytest.approx((wanted,) * 3, rel=1e-9)
        assert row.kernel == ("fp32" if formats is None else "int8" if inputs else "decoded")
    assert abs(table.conditions["worst_error_of_uniform_models"]) < 1e-9
    # and the sum is that of a mixed model
    names = [layer.name for layer in layers]
    mixed = Allocation({name: PAIRS[i % 2] for i, name in enumerate(names[:-1])})
    packed = quantize(model, mixed)
    before = clock()
    with torch.no_grad():
        packed(torch.zeros(1, 3, 32, 32))
    assert use(table).of(layers, mixed) == pytest.approx(1e3 * (clock() - before), rel=1e-9)


def test_a_measurement_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny("vit")
    layers = trace_layers(model)
    clock, partial = FakeDevice().install(monkeypatch), tmp_path / "table.json.partial"
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))

    def interrupted() -> float:
        if len(passes) == 17:  # of two models, each 2 to warm up and 2 in each round: within the fourth
            raise KeyboardInterrupt
        return clock()

    with pytest.raises(KeyboardInterrupt):
        profile(model, layers, PAIRS[:1], rounds=5, clock=interrupted, partial=partial)
    assert len(json.loads(partial.read_text())["samples"]["fp32,fp32"][0]) == 3
    with pytest.raises(ConfigError, match="another measurement"):
        profile(model, layers, PAIRS[:1], rounds=5, batch_size=2, clock=clock, partial=partial)
    config = type(model.config).from_dict(model.config.to_dict() | {"num_labels": 7})
    wider = type(model)(config).eval()
    with pytest.raises(ConfigError, match="another measurement"):
        profile(wider, trace_layers(wider), PAIRS[:1], rounds=5, clock=clock, partial=partial)
    passes.clear()
    table = profile(model, layers, PAIRS[:1], rounds=5, clock=clock, partial=partial)
    assert len(passes) == 2 * (2 + 2 * 2) and not partial.exists()
    assert table.conditions["rounds"] == 5


LAYERS = tuple(LayerInfo(f"l{i}", "linear", 1000 * (i + 1), 100, 10, i) for i in range(3))


def made(times: dict[tuple[int, str], float], between: float = 5.0) -> LatencyTable:
    rows = [LatencyRow(BETWEEN, "fp32", "fp32", between, between, between)]
    for (index, fmt), ms in times.items():
        layer = LAYERS[index]
        shape = (layer.macs, layer.weight_numel, layer.out_channels)
        rows.append(LatencyRow(layer.name, fmt, fmt, ms, ms, ms, "int8", *shape))
    return LatencyTable(tuple(rows), {"device": "mine", "batch_size": 8, "estimated": False})


TIMES = {(i, fmt): ms * (i + 1) for i in range(3) for fmt, ms in (("fp32", 9.0), ("int4", 2.0), ("int8", 3.0))}


@pytest.mark.parametrize("ending", [".json", ".csv"])
def test_files(tmp_path: Path, ending: str, forgotten: None) -> None:
    table = made(TIMES)
    table.save(tmp_path / f"t{ending}")
    found = LatencyTable.load(tmp_path / f"t{ending}")
    assert found.rows == table.rows and found.label == table.label == "ms, batch 8, measured"
    table.check(LAYERS)
    with pytest.raises(ConfigError, match="of another model: l9 is not in it"):
        table.check([LayerInfo("l9", "linear", 1, 1, 1, 0)])
    with pytest.raises(ConfigError, match="l0 has another shape"):
        table.check([LayerInfo("l0", "linear", 1, 1, 1, 0)])


@pytest.mark.parametrize(("text", "message"), [
    ("", "rows of layers"), ("layer,weight\na,int8\n", "row 1 has no activation"),
    ("layer,weight,activation,ms\na,int8,int8,-1\n", "ms=-1.0 of 'a' must be a finite number"),
    ("layer,weight,activation,ms\na,int8,int8,x\n", "could not convert"),
    ("layer,weight,activation,ms\na,int8,int8,1\na,int8,int8,2\n", "a in int8 × int8 more than once"),
])  # fmt: skip
def test_tables_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        LatencyTable.load(tmp_path / "t.csv")


@pytest.mark.parametrize(("data", "message"), [
    ({"latencies": [1]}, "row 1 is 1, not an object"), ({"latencies": "ab"}, "row 1 is 'a', not an object"),
    ({"conditions": []}, "conditions .* are an object"), ({"conditions": {"batch_size": 0}}, "batch_size=0"),
    ({"conditions": {"batch_size": "8"}}, "batch_size='8'"), ({"conditions": {"estimated": "yes"}}, "estimated='yes'"),
    ({"latencies": [{"layer": "a", "weight": "int99", "activation": "int8", "ms": 1}]}, "row 1: .*int99"),
    ({"latencies": [{"layer": "a", "weight": 8, "activation": "int8", "ms": 1}]}, "row 1: a format is given by its"),
])  # fmt: skip
def test_tables_in_json_are_checked(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    table = made({(0, "int8"): 1.0})
    table.save(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps(json.loads((tmp_path / "t.json").read_text()) | data))
    with pytest.raises(ConfigError, match=message):
        LatencyTable.load(tmp_path / "t.json")


def test_a_table_that_went_through_a_spreadsheet(tmp_path: Path) -> None:
    """Which begins it with a byte order mark, and writes TRUE."""
    rows = f"a,INT8,int8,1,8,TRUE\n{BETWEEN},fp32,fp32,0.5,8,TRUE\n"
    (tmp_path / "t.csv").write_text(f"\ufefflayer,weight,activation,ms,batch_size,estimated\n{rows}", "utf-8")
    table = LatencyTable.load(tmp_path / "t.csv")
    assert table.label == "ms, batch 8, estimated" and table.pairs == {("int8", "int8")}


def test_a_search_by_time(forgotten: None) -> None:
    use(made({(0, "int4"): 1.0}))
    cost = use(made(TIMES))  # in the place of the first
    assert [c.name for c in registered()][-1] == "latency_ms"
    space = SearchSpace(LAYERS, ["int4", "int8"])
    table = CostTable(LAYERS, space.formats, "latency_ms", alike=True)
    assert table.fp32 == cost.of(LAYERS, {}) == 5 + 9 * 6 and table.reachable == (5 + 2 * 6, 5 + 3 * 6)
    target = Target.of(target_latency_ms=20, cap=True)
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.5], [0.0, 3.0]])
    problem = SearchProblem(space, table, target)
    found = problem.best_choice(scores, low=0, high=problem.target_cost)
    options = [torch.tensor(c) for c in itertools.product(range(2), repeat=3)]
    within = [choice for choice in options if float(problem.cost(choice)) <= 20]
    best = max(within, key=lambda choice: float((choice * scores[:, 1]).sum()))
    assert found.tolist() == best.tolist() == [0, 0, 1]
    with pytest.raises(ConfigError, match=r"latency_ms of l0 in W int4 / A int8 is not known"):
        CostTable(LAYERS, space.formats, "latency_ms")


def test_a_roofline_by_hand() -> None:
    layer = LayerInfo("fc", "linear", 197 * 100 * 50, 100 * 50, 50, 0)  # 197 rows, 100 inputs, 50 outputs
    pair = LayerFormats.of("int8", "int8")
    table = roofline(load_profile("a100"), [layer], [pair], 4)
    moved = 4 * 2 * (197 * 100 + 197 * 50)
    for row, weights, rate in ((table.rows[1], 5000 * 4, 1), (table.rows[2], 5000 + 50 * 4, 2)):
        products = 2 * layer.macs * 4 / (rate * 312e12)
        assert row.ms == pytest.approx(1e3 * max(products, (weights + moved) / 2039e9), rel=1e-12)
    assert "estimated" in table.label and "not measured" in table.conditions["how"]
    with pytest.raises(ConfigError, match="apple has no bandwidth_gb_s and bf16_tflops"):
        roofline(load_profile("apple"), [layer], [pair], 1)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], forgotten: None) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    model, table, run = (str(tmp_path / name) for name in ("fp32", "table.csv", "run"))
    measured = ["profile", model, table, "--search_space", "int4", "int8", "--rounds", "3"]
    assert fliqs_hf_cli.main(measured) == 0
    assert "between the layers" in capsys.readouterr().out
    assert fliqs_hf_cli.main(measured) == 2 and "--overwrite" in capsys.readouterr().err
    assert fliqs_hf_cli.main(["quantize", model, run, "--latency_table", table, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["latency_ms"] == pytest.approx(
        LatencyTable.load(table).cost().of(trace_layers(tiny("vit")), {}), rel=99
    )
    by_default = str(tmp_path / "default.json")
    assert fliqs_hf_cli.main(["profile", model, by_default, "--estimate", "a100"]) == 0
    codes = {"int4", "e2m1", "e2m3", "int8"}
    pairs = {(w, a) for w in codes for a in codes}
    assert LatencyTable.load(by_default).pairs == pairs | {("fp32", "fp32")}
    assert LatencyTable.load(table).pairs == {("int4", "int4"), ("int8", "int8"), ("fp32", "fp32")}
    capsys.readouterr()
    estimate = ["profile", model, str(tmp_path / "e.json"), "--estimate", "a100", "--search_space", "int8", "--json"]
    assert fliqs_hf_cli.main(estimate) == 0
    assert json.loads(capsys.readouterr().out)["estimated"] is True
    unregister("latency_ms")
    calibrated = ["quantize", model, run, "--target_latency_ms", "1", "--calibration", "digits"]
    assert fliqs_hf_cli.main(calibrated) == 2 and "give latency_table" in capsys.readouterr().err
    with pytest.raises(TargetError, match="unknown kind of target"):
        Target("latency_ms", 1.0)
