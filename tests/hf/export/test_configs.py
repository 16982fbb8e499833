"""Allocations as configs of torchao and ModelOpt: their field names; and what they do, where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import ViTImageProcessor

import fliqs_hf
from fliqs_hf import Allocation, FLIQSConfig
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.formats import code_values, parse
from fliqs_hf.hf.export.configs.counterpart import wider
from fliqs_hf.hf.export.configs.modelopt import modelopt_config
from fliqs_hf.hf.export.configs.torchao import torchao_config
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.pipeline.checkpoints import load_model
from fliqs_hf_cli import main
from tests.helpers.models import images, tiny

SYMMETRIC, ASYMMETRIC = ({"_type": "MappingType", "_data": f"{kind}SYMMETRIC"} for kind in ("", "A"))
PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
E4M3 = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Conv2d(8, 16, 3), nn.Linear(40, 24), nn.ConvTranspose2d(8, 8, 2))


def in_torchao(weight: str, activation: str | None, name: str = "0", **settings: Any) -> tuple[Any, str]:
    """The entry of a layer, beside one that torchao has, and what changed."""
    wanted = {"weight": weight, "activation": activation}
    beside = {"weight": "int8", "activation": "int8"}
    allocation = Allocation.from_dict({name: wanted, "2" if name == "0" else "0": beside})
    config, found = torchao_config(layers(), allocation, QuantizerSettings(**settings))
    assert (config["_type"], config["_version"]) == ("FqnToConfig", 1)
    entries = config["_data"]["fqn_to_config"]
    assert found[0].became == (entries[name]["_type"] if entries[name] else "unquantized")
    return entries[name], found[0].changed


def in_modelopt(weight: str, activation: str | None, name: str = "0", **settings: Any) -> tuple[Any, Any, str]:
    """The entries of a layer's weight and input, and what changed."""
    allocation = Allocation.from_dict({name: {"weight": weight, "activation": activation}})
    config, found = modelopt_config(layers(), allocation, QuantizerSettings(**settings))
    assert config["quant_cfg"][0] == {"quantizer_name": "*", "enable": False} and config["algorithm"] == "max"
    entries = {entry["quantizer_name"]: entry["cfg"] for entry in config["quant_cfg"][1:]}
    assert set(entries) <= {f"{name}.weight_quantizer", f"{name}.input_quantizer"}
    return entries.get(f"{name}.weight_quantizer"), entries.get(f"{name}.input_quantizer"), found[0].changed


def test_int8_is_torchaos_own() -> None:
    entry, changed = in_torchao("int8", "int8")
    assert entry == {
        "_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2,
        "_data": {"act_mapping_type": SYMMETRIC, "granularity": PER_ROW},
    }  # fmt: skip
    assert changed == ""
    assert in_torchao("int8", "int8_zp")[0]["_data"]["act_mapping_type"] == ASYMMETRIC
    assert in_torchao("int8", None)[0]["_type"] == "Int8WeightOnlyConfig"


@pytest.mark.parametrize(("activation", "kind", "grain"), [
    (None, "IntxWeightOnlyConfig", "granularity"),
    ("int8_zp", "Int8DynamicActivationIntxWeightConfig", "weight_granularity"),
])  # fmt: skip
def test_narrower_integers_by_channel_and_group(activation: str | None, kind: str, grain: str) -> None:
    for weight, granularity, scale in (
        ("int4", {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}, "float32"),
        ("int4_g32", {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}, "bfloat16"),
    ):
        entry, changed = in_torchao(weight, activation)
        assert (entry["_type"], entry["_version"], changed) == (kind, 2, "")
        assert entry["_data"]["weight_dtype"] == {"_type": "torch.dtype", "_data": "int4"}
        assert entry["_data"][grain] == granularity
        scales = [value for key, value in entry["_data"].items() if key.endswith("scale_dtype")]
        assert scales == [{"_type": "torch.dtype", "_data": scale}]


