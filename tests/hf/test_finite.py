"""NaN and infinity are refused wherever they are in a model, and the largest valid numbers are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from fliqs_hf import Allocation, FLIQSConfig, Target, allocate, calibrate, quantize
from fliqs_hf.errors import CheckpointError, FliqsError, FormatError
from fliqs_hf.formats import parse
from fliqs_hf.formats.packing import unpack
from fliqs_hf.formats.rounding import decode
from fliqs_hf.nn import quantizable_layers
from fliqs_hf_cli import main
from tests.helpers.models import images, tiny

TENSORS = [
    "vit.layers.0.mlp.fc1.bias",
    "vit.layers.0.layernorm_before.weight",
    "vit.layernorm.bias",
    "vit.embeddings.position_embeddings",
    "vit.embeddings.cls_token",
    "classifier.weight",
]


def broken(name: str, value: float = float("nan")) -> Any:
    model = tiny("vit")
    model.state_dict()[name].view(-1)[-1] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_a_model_to_quantize(name: str, value: float) -> None:
    model = broken(name, value)
    with pytest.raises(FormatError, match=name):
        quantize(model, FLIQSConfig())
    assert type(model.classifier) is torch.nn.Linear
    with pytest.raises(FormatError, match=name):
        calibrate(model, Allocation.uniform(quantizable_layers(model), "int8"), [images()])
    with pytest.raises(FormatError, match=name):
        allocate(model, lambda: [(images(), torch.tensor([0, 1, 2]))], Target.of(target_bits=4))


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "classifier.weight"])
def test_on_the_fly(name: str, tmp_path: Path) -> None:
    broken(name).save_pretrained(tmp_path)
    for config in (FLIQSConfig(), FLIQSConfig(search_space=["int4", "int8"])):
        with pytest.raises(FliqsError, match=name):
            AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("name", [*TENSORS[:-1], "classifier.weight_scale"])
@pytest.mark.parametrize("digests", ["1", "0"])
def test_a_packed_checkpoint(name: str, digests: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLIQS_CHECK_INTEGRITY", digests)
    quantize(tiny("vit"), FLIQSConfig()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = broken("vit.layernorm.bias")
    model.save_pretrained(tmp_path / "fp32")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "fp32")
    assert main(["quantize", str(tmp_path / "fp32"), str(tmp_path / "out")]) == 2
    assert "vit.layernorm.bias" in capsys.readouterr().err
    packed = quantize(tiny("vit"), FLIQSConfig())
    packed.vit.layernorm.bias.data[0] = float("nan")
    packed.save_pretrained(tmp_path / "packed")
    processor.save_pretrained(tmp_path / "packed")
    assert main(["inspect", str(tmp_path / "packed")]) == 1
    assert "vit.layernorm.bias" in capsys.readouterr().err


@pytest.mark.parametrize("value", [3e38, -3e38, 3.3895e38, 1e-40, 2.0**111])
def test_the_largest_and_smallest_values_of_bf16_are_valid(value: float, tmp_path: Path) -> None:
    model = tiny("vit")
    model.classifier.weight.data.fill_(value)
    allocation = Allocation.uniform(["classifier"], "bf16", None)
    quantize(model, allocation).save_pretrained(tmp_path)
    layer = AutoModelForImageClassification.from_pretrained(tmp_path).classifier
    assert torch.equal(layer.weight, torch.full((5, 32), value).bfloat16().float())
    codes = unpack(layer.weight_codes, 16, 160)
    assert torch.equal(decode(codes, parse("bf16")), layer.weight.flatten())
