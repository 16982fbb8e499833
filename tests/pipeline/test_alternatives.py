"""Other formats on the delivered model: what is recorded is what a model packed in them does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fliqs_hf
from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import QuantizerSettings, make_searchable, packed_layers
from fliqs_hf.nn.swap import packed_version, standing_in
from fliqs_hf.pipeline import alternatives
from fliqs_hf.pipeline.alternatives import differences
from fliqs_hf.pipeline.search import main
from fliqs_hf.records import MeasuredAlternatives
from fliqs_hf.report.run_report import RunReport
from fliqs_hf.selection import SearchSpace
from tests.helpers.models import images, tiny
from tests.recipes.test_vit import write

FORMATS = ["int2", "int4", "e2m1", "int8", "e4m3"]


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
@pytest.mark.parametrize("activation", ["same", "separate"])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_differences_are_those_of_models_packed_in_the_other_formats(
    architecture: str, activation: Any, clipped: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLIQS_KERNELS", kernels)
    model, x = tiny(architecture).eval(), images(6)
    space = SearchSpace(trace_layers(model, x[:1]), FORMATS, activation)
    settings = QuantizerSettings(activation_granularity="per_token_clipped" if clipped else "per_token")
    names = [layer.name for layer in space.layers]
    make_searchable(model, FORMATS, names=names, settings=settings)
    choice = torch.tensor([index % len(FORMATS) for index in range(len(space.decisions))])
    layers = {name: model.get_submodule(name) for name in names}
    for number, layer in enumerate(layers.values()):
        if clipped:
            layer.input_clip.data.fill_(-0.1 * (number % 3))  # type: ignore[union-attr]

    def packed_in(choice: torch.Tensor) -> Any:
        config = fliqs_hf.FLIQSConfig(
            allocation=space.allocation(choice), activation_granularity=settings.activation_granularity
        )
        return fliqs_hf.quantize(copy.deepcopy(model), config)

    def losses(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return one(x).logits.square().sum(-1)

    packed = packed_in(choice)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    rows = [(index, (int(choice[index]) + 1 + index % 3) % len(FORMATS)) for index in range(len(space.decisions))]
    found = differences(packed, layers, space, choice, rows, settings, lambda: losses(packed))
    for (index, k), difference in zip(rows, found, strict=True):
        other = choice.clone()
        other[index] = k
        assert torch.equal(difference, losses(packed_in(other)).double() - losses(packed).double())
    assert found.any(1).sum() > len(rows) // 2  # of tiny layers some change nothing that shows
    after = packed.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_is_itself_again_after_an_error() -> None:
    model = fliqs_hf.quantize(tiny("vit"), fliqs_hf.FLIQSConfig(weight_format="int4", activation_format="int8"))
    plain = dict(tiny("vit").named_modules())
    name, layer = next(iter(packed_layers(model).items()))
    other = packed_version(plain[name], LayerFormats.of("int2", "int8"), layer.settings)
    before = layer.weight_codes
    with pytest.raises(RuntimeError, match="within"), standing_in({layer: other}):
        raise RuntimeError(f"within {layer.formats}")
    assert layer.formats == LayerFormats.of("int4", "int8") and layer.weight_codes is before
    with standing_in({layer: other}):
        assert layer.formats == LayerFormats.of("int2", "int8")


def test_a_search_records_them_and_its_report_shows_them(tmp_path: Path) -> None:
    (result,) = main([str(write(tmp_path, alternative_images=24))])
    run = Path(result["run"])
    record = MeasuredAlternatives.read(run / "fliqs")
    space = json.loads((run / "fliqs/search_space.json").read_text())
    assert record is not None and record.images == 24 and record.seconds > 0
    assert list(record.changes) == [decision["name"] for decision in space["decisions"]]
    decisions = RunReport.read(run).decisions
    shown = {
        (entry.name, step.format.name): step.measured
        for entry in decisions
        for step in (entry.down, entry.same, entry.up)
        if step
    }
    recorded = {(name, fmt): values for name, by_format in record.changes.items() for fmt, values in by_format.items()}
    assert shown.keys() == recorded.keys()
    for key, change in shown.items():
        assert change is not None and vars(change) == recorded[key] and change.low <= change.value <= change.high
    page = (run / "fliqs/report.html").read_text()
    assert "24 held-out images, each with its 95 % interval" in page
    layers = {entry.name: len(entry.layers) for entry in decisions}  # each has its own row
    unclear = sum(layers[name] for (name, _), change in shown.items() if change and not change.known)
    assert page.count(" unclear <small>") == unclear > 0


def test_none_are_measured_where_none_are_wanted_or_possible(tmp_path: Path) -> None:
    (result,) = main([str(write(tmp_path, alternative_images=0, max_steps=4))])
    assert not (Path(result["run"]) / "fliqs/alternatives.json").exists()
    page = (Path(result["run"]) / "fliqs/report.html").read_text()
    assert "unclear" not in page.lower() and "expected increase of the loss" in page
    with pytest.raises(ConfigError, match="alternative_images=1: an interval needs at least 2 images"):
        main([str(write(tmp_path, alternative_images=1))])
    with pytest.raises(ConfigError, match="alternative_images"):
        main([str(write(tmp_path, alternative_images=-1))])


def test_as_many_images_as_a_minute_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(alternatives, "_CPU_MACS", 10**6)
    (result,) = main([str(write(tmp_path, alternative_images=None, max_steps=4))])
    record = MeasuredAlternatives.read(Path(result["run"]) / "fliqs")
    assert record is not None and record.images == 16