def test_floats_and_blocks_of_torchao() -> None:
    assert in_torchao("e4m3", "e4m3") == ({
        "_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2,
        "_data": {"activation_dtype": E4M3, "weight_dtype": E4M3, "granularity": [PER_ROW, PER_ROW]},
    }, "")  # fmt: skip
    assert in_torchao("e4m3", None)[0]["_type"] == "Float8WeightOnlyConfig"
    assert in_torchao("e5m2", None)[0]["_data"]["weight_dtype"]["_data"] == "float8_e5m2"
    for name, element in (("mxfp4", "float4_e2m1fn_x2"), ("mxfp8_e4m3", "float8_e4m3fn")):
        entry, changed = in_torchao(name, name)
        assert (entry["_type"], entry["_data"]["weight_dtype"]["_data"], changed) == (
            "MXDynamicActivationMXWeightConfig", element, "",
        )  # fmt: skip
        assert entry["_data"]["scaling_mode"] == {"_type": "ScaleCalculationMode", "_data": "FLOOR"}
    assert in_torchao("nvfp4", "nvfp4")[0]["_type"] == "NVFP4DynamicActivationNVFP4WeightConfig"
    assert in_torchao("nvfp4", None)[0]["_type"] == "NVFP4WeightOnlyConfig"


@pytest.mark.parametrize(("weight", "activation", "name", "became", "words"), [
    ("int8", "int4", "0", "Int8DynamicActivationInt8WeightConfig", "inputs in int8 instead of int4"),
    ("int4", "int8", "0", "Int8DynamicActivationIntxWeightConfig", "inputs in int8_zp instead of int8"),
    ("int8_g32", "int4", "0", "Int8DynamicActivationIntxWeightConfig", "inputs in int8_zp instead of int4"),
    ("int4", "int4_zp", "0", "Int8DynamicActivationIntxWeightConfig", "inputs in int8_zp instead of int4_zp"),
    ("int8", "e4m3", "0", "Int8WeightOnlyConfig", "torchao has no e4m3 here"),
    ("int4", "bf16", "0", "IntxWeightOnlyConfig", "inputs stay unquantized: load the model in bf16"),
    ("e2m1", "e2m3", "0", "Float8DynamicActivationFloat8WeightConfig",
     "weights in e4m3 instead of e2m1; inputs in e4m3 instead of e2m3"),
    ("e4m3", "int8", "0", "Float8WeightOnlyConfig", "torchao has no int8 here"),
    ("e5m2", "e5m2", "0", "Float8WeightOnlyConfig", "torchao has no e5m2 here"),
    ("mxfp4", "mxfp6_e2m3", "0", "MXDynamicActivationMXWeightConfig", "inputs in mxfp8_e4m3 instead of mxfp6_e2m3"),
    ("mxfp4", None, "0", "unquantized", "no mxfp4 for weights and fp32 for inputs"),
    ("mxint8", "mxint8", "0", "unquantized", "no mxint8 for weights"),
    ("nvfp4", "int8", "0", "NVFP4WeightOnlyConfig", "torchao has no int8 here"),
    ("int12", "int12", "0", "unquantized", "weights stay unquantized: torchao has no int12 here"),
    ("bf16", "bf16", "0", "unquantized", "load the model in bf16"),
    ("int8", "int8", "1", "unquantized", "torchao quantizes no Conv2d this way"),
    ("int4_g32", None, "2", "unquantized", "rows of 40 in groups of 32"),
    ("mxfp4", "mxfp4", "2", "unquantized", "rows of 40 in blocks of 32"),
    ("nvfp4", "nvfp4", "2", "unquantized", "multiples of 16"),
])  # fmt: skip
def test_what_torchao_has_not_is_said(weight: str, activation: str | None, name: str, became: str, words: str) -> None:
    entry, changed = in_torchao(weight, activation, name)
    assert words in changed
    assert (entry["_type"] if entry else "unquantized") == became


def test_scales_of_other_granularity_are_said() -> None:
    assert in_torchao("int8", "int8", activation_granularity="static")[1] == (
        "input scales per token instead of static ones"
    )
    found = in_torchao("e4m3", "e4m3", weight_granularity="per_tensor", activation_granularity="per_tensor")[1]
    assert "weight scales per channel instead of per tensor" in found and "per token instead of per tensor" in found
    assert in_torchao("mxfp4", "mxfp4", activation_granularity="static")[1] == ""
    assert in_torchao("int8", None, activation_granularity="static")[1] == ""


