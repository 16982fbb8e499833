"""Packed models in OpenVINO against the packed models: weights exactly, inputs as the form says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.formats import parse
from fliqs_hf.hf.export.forms import LayerForm
from fliqs_hf.hf.export.openvino_file import OpenVinoSettings, layer_form, stored_as, write_openvino
from fliqs_hf.hf.export.runtime import OpenVinoClassifier
from fliqs_hf.nn.kernels import set_kernels
from tests.helpers.models import images, tiny
from tests.hf.export.test_layers import OTHERS, convolution, linear, other, packed

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnx_ir")


def exported(
    architecture: str, config: FLIQSConfig, folder: Path, inputs: Any = "as_packed"
) -> tuple[Any, Any, tuple[LayerForm, ...]]:
    model = fliqs_hf.quantize(tiny(architecture), config)
    set_kernels(model, "reference")
    forms = write_openvino(model, images(1), folder / "model.xml", OpenVinoSettings(inputs))
    return model, OpenVinoClassifier(folder / "model.xml", threads=1, precision="f32"), forms


def run(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What OpenVINO computes for one layer in fp32, with its input as it comes, or on a static grid."""
    from openvino import opset13

    from fliqs_hf.hf.export.openvino_layer import product

    given = opset13.parameter([-1, *x.shape[1:]], openvino.Type.f32)
    decided = layer_form("layer", layer, OpenVinoSettings())
    model = openvino.Model([product(given, layer, decided)], [given], "layer")
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return torch.tensor(openvino.Core().compile_model(model, "CPU", options)([x.numpy()])[0])


@pytest.mark.parametrize("architecture", ["vit", "deit", "dinov2", "swin", "resnet", "mobilenet_v2"])
def test_answers_are_the_packed_models(architecture: str, tmp_path: Path) -> None:
    """In any batch size, as in `test_architectures.py`: no code rounds the other way for these inputs."""
    config = FLIQSConfig(weight_format="int4", activation_format="int8")
    model, file, _ = exported(architecture, config, tmp_path)
    for count in (1, 5):
        with torch.no_grad():
            expected = model(images(count)).logits
        torch.testing.assert_close(file(images(count)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", [
    "int2", "int3", "int4", "int8", "int12", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2", "e2m5", "e3m4", "bf16",
    "mxfp4", "mxfp6_e2m3", "mxfp8_e5m2", "mxint8", "nvfp4", "int4_g32", "int3_g16",
])  # fmt: skip
@pytest.mark.parametrize("make", [linear, convolution])
def test_weights_are_the_packed_ones(fmt: str, make: Any) -> None:
    """One-hot inputs read them out, exactly: 0 is added to them, and no more. Rows are no multiples of the blocks."""
    layer = make(fmt, None)
    layer.bias = None
    if layer.kind.matrix:
        found = run(layer, torch.eye(layer.weight_shape[1])).T
    else:
        found = run(layer, torch.eye(72).view(72, 8, 3, 3)).view(72, 16).T.reshape(16, 8, 3, 3)
    assert torch.equal(found, layer.decoded_weight())


@pytest.mark.parametrize(("fmt", "features", "stored"), [
    ("int4", 33, "INT8"), ("int4", 34, "INT4"), ("int2", 34, "INT8"), ("int2", 36, "INT2"), ("e2m1", 35, "INT8"),
    ("e2m1", 34, "FLOAT4E2M1"), ("int4_g32", 33, "INT4"), ("mxfp4", 33, "FLOAT4E2M1"),
])  # fmt: skip
def test_rows_that_would_end_within_a_byte_are_stored_in_bytes(fmt: str, features: int, stored: str) -> None:
    """OpenVINO reads other numbers from them where it multiplies several inputs."""
    torch.manual_seed(0)
    layer = packed(nn.Linear(features, 17, bias=False), fmt, None)
    assert layer_form("layer", layer, OpenVinoSettings()).stored == stored
    assert torch.equal(run(layer, torch.eye(features)).T, layer.decoded_weight())


