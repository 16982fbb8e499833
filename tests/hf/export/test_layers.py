"""One packed layer in ONNX Runtime against the packed layer itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import parse
from fliqs_hf.formats.rounding import code_values
from fliqs_hf.hf.export.forms import OnnxSettings, layer_form, storage
from fliqs_hf.nn.kinds.linear import Linear
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.nn.swap import packed_like

onnx_ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

INPUTS = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 7).view(1, 7, 1)
IMAGES = torch.randn(3, 8, 12, 12, generator=torch.Generator().manual_seed(2))
#: Layers that are neither a Linear nor a Conv2d, and their inputs.
OTHERS: dict[str, tuple[Any, Tensor]] = {
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1, stride=2), IMAGES[:, :, 0]),
    "conv1d-same": (lambda: nn.Conv1d(8, 16, 2, padding="same", dilation=3, bias=False), IMAGES[:, :, 0]),
    "conv1d-groups": (lambda: nn.Conv1d(8, 16, 3, groups=4), IMAGES[:, :, 0]),
    "conv1d-patches": (lambda: nn.Conv1d(8, 16, 4, stride=4), IMAGES[:, :, 0]),
    "transposed": (
        lambda: nn.ConvTranspose2d(8, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)), IMAGES,
    ),
    "transposed-groups": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2, dilation=(2, 1), bias=False), IMAGES),
    "transposed-linear": (lambda: Conv1D(24, 40), INPUTS),
}  # fmt: skip


def other(name: str, *arguments: Any) -> tuple[PackedLayer, Tensor]:
    torch.manual_seed(0)
    make, x = OTHERS[name]
    plain = make()
    if plain.bias is not None:
        nn.init.normal_(plain.bias)
    return packed(plain, *arguments), x


def packed(plain: nn.Module, weight: str, activation: str | None, granularity: Any = "per_token") -> PackedLayer:
    formats = LayerFormats(parse(weight), None if activation is None else parse(activation))
    layer = packed_like(plain, formats, QuantizerSettings(activation_granularity=granularity))
    layer.pack_(layer.kind.rows(plain, plain.weight))  # type: ignore[arg-type]
    if layer.input_scale is not None:
        layer.input_scale = torch.tensor([0.01 if granularity == "static" else 0.7])
    return layer.eval()


def linear(*arguments: Any) -> PackedLayer:
    torch.manual_seed(0)
    return packed(nn.Linear(40, 24), *arguments)


def convolution(*arguments: Any, **geometry: Any) -> PackedLayer:
    torch.manual_seed(0)
    return packed(nn.Conv2d(8, 16, **{"kernel_size": 3, **geometry}), *arguments)


def run(layer: PackedLayer, x: Tensor, form: Any = "auto", **more: Any) -> Any:
    """What ONNX Runtime makes of `x`, and the graph."""
    from fliqs_hf.hf.export.rewritten import rewrite

    settings = OnnxSettings(form=form, **more)
    float32 = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    given = onnx_ir.val("x", type=float32, shape=onnx_ir.Shape(["batch", *x.shape[1:]]))
    node = onnx_ir.node("PackedLayer", [given], {"layer": "layer"}, domain="fliqs_hf")
    (out,) = node.outputs
    out.name, out.type = "y", float32
    graph = onnx_ir.Graph(
        [given], [out], nodes=[node], opset_imports={"": settings.opset, "fliqs_hf": 1}, name="graph"
    )
    model = onnx_ir.Model(graph, ir_version=10)
    rewrite(model, {"layer": layer}, {"layer": layer_form("layer", layer, settings)}, settings)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = onnx_ir.to_proto(model).SerializeToString()
    (y,) = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    return torch.from_numpy(y), model


def assert_equal(layer: PackedLayer, x: Tensor, *arguments: Any, **settings: Any) -> Any:
    """Up to the rounding of sums: both are within 2 n u of Σ |x| |w|, u = 2**-24, n products (Higham 2002, 3.1)."""
    found, model = run(layer, x, *arguments, **settings)
    expected = layer(x).detach()
    weight, inputs = layer.decoded_weight().abs(), layer.quantized_input(x).abs()
    if layer.kind.matrix:
        bound = nn.functional.linear(inputs, weight)
    else:
        bound = layer.kind.multiply(layer, inputs, weight, None)
    bias = torch.zeros(layer.weight_shape[0]) if layer.bias is None else layer.bias.detach().abs()
    bias = bias.view(-1, *[1] * (len(layer.weight_shape) - 2))
    assert ((found - expected).abs() <= 2 * layer.weight_shape[1:].numel() * 2.0**-24 * (bound + bias)).all()
    return model


@pytest.mark.parametrize("form", ["auto", "integer", "qdq"])
@pytest.mark.parametrize("formats", [("int8", "int8"), ("int4", "int8"), ("int3", "int5"), ("e2m1", "e2m1"),
                                     ("e2m3", "int8"), ("e3m0", "e2m2"), ("int7", "e2m0")])  # fmt: skip
def test_products_of_integers(form: str, formats: tuple[str, str]) -> None:
    model = assert_equal(linear(*formats), INPUTS, form)
    kinds = [node.op_type for node in model.graph]
    product = {"auto": "MatMulIntegerToFloat", "integer": "MatMulInteger", "qdq": "MatMul"}[form]
    assert kinds.count(product) == 1 and ("QuantizeLinear" in kinds)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token_clipped", "static"])
@pytest.mark.parametrize("form", ["auto", "integer", "qdq"])
@pytest.mark.parametrize("activation", ["int8", "int4", "e2m1"])
def test_every_way_of_scaling_inputs(granularity: str, form: str, activation: str) -> None:
    assert_equal(linear("int8", activation, granularity), INPUTS, form)


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("form", ["auto", "integer", "qdq"])
@pytest.mark.parametrize("activation", ["int4_zp", "int6_zp"])
def test_zero_points_of_tokens_are_part_of_integer_products(activation: str, form: str, granularity: str) -> None:
    """Such formats have scales of their own, whatever the granularity of others."""
    x = INPUTS + INPUTS.abs().amax(-1, keepdim=True) / 3  # of which the larger part is positive
    model = assert_equal(linear("int8", activation, granularity), x, form)
    assert "QuantizeLinear" in [node.op_type for node in model.graph]
    assert_equal(convolution("int8", activation, granularity, stride=3), IMAGES + 1, form)


@pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "int8"), ("e3m4", "e3m3"), ("int12", "int12"),
                                     ("bf16", "bf16"), ("int4", None), ("e4m3", "e5m10"),
                                     ("e5m1", "e4m2")])  # fmt: skip
def test_other_formats_keep_their_values_and_are_multiplied_in_fp32(formats: tuple[str, str | None]) -> None:
    layer = linear(*formats)
    assert_equal(layer, INPUTS)
    assert layer_form("layer", layer, OnnxSettings()).changed.startswith("fp32 product: ")


@pytest.mark.parametrize("activation", ["e2m1", "e3m2", "e4m3", "e5m2", "e3m3", "e4m2", "int6", "e2m5", "e5m10"])
def test_inputs_are_rounded_as_the_packed_layer_rounds_them(activation: str) -> None:
    """Through an identity: values between, on, and next to the midpoints of the grid, exactly."""
    fmt = parse(activation)
    values = code_values(fmt)
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middles, middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(-values.max())])
    near = near[near.abs() <= fmt.max_value]
    x = torch.full((len(near), 2), fmt.max_value)
    x[:, 0] = near
    plain = nn.Linear(2, 2, bias=False)
    plain.weight.data = torch.eye(2)
    layer = packed(plain, "bf16", activation)
    found, _ = run(layer, x)
    assert torch.equal(found, layer.quantized_input(x))


BLOCKS = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4", "int4_g32", "int3_g16"]


@pytest.mark.parametrize("fmt", BLOCKS)
def test_weights_with_scales_of_their_own_are_the_packed_ones(fmt: str) -> None:
    """One-hot inputs read them out, exactly; rows of 40 and 72 end within a block."""
    matrix, images = linear(fmt, None), convolution(fmt, None)
    matrix.bias = images.bias = None
    found, model = run(matrix, torch.eye(40))
    assert torch.equal(found.T, matrix.decoded_weight())
    assert "DequantizeLinear" in [node.op_type for node in model.graph]
    found, _ = run(images, torch.eye(72).view(72, 8, 3, 3))
    assert torch.equal(found.view(72, 16).T.reshape(16, 8, 3, 3), images.decoded_weight())


@pytest.mark.parametrize("fmt", [*BLOCKS, "int4_zp", "int8_zp", "int4_g32_zp", "int8_g16_zp"])
def test_inputs_with_scales_of_their_own_are_rounded_as_packed(fmt: str) -> None:
    """Through an identity, exactly: wide ranges, powers of two, zeros, and rows that end within a block."""
    plain = nn.Linear(40, 40, bias=False)
    plain.weight.data = torch.eye(40)
    layer = packed(plain, "bf16", fmt)
    x = INPUTS.clone()
    x[1, 2], x[1, 3], x[0, 1] = 0, x[0, 3].abs(), 2.0 ** torch.arange(-20.0, 20.0)
    found, _ = run(layer, x)
    assert torch.equal(found, layer.quantized_input(x))
    image = nn.Conv2d(8, 8, 1, bias=False)
    image.weight.data = torch.eye(8).view(8, 8, 1, 1)
    layer = packed(image, "bf16", fmt)
    found, _ = run(layer, IMAGES)
    assert torch.equal(found, layer.quantized_input(IMAGES))


@pytest.mark.parametrize("geometry", [
    {}, {"padding": 1}, {"stride": 3, "bias": True}, {"padding": "same", "kernel_size": 2}, {"dilation": 2},
    {"groups": 8, "padding": 1}, {"stride": 2, "padding": (1, 0)},
])  # fmt: skip
@pytest.mark.parametrize("form", ["auto", "qdq"])
def test_convolutions(geometry: dict[str, Any], form: str) -> None:
    assert_equal(convolution("int8", "int8", **geometry), IMAGES, form)


@pytest.mark.parametrize("layer", [
    convolution("int8", "int8", stride=3), convolution("e2m1", "int8", "static", stride=3, bias=False),
    convolution("int8", "int8", kernel_size=(2, 4), stride=(2, 4)),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("codes", ["signed", "unsigned"])
def test_patches_are_rows_of_a_product(layer: PackedLayer, codes: str) -> None:
    model = assert_equal(layer, IMAGES, weight_codes=codes)
    kinds = [node.op_type for node in model.graph]
    assert "MatMulIntegerToFloat" in kinds and "ConvInteger" not in kinds


def test_integer_convolutions_are_that() -> None:
    model = assert_equal(convolution("int4", "int8", "static"), IMAGES)
    assert "ConvInteger" in [node.op_type for node in model.graph]


@pytest.mark.parametrize("form", ["auto", "integer", "qdq"])
@pytest.mark.parametrize("formats", [("int8", "int8"), ("e2m1", "e4m3"), ("int4_g32", "int8_zp"), ("int4", None)])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_layers(name: str, formats: tuple[str, str | None], form: str) -> None:
    layer, x = other(name, *formats)
    model = assert_equal(layer, x, form)
    integers = formats == ("int8", "int8")
    decided = layer_form(name, layer, OnnxSettings(form=form))
    if integers and name.split("-")[-1] not in ("groups", "transposed"):
        assert decided.form == ("qdq" if form == "qdq" else "integer") and not decided.changed
        assert form == "qdq" or any("Integer" in node.op_type for node in model.graph)
    else:
        assert decided.form == "float" and decided.changed.startswith("fp32 product: ")


@pytest.mark.parametrize("granularity", ["per_tensor", "static"])
@pytest.mark.parametrize("name", ["conv1d", "conv1d-patches", "transposed"])
def test_other_kinds_with_one_input_scale(name: str, granularity: str) -> None:
    layer, x = other(name, "int8", "int8", granularity)
    assert_equal(layer, x)


def test_one_scale_for_the_batch_maps_to_onnx_runtimes_own() -> None:
    layer = linear("int8", "int8")
    found, model = run(layer, INPUTS, input_scales="per_tensor")
    assert [node.op_type for node in model.graph][:2] == ["DynamicQuantizeLinear", "MatMulInteger"]
    step = (INPUTS.max() - INPUTS.min()) / 255
    exact = nn.functional.linear(INPUTS, layer.decoded_weight(), layer.bias)
    # half a step for each input, and another for what rounding the zero point moves the range by
    assert ((found - exact).abs() <= step * layer.decoded_weight().abs().sum(1) + 1e-5).all()


@pytest.mark.parametrize("form", ["auto", "integer"])
@pytest.mark.parametrize("layer", [linear("int8", "int8"), linear("int8", "int8", "static"), linear("int7", "int8"),
                                   convolution("int8", "int8", padding=1)], ids=repr)  # fmt: skip
def test_unsigned_codes_are_the_same_numbers(layer: PackedLayer, form: str) -> None:
    x = INPUTS if layer.kind.matrix else IMAGES
    model = assert_equal(layer, x, form, weight_codes="unsigned")
    stored = model.graph.initializers["layer.weight"].dtype
    assert stored == (onnx_ir.DataType.UINT8 if layer.formats.weight.bits == 8 else onnx_ir.DataType.INT8)


@pytest.mark.parametrize(("fmt", "opset", "stored"), [
    ("int2", 21, "INT4"), ("int2", 25, "INT2"), ("int4", 21, "INT4"), ("int3", 25, "INT4"), ("int5", 21, "INT8"),
    ("e2m1", 21, "UINT4"), ("e2m3", 21, "INT8"), ("e3m2", 21, "FLOAT8E4M3FN"), ("e4m3", 21, "FLOAT8E4M3FN"),
    ("e5m2", 21, "FLOAT8E5M2"), ("e3m4", 21, "FLOAT16"), ("int10", 21, "INT16"), ("bf16", 21, "BFLOAT16"),
])  # fmt: skip
def test_codes_are_stored_in_the_narrowest_type(fmt: str, opset: int, stored: str) -> None:
    assert storage(parse(fmt), opset)[0] == stored


def test_two_bits_are_two_bits() -> None:
    model = assert_equal(linear("int2", "int8"), INPUTS, opset=25)
    assert model.graph.initializers["layer.weight"].const_value.nbytes == 40 * 24 // 4


def test_what_is_not_known_is_refused() -> None:
    class Other(Linear):
        onnx = ""

    class PackedOther(PackedLayer):
        kind = Other()

    layer = linear("int8", "int8")
    layer.register_buffer("zero_point", torch.zeros(1))
    with pytest.raises(ConfigError, match="its kind is not known"):
        layer_form("layer", layer, OnnxSettings())
    other = linear("int8", "int8")
    other.__class__ = PackedOther
    with pytest.raises(ConfigError, match=r"PackedOther in .* cannot be exported"):
        layer_form("layer", other, OnnxSettings())
    blocks = linear("int8", "int8")
    blocks.weight_scale = torch.ones(48)
    with pytest.raises(ConfigError, match="48 weight scales"):
        layer_form("layer", blocks, OnnxSettings())
    with pytest.raises(ConfigError, match="opset=9: give 21 to 25"):
        OnnxSettings(opset=9)