@pytest.mark.parametrize(("fmt", "weight", "inputs"), [
    ("int8", {"num_bits": 8, "narrow_range": True, "axis": 0},
     {"num_bits": 8, "narrow_range": True, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}),
    ("int3", {"num_bits": 3, "narrow_range": True, "axis": 0},
     {"num_bits": 3, "narrow_range": True, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}),
    ("e4m3", {"num_bits": "e4m3", "axis": 0},
     {"num_bits": "e4m3", "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}),
    ("mxfp4", *2 * ({"num_bits": "e2m1", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}},)),
    ("mxfp6_e3m2", *2 * ({"num_bits": "e3m2", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}},)),
    ("mxint8", *2 * ({"num_bits": 8, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}},)),
    ("nvfp4", *2 * ({"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": "e4m3"}},)),
])  # fmt: skip
def test_formats_of_modelopt(fmt: str, weight: Any, inputs: Any) -> None:
    assert in_modelopt(fmt, fmt) == (weight, inputs, "")


def test_granularities_of_modelopt() -> None:
    assert in_modelopt("int8", "int8", weight_granularity="per_tensor")[0]["axis"] is None
    static = in_modelopt("int8", "int8", activation_granularity="static")[1]
    assert static == {"num_bits": 8, "narrow_range": True, "axis": None}
    assert in_modelopt("int8", "int8", activation_granularity="per_tensor")[1]["type"] == "dynamic"
    image = in_modelopt("int8", "int8", "1")
    assert image[1]["axis"] == 0 and image[2] == ""
    assert "calibrated factors" in in_modelopt("int8", "int8", activation_granularity="per_token_clipped")[2]


@pytest.mark.parametrize(("weight", "activation", "name", "words"), [
    ("int4_g64", None, "0", "weight scales in fp32 instead of bf16"),
    ("int8", "int4_zp", "0", "inputs in int8 instead of int4_zp"),
    ("int8", "int4_g32", "0", "inputs in int8 instead of int4_g32"),
    ("e3m2", "e2m1", "0", "weights in e4m3 instead of e3m2; inputs in e4m3 instead of e2m1"),
    ("e5m2", "int8", "0", "weights stay unquantized: ModelOpt has no e5m2 here"),
    ("bf16", "int8", "0", "load the model in bf16"),
    ("mxfp4", "nvfp4", "1", "run along the kernel"),
])  # fmt: skip
def test_what_modelopt_has_not_is_said(weight: str, activation: str | None, name: str, words: str) -> None:
    assert words in in_modelopt(weight, activation, name)[2]


def test_a_layer_of_which_nothing_is_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ModelOpt has no counterpart of any layer: '3', .* ConvTranspose2d"):
        in_modelopt("int8", "int8", "3")
    nothing = Allocation.uniform(["1"], "int8", "int8")
    with pytest.raises(ConfigError, match=r"torchao has no counterpart of any layer: '1', .* Conv2d"):
        torchao_config(layers(), nothing, QuantizerSettings())
    with pytest.raises(AllocationError, match="Sequential has no layer 'head'"):
        torchao_config(layers(), Allocation.uniform(["head"], "int8"), QuantizerSettings())


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e3m3", "e4m2", "e3m0"])
def test_a_wider_format_has_every_value(name: str) -> None:
    instead = wider(parse(name))
    assert instead == parse("e4m3")
    assert set(code_values(parse(name)).tolist()) <= set(code_values(instead).tolist())


