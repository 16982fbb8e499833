"""A damaged, foreign or misconfigured checkpoint is refused with an error that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.errors import AllocationError, CheckpointError, ConfigError, FormatError
from tests.helpers.models import tiny

LAYER = "vit.layers.0.mlp.fc1"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    config = FLIQSConfig(weight_format="int4", overrides={LAYER: {"weight": "e5m2"}})
    quantize(tiny("vit"), config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(params=["1", "0"], ids=["digests", "no digests"])
def integrity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint needs is checked even where its digests are not."""
    monkeypatch.setenv("FLIQS_CHECK_INTEGRITY", request.param)


def edit_tensors(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def put(tensors: Tensors, name: str, value: torch.Tensor) -> None:
    tensors[name] = value


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        pytest.param(lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER}.weight", id="codes missing"),
        pytest.param(lambda t: t.pop(f"{LAYER}.weight_scale"), f"{LAYER}.weight_scale", id="scale missing"),
        pytest.param(lambda t: t.pop(f"{LAYER}.bias"), f"{LAYER}.bias", id="bias missing"),
        pytest.param(lambda t: t.pop("vit.layernorm.weight"), "vit.layernorm.weight", id="norm missing"),
        pytest.param(lambda t: t.pop("classifier.weight"), "classifier.weight", id="head missing"),
        pytest.param(lambda t: rename(t, f"{LAYER}.bias", f"{LAYER}.bios"), f"{LAYER}.bios", id="renamed"),
        pytest.param(lambda t: put(t, f"{LAYER}.weight", t[f"{LAYER}.weight"][:-1]), f"{LAYER}.weight", id="short"),
        pytest.param(lambda t: put(t, f"{LAYER}.weight_scale", torch.ones(7)), f"{LAYER}.weight_scale", id="shape"),
        pytest.param(lambda t: put(t, f"{LAYER}.weight", torch.zeros(48, 32)), f"{LAYER}.weight", id="a float weight"),
        pytest.param(
            lambda t: put(t, f"{LAYER}.weight_scale", torch.ones(48).half()), f"{LAYER}.weight_scale", id="half scale"
        ),
        pytest.param(lambda t: put(t, "surplus", torch.ones(1)), "surplus", id="surplus"),
        pytest.param(lambda t: t[f"{LAYER}.weight_scale"].fill_(-1), f"{LAYER}.weight_scale", id="negative scale"),
        pytest.param(
            lambda t: t[f"{LAYER}.weight_scale"].fill_(float("nan")), f"{LAYER}.weight_scale", id="scale is NaN"
        ),
        pytest.param(lambda t: t[f"{LAYER}.weight"].fill_(0x7F), f"{LAYER}.weight", id="codes of NaN"),
        pytest.param(lambda t: t["classifier.weight"].fill_(0x88), "classifier", id="the code -8 of int4"),
    ],
)
@pytest.mark.usefixtures("integrity")
def test_damaged_tensor_is_named(packed: Path, edit: Callable[[Tensors], Any], named: str) -> None:
    edit_tensors(packed, edit)
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        AutoModelForImageClassification.from_pretrained(packed)


def test_truncated_file(packed: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete"):
        AutoModelForImageClassification.from_pretrained(packed)


def test_pickled_weights_are_not_read(packed: Path) -> None:
    torch.save(load_file(packed / "model.safetensors"), packed / "pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        AutoModelForImageClassification.from_pretrained(packed)


@pytest.mark.parametrize(
    ("edit", "error", "named"),
    [
        pytest.param(lambda c: c.update(format_version=99), ConfigError, "99", id="version"),
        pytest.param(lambda c: c.update(weight_granulartiy="x"), ConfigError, "did you mean 'weight_gran", id="key"),
        pytest.param(lambda c: c.update(weight_scale="max"), FormatError, "weight_scale='max'", id="setting"),
        pytest.param(lambda c: c["allocation"][LAYER].update(weight="int99"), AllocationError, LAYER, id="format"),
        pytest.param(lambda c: c["allocation"][LAYER].pop("activation"), AllocationError, LAYER, id="entry"),
        pytest.param(
            lambda c: c["allocation"].update({"vit.layers.7.x": c["allocation"][LAYER]}),
            AllocationError,
            r"vit\.layers\.7\.x",
            id="layer that does not exist",
        ),
        pytest.param(
            lambda c: c["allocation"][LAYER].update(weight="int5"), CheckpointError, LAYER, id="other format"
        ),
        pytest.param(lambda c: c["allocation"].pop(LAYER), CheckpointError, LAYER, id="layer left out"),
    ],
)
@pytest.mark.usefixtures("integrity")
def test_damaged_config_is_named(packed: Path, edit: Callable[[Any], Any], error: type[Exception], named: str) -> None:
    edit_config(packed, edit)
    with pytest.raises(error, match=named):
        AutoModelForImageClassification.from_pretrained(packed)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"weight_format": "int1"}, FormatError, "int1"),
        ({"weight_format": "nf4"}, FormatError, "nf4.*Known: int2"),
        ({"activation_format": "e9m1"}, FormatError, "e9m1"),
        ({"allocation": {}, "weight_format": "int4"}, ConfigError, "weight_format='int4'"),
        ({"allocation": {}, "search_space": ["int4"]}, ConfigError, "either"),
        ({"allocation": "no/such/file.json"}, AllocationError, "no/such/file.json"),
        ({"modules_to_not_convert": "classifier"}, ConfigError, "list"),
        ({"overrides": {"x": {"wait": "int4"}}}, ConfigError, "wait"),
        ({"activation_granularity": "per_channel"}, FormatError, "per_channel"),
        ({"format_version": 3}, ConfigError, "3"),
        ({"format_version": True}, ConfigError, "True"),
        ({"checksum": "md5"}, ConfigError, "md5.*crc32, sha256"),
        ({"check_integrity": 0}, ConfigError, "check_integrity=0"),
        ({"kernels": "fast"}, ConfigError, "kernels='fast'.*'auto', 'reference'"),
        ({"weight_cache": "all"}, ConfigError, "weight_cache='all'.*'none', 'decoded'"),
        ({"quant_method": "gptq"}, ConfigError, "gptq"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        FLIQSConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"overrides": {"*.no_such": "int4"}}, "no_such"),
        ({"modules_to_not_convert": ["lm_head"]}, "lm_head"),
        ({"overrides": {"re:(": "int4"}}, "regular expression"),
        ({"allocation": {"vit.layers.0.mlp.fc9": {"weight": "int4", "activation": None}}}, r"did you mean.*mlp\.fc"),
    ],
)
def test_patterns_must_match_something(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    tiny("vit").save_pretrained(tmp_path)
    with pytest.raises((ConfigError, AllocationError), match=named):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=FLIQSConfig(**arguments))


def test_fp32_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("classifier.weight"))
    with pytest.raises(CheckpointError, match="classifier"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=FLIQSConfig())


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = tiny("vit")
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        quantize(model, FLIQSConfig())


def test_disk_offload_is_refused(packed: Path) -> None:
    with pytest.raises(ConfigError, match="disk"):
        AutoModelForImageClassification.from_pretrained(packed, device_map={"": "disk"})


def test_quantize_twice_is_refused() -> None:
    model = quantize(tiny("vit"), FLIQSConfig())
    with pytest.raises(ConfigError, match="packed already"):
        quantize(model, FLIQSConfig())