@pytest.mark.parametrize("geometry", [
    {"padding": 1}, {"stride": 3}, {"padding": "same", "kernel_size": 2}, {"dilation": 2}, {"groups": 8},
    {"stride": 2, "padding": (1, 0)},
])  # fmt: skip
def test_convolutions(geometry: dict[str, Any]) -> None:
    layer = convolution("int8", None, **geometry)
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(layer, x), layer(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", ["int4", "e2m1", "int4_g32"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_layers(name: str, weight: str) -> None:
    layer, x = other(name, weight, None)
    torch.testing.assert_close(run(layer, x), layer(x).detach(), rtol=1e-5, atol=1e-4)  # of sums of 5 to 100


def test_static_scales_are_fake_quantized() -> None:
    """Ties go up here where ours go to even codes, and none of these is one."""
    layer = linear("int8", "int8", "static")
    x = 0.01 * (torch.arange(-254.0, 254.0)[:, None] * 0.7 + 0.23).expand(-1, 40)
    assert layer_form("layer", layer, OpenVinoSettings()).form == "qdq"
    assert layer_form("layer", linear("int8", "int4", "static"), OpenVinoSettings()).form == "float"
    torch.testing.assert_close(run(layer, x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_what_is_left_to_openvino_is_said(tmp_path: Path) -> None:
    wide, narrow = linear("int8", "int8"), linear("int4", "int4")
    assert layer_form("x", wide, OpenVinoSettings("as_packed")).form == "float"
    assert layer_form("x", narrow, OpenVinoSettings()).form == "float"
    left = layer_form("x", wide, OpenVinoSettings())
    assert left.form == "compressed" and "instead of int8" in left.changed
    assert "not rounded to bf16" in layer_form("x", linear("int8", "bf16"), OpenVinoSettings("as_packed")).changed
    assert layer_form("x", linear("mxfp4", None), OpenVinoSettings()).changed == ""


@pytest.mark.parametrize(("activation", "inputs", "group"), [
    ("int8", "auto", "32"), ("int8", "as_packed", "0"), (None, "auto", "0"),
])  # fmt: skip
def test_inputs_are_quantized_by_openvino_only_where_left_to_it(
    activation: str | None, inputs: str, group: str, tmp_path: Path
) -> None:
    config = FLIQSConfig(weight_format="int8", activation_format=activation)
    _, file, _ = exported("vit", config, tmp_path, inputs)
    assert str(file.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == group


def test_the_file_carries_the_allocation_and_packed_codes(tmp_path: Path) -> None:
    model, file, forms = exported("vit", FLIQSConfig(weight_format="int4", activation_format="int8"), tmp_path)
    data = json.loads(openvino.Core().read_model(tmp_path / "model.xml").get_rt_info("fliqs_hf").value)
    assert data["layers"]["vit.layers.1.mlp.fc1"] == {
        "weight": "int4", "activation": "int8", "form": "float", "stored": "INT4",
    }  # fmt: skip
    assert {form.stored for form in forms} == {"INT4"}
    layers = fliqs_hf.nn.packed_layers(model).values()
    plain = sum(p.numel() for p in model.parameters())
    weights = (tmp_path / "model.bin").stat().st_size
    packed = sum(layer.weight_codes.numel() + 4 * layer.weight_scale.numel() for layer in layers)
    assert weights <= packed + 4 * plain + 2000  # and some shapes and constants
    assert file.file_bytes == weights + (tmp_path / "model.xml").stat().st_size


@pytest.mark.parametrize(("fmt", "stored"), [
    ("int2", "INT2"), ("int3", "INT4"), ("int6", "INT8"), ("e2m1", "FLOAT4E2M1"), ("mxfp4", "FLOAT4E2M1"),
    ("e3m0", "INT8"), ("e3m2", "FLOAT8E4M3FN"), ("nvfp4", "FLOAT4E2M1"), ("e3m4", "FLOAT16"),
])  # fmt: skip
def test_codes_are_stored_in_the_narrowest_type(fmt: str, stored: str) -> None:
    assert stored_as(parse(fmt)) == stored


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inputs='none' does not exist"):
        OpenVinoSettings("none")  # type: ignore[arg-type]
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(CheckpointError, match="OpenVINO cannot load"):
        OpenVinoClassifier(tmp_path / "model.xml")
    layer = linear("int8", "int8")
    layer.register_buffer("zero_point", torch.zeros(1))
    with pytest.raises(ConfigError, match="its kind is not known"):
        layer_form("x", layer, OpenVinoSettings())
    with pytest.raises(ConfigError, match="has no packed layer"):
        write_openvino(nn.Linear(2, 2), images(1), tmp_path / "x.xml", OpenVinoSettings())
