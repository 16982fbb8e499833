"""Formats with scales of their own from the searchable layer to the checkpoint, its cost and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, calibrate, quantize
from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import CostTable, Target, bops, trace_layers, weight_bytes
from fliqs_hf.errors import CheckpointError, ConfigError, FormatError, TargetError
from fliqs_hf.hf.export.forms import OnnxSettings, layer_form
from fliqs_hf.nn import make_searchable, pack_model, packed_layers, quantizable_layers
from fliqs_hf.selection import SearchSpace
from tests.helpers.models import tiny

PAIRS = [
    ("mxfp4", "mxfp4"), ("mxfp6_e2m3", "mxfp6_e3m2"), ("mxfp8_e4m3", "mxfp8_e5m2"), ("mxfp8_e5m2", "int8"),
    ("mxint8", "mxint8"), ("nvfp4", "nvfp4"), ("int4_g32", "int4_g32_zp"), ("int3_g16", "int4_zp"), ("int4", "nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_searchable_packed_and_loaded_are_one(weight: str, activation: str, tmp_path: Path) -> None:
    searchable, model = tiny("vit").eval(), tiny("vit").eval()
    allocation = Allocation.uniform(quantizable_layers(model), weight, activation)
    size = model.config.image_size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    make_searchable(searchable, sorted({weight, activation, "int8"})).set_allocation(allocation)
    expected = searchable(x).logits
    quantize(model, FLIQSConfig(allocation=allocation, kernels="reference"))
    assert torch.equal(model(x).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, expected)
    expected.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in searchable.parameters())
    stored = load_file(tmp_path / "model.safetensors")
    names = [f"{name}.{entry}" for name in allocation for entry in ("weight", "weight_scale", "weight_scale_codes")]
    layers = trace_layers(tiny("vit"))
    assert sum(stored[name].nbytes for name in names if name in stored) == weight_bytes(layers, allocation)


def test_layers_choose_between_blocks_and_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5))
    x = torch.randn(3, 40)
    switch = make_searchable(model, ["int4", "mxfp4", "e4m3"])
    outputs = []
    for index in ([0, 1], [1, 0], [2, 1], [0, 1]):
        choice = torch.tensor(index)
        switch.set(choice, choice)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_convolutions_have_blocks_along_the_whole_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 3)
    model = nn.Sequential(conv)
    expected = conv.weight.detach().flatten(1)
    pack_model(model, Allocation({"0": LayerFormats.of("mxfp4", "mxfp4")}))
    rows = nn.Sequential(nn.Linear(45, 4, bias=False))
    rows[0].weight.data = expected  # type: ignore[union-attr]
    pack_model(rows, Allocation({"0": LayerFormats.of("mxfp4", None)}))
    assert torch.equal(model[0].decoded_weight().flatten(1), rows[0].decoded_weight())  # type: ignore[operator]


def test_gptq_stays_on_the_grid_of_the_blocks() -> None:
    model = tiny("vit").eval()
    size = model.config.image_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    allocation = Allocation.uniform(quantizable_layers(model), "int4_g16", "int4_zp")
    nearest = quantize(tiny("vit").eval(), FLIQSConfig(allocation=allocation, weight_scale="mse"))
    calibrate(model, allocation, [images], activations="clipped")
    for name, layer in packed_layers(model).items():
        assert layer.input_scale is None
        assert torch.equal(layer.block_scales(), packed_layers(nearest)[name].block_scales())
    assert any(
        not torch.equal(layer.weight_codes, packed_layers(nearest)[name].weight_codes)
        for name, layer in packed_layers(model).items()
    )


def test_exact_products_leave_them_alone() -> None:
    for weight, activation in (("mxint8", "int8"), ("int4", "int4_g32_zp"), ("int4_g32", "int4_g32")):
        model = nn.Sequential(nn.Linear(64, 64))
        pack_model(model, Allocation({"0": LayerFormats.of(weight, activation)}))
        layer = packed_layers(model)["0"]
        x = torch.randn(3, 64)
        expected = model(x)
        layer.kernels, layer.weight_cache = "auto", "decoded"
        assert layer.kernel.kernel == "decoded"
        assert torch.equal(model(x), expected)
        assert layer_form("0", layer, OnnxSettings()).form == "float"


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    model = quantize(tiny("vit"), FLIQSConfig(weight_format="mxfp4", activation_format=None))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_scale_codes"))
    tensors[name][0] = 255  # NaN
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged"):
        AutoModelForImageClassification.from_pretrained(
            tmp_path, quantization_config=FLIQSConfig(check_integrity=False)
        )


def test_costs_count_the_scales() -> None:
    layers = trace_layers(tiny("vit"))
    names = [layer.name for layer in layers if layer.quantizable]
    macs = sum(layer.macs for layer in layers)
    for weight, activation, bits in (("mxfp4", "mxfp4", 4.25**2), ("int4_g32", "int8", 36), ("int4", "int4_zp", 16)):
        found = bops(layers, Allocation.uniform(names, weight, activation))
        assert found == sum(round(layer.macs * bits) for layer in layers)
        assert abs(found - macs * bits) <= len(layers) / 2
    table = CostTable(layers, ["int4_g32", "mxfp8_e4m3"])
    with pytest.raises(TargetError, match=r"from 4\.5 to 8\.25"):
        Target.of(target_bits=4).resolve(table)


def test_zero_points_are_for_inputs() -> None:
    with pytest.raises(FormatError, match="take int4_g32 for weights"):
        LayerFormats.of("int4_g32_zp", "int8")
    layers = trace_layers(tiny("vit"))
    with pytest.raises(ConfigError, match="choose activation='separate'"):
        SearchSpace(layers, ["int4", "int4_zp"])
    space = SearchSpace(layers, ["int4", "int4_zp", "int8"], "separate")
    weights = space.weight_decision.unique()
    assert not space.allowed[weights, 1].any()
    assert space.allowed[space.activation_decision].all()
    CostTable(layers, space.formats)
