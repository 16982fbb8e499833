"""`from_pretrained` and `save_pretrained` with a FLIQSConfig, on every architecture."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, LayerFormats, make_searchable, quantize
from fliqs_hf.formats import COMMON
from fliqs_hf.formats.packing import packed_bytes
from fliqs_hf.nn import format_switch, packed_layers, quantizable_layers
from tests.helpers.models import ARCHITECTURES, images, tiny


def mixed_allocation(model: torch.nn.Module) -> Allocation:
    """Every common format at least tried in turn, weights and activations apart, one layer weight-only."""
    weights, activations = itertools.cycle(COMMON), itertools.cycle([*reversed(COMMON), None])
    return Allocation({name: LayerFormats(next(weights), next(activations)) for name in quantizable_layers(model)})


def logits(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model(images().to(dtype)).logits


def load_like(model: torch.nn.Module, path: Path, **kwargs: object) -> torch.nn.Module:
    return type(model).from_pretrained(path, **kwargs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_search_pack_save_load_are_bit_identical(architecture: str, tmp_path: Path) -> None:
    plain = tiny(architecture)
    plain.save_pretrained(tmp_path / "fp32")
    allocation = mixed_allocation(plain)

    config = FLIQSConfig(allocation=allocation, kernels="reference")
    on_the_fly = load_like(plain, tmp_path / "fp32", quantization_config=config)
    packed = packed_layers(on_the_fly)
    assert list(packed) == list(allocation)

    switch = make_searchable(plain, COMMON)
    switch.set_allocation(allocation)
    expected = logits(plain)
    assert torch.equal(logits(on_the_fly), expected)

    on_the_fly.save_pretrained(tmp_path / "packed")
    again = load_like(plain, tmp_path / "packed", quantization_config=FLIQSConfig(kernels="reference"))
    assert torch.equal(logits(again), expected)
    assert again.config.quantization_config.allocation == allocation

    again.dequantize()
    again.save_pretrained(tmp_path / "dequantized")
    assert "quantization_config" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    dequantized = load_like(plain, tmp_path / "dequantized")
    for name, layer in packed.items():
        assert torch.equal(dequantized.get_submodule(name).weight, layer.decoded_weight())
    # Tensors of a mapped file may lie unaligned in memory, and then a convolution may sum in another order.
    dequantized.load_state_dict(
        {name: tensor.clone() for name, tensor in dequantized.state_dict().items()}, assign=True
    )
    assert torch.equal(logits(dequantized), logits(again))


@pytest.mark.parametrize("architecture", ["vit", "deit", "beit", "dinov2", "swin", "resnet", "mobilenet_v2"])
def test_auto_model_of_a_checkpoint_with_a_head(architecture: str, tmp_path: Path) -> None:
    plain = tiny(architecture)
    plain.save_pretrained(tmp_path / "fp32")
    quantize(plain, mixed_allocation(plain)).save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = plain.base_model(images()).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path / "packed")
        assert torch.equal(base(images()).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(images()).last_hidden_state, expected)
        # and on the fly: the names of the model with a head are understood
        config = FLIQSConfig(allocation=plain.config.quantization_config.allocation)
        base = AutoModel.from_pretrained(tmp_path / "fp32", quantization_config=config)
        assert torch.equal(base(images()).last_hidden_state, expected)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    tiny("vit").save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_default_is_uniform_w8a8(vit: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=FLIQSConfig())
    layers = packed_layers(model)
    assert set(layers) == set(quantizable_layers(tiny("vit")))
    assert {str(layer.formats) for layer in layers.values()} == {"W int8 / A int8"}


def test_formats_overrides_and_exclusions(vit: Path) -> None:
    config = FLIQSConfig(
        weight_format="int4",
        activation_format=None,
        overrides={"*.mlp.*": "e4m3", r"re:layers\.1\.mlp\.fc1$": {"activation": "int8"}},
        modules_to_not_convert=["classifier", "*.patch_embeddings.*"],
    )
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=config)
    formats = {name: str(layer.formats) for name, layer in packed_layers(model).items()}
    assert "classifier" not in formats and "vit.embeddings.patch_embeddings.projection" not in formats
    assert formats["vit.layers.0.attention.q_proj"] == "W int4 / A fp32"
    assert formats["vit.layers.0.mlp.fc1"] == "W e4m3 / A e4m3"
    assert formats["vit.layers.1.mlp.fc1"] == "W int4 / A int8"
    assert type(model.classifier) is torch.nn.Linear


@pytest.mark.parametrize("kwargs", [{"device_map": "auto"}, {"device_map": "cpu"}, {}], ids=str)
def test_device_map_and_shards(vit: Path, tmp_path: Path, kwargs: dict[str, str]) -> None:
    config = FLIQSConfig(weight_format="e2m1", activation_format="int5")
    expected = quantize(AutoModelForImageClassification.from_pretrained(vit), config)
    AutoModelForImageClassification.from_pretrained(vit).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "shards", quantization_config=config, **kwargs)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "packed", max_shard_size="5KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "packed", **kwargs)
    assert torch.equal(logits(again), logits(expected))


def test_bfloat16_quantizes_the_fp32_weights_and_keeps_fp32_scales(vit: Path, tmp_path: Path) -> None:
    config = FLIQSConfig(weight_format="int4", activation_format="e4m3")
    full = AutoModelForImageClassification.from_pretrained(vit, quantization_config=config)
    half = AutoModelForImageClassification.from_pretrained(vit, quantization_config=config, dtype=torch.bfloat16)
    for name, layer in packed_layers(half).items():
        assert torch.equal(layer.weight_codes, full.get_submodule(name).weight_codes)
        assert torch.equal(layer.weight_scale, full.get_submodule(name).weight_scale)
        assert layer.weight.dtype is layer.bias.dtype is torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(logits(again, torch.bfloat16), logits(half, torch.bfloat16))
    assert torch.equal(logits(full.to(torch.bfloat16), torch.bfloat16), logits(half, torch.bfloat16))


def test_three_bit_weights_take_three_bits(vit: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=FLIQSConfig(weight_format="int3"))
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for name, layer in packed_layers(model).items():
        codes = stored[f"{name}.weight"]
        assert codes.dtype is torch.uint8 and codes.dim() == 1
        assert len(codes) == packed_bytes(layer.weight_shape.numel(), 3) == -(-layer.weight_shape.numel() * 3 // 8)
        assert stored[f"{name}.weight_scale"].dtype is torch.float32


def test_config_json_is_readable(vit: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=FLIQSConfig(weight_scale="mse"))
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    digests = stored.pop("digests")
    assert set(digests["tensors"]) == set(load_file(tmp_path / "packed" / "model.safetensors"))
    assert {"hidden_size", "layer_norm_eps", "quantization_config.allocation"} <= set(digests["settings"])
    assert stored.pop("allocation")["classifier"] == {"weight": "int8", "activation": "int8"}
    assert stored == {
        "quant_method": "fliqs",
        "format_version": 2,
        "checksum": "crc32",
        "weight_granularity": "per_channel",
        "weight_scale": "mse",
        "activation_granularity": "per_token",
    }


def test_saving_twice_gives_the_same_bytes(vit: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=FLIQSConfig())
    model.save_pretrained(tmp_path / "a")
    AutoModelForImageClassification.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_searchable_model_trains_saves_and_loads(vit: Path, tmp_path: Path) -> None:
    config = FLIQSConfig(search_space=["int4", "e2m1", "int8"])
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=config)
    switch = format_switch(model)
    assert [fmt.name for fmt in switch.formats] == ["int4", "e2m1", "int8"]
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
    model.train()
    model(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path / "search")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "search")
    assert torch.equal(logits(again), logits(model))
    with format_switch(again).disabled():
        assert torch.equal(logits(again), logits(AutoModelForImageClassification.from_pretrained(vit)))
    again.dequantize()
    assert torch.equal(logits(again), logits(AutoModelForImageClassification.from_pretrained(vit)))


def test_a_process_without_the_package_gets_an_error(vit: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, quantization_config=FLIQSConfig())
    model.save_pretrained(tmp_path / "packed")
    script = "import sys; from transformers import AutoModel{0}; AutoModel{0}.from_pretrained(sys.argv[1])"
    for head in ("", "ForImageClassification"):
        result = subprocess.run(
            [sys.executable, "-c", script.format(head), tmp_path / "packed"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        assert "import fliqs_hf" in result.stderr