def test_others_have_no_wider_one() -> None:
    assert {name: wider(parse(name)) for name in ("e5m2", "e2m4", "e3m4", "bf16", "int9")} == dict.fromkeys(
        ("e5m2", "e2m4", "e3m4", "bf16", "int9")
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    config = FLIQSConfig(weight_format="int4", activation_format="int8", overrides={"*fc1": "e4m3"})
    fliqs_hf.quantize(tiny("vit"), config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_the_command_writes_a_config_and_what_became_of_each_layer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run), str(tmp_path / "out"), "--to"]
    assert main([*command, "torchao"]) == 0
    said = capsys.readouterr().out
    assert "vit.embeddings.patch_embeddings.projection: torchao quantizes no Conv2d this way" in said
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["files"] == ["torchao.json", "export.json"]
    entries = json.loads((tmp_path / "out" / "torchao.json").read_text())["_data"]["fqn_to_config"]
    assert {layer["name"]: layer["became"] for layer in record["layers"]} == {
        name: entry["_type"] if entry else "unquantized" for name, entry in entries.items()
    }
    assert len(entries) == 14 and entries["vit.layers.0.mlp.fc1"]["_type"].startswith("Float8Dynamic")

    assert main([*command, "modelopt"]) == 2  # there is one
    assert "overwrite" in capsys.readouterr().err
    assert main([*command, "modelopt", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["modelopt.yaml", "export.json"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"modelopt.yaml", "export.json"}
    config = yaml.safe_load((tmp_path / "out" / "modelopt.yaml").read_text())
    assert len(config["quant_cfg"]) == 1 + 2 * 14

    for more, words in (
        (["--dataset_name", "digits"], "--dataset_name is no setting of --to torchao"),
        (["--form", "qdq"], "--form is no setting of --to torchao"),
    ):
        assert main([*command, "torchao", "--overwrite", *more]) == 2
        assert words in capsys.readouterr().err


def test_what_has_no_formats_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("vit").save_pretrained(tmp_path / "plain")
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "out"), "--to", "torchao"]) == 2
    assert "has no formats of fliqs_hf" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="to='gguf' does not exist; choose from torchao, modelopt"):
        fliqs_hf.export_config(tmp_path / "plain", tmp_path / "out", to="gguf")  # type: ignore[arg-type]


def test_torchao_reads_it_and_quantizes_by_it(run: Path, tmp_path: Path) -> None:
    """Its integers have one code more below zero, so weights may differ by half a step and more."""
    core = pytest.importorskip("torchao.core.config")
    quantization = pytest.importorskip("torchao.quantization")
    data = dict(torchao_config(layers(), Allocation.from_dict({
        "0": {"weight": "nvfp4", "activation": "nvfp4"}, "1": {"weight": "int8", "activation": "int8"},
        "2": {"weight": "e4m3", "activation": "e4m3"},
    }), QuantizerSettings())[0])  # fmt: skip
    assert core.config_from_dict(data).fqn_to_config["1"] is None
    fliqs_hf.export_config(run, tmp_path / "out", to="torchao")
    config = core.config_from_dict(json.loads((tmp_path / "out" / "torchao.json").read_text()))
    config.fqn_to_config = {  # FP8 products are of GPUs
        name: entry for name, entry in config.fqn_to_config.items() if "Float8" not in type(entry).__name__
    }
    model = tiny("vit")
    plain = model(images(4)).logits
    quantization.quantize_(model, config, filter_fn=None)
    with torch.no_grad():
        packed = fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="int4", activation_format="int8"))
        ours, theirs = packed(images(4)).logits, model(images(4)).logits
    assert (theirs - plain).abs().max() > 0  # it did something
    assert (theirs - ours).norm() < 0.5 * plain.norm()


def test_modelopt_reads_it_and_quantizes_as_we_do(run: Path, tmp_path: Path) -> None:
    """Its values are ours up to float32 rounding: integers with `narrow_range`, E4M3, inputs by token and image."""
    loader = pytest.importorskip("modelopt.torch.opt.config_loader")
    modelopt = pytest.importorskip("modelopt.torch.quantization")
    fliqs_hf.export_config(run, tmp_path / "out", to="modelopt")
    config = loader.load_config(tmp_path / "out" / "modelopt.yaml")
    model = modelopt.quantize(tiny("vit"), config, lambda model: model(images(4)))
    packed = load_model(str(run))
    with torch.no_grad():
        expected, found = packed(images(4)).logits, model(images(4)).logits
        for name, layer in fliqs_hf.nn.packed_layers(packed).items():
            module = model.get_submodule(name)
            weight = module.weight_quantizer(module.weight)
            torch.testing.assert_close(weight, layer.decoded_weight(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
