"""The arithmetic of one packed layer in operators of OpenVINO, with weights in the form that it keeps compressed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import openvino
from numpy.typing import NDArray
from openvino import opset13 as ops

from fliqs_hf.formats import BlockFormat
from fliqs_hf.hf.export.forms import LayerForm
from fliqs_hf.hf.export.geometry import Geometry
from fliqs_hf.nn.native.codes import int8_shift
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.quant.block import decode_scales

#: ONNX's name of a type -> OpenVINO's, and what is added to codes where it has no sign.
_TYPES = {
    "INT2": ("u2", 2), "INT4": ("i4", 0), "INT8": ("i8", 0), "INT16": ("i16", 0), "FLOAT4E2M1": ("f4e2m1", 0),
    "FLOAT8E4M3FN": ("f8e4m3", 0), "FLOAT8E5M2": ("f8e5m2", 0), "FLOAT8E8M0": ("f8e8m0", 0),
    "FLOAT16": ("f16", 0), "BFLOAT16": ("bf16", 0), "FLOAT": ("f32", 0),
}  # fmt: skip
_SCALES = {"e8m0": "FLOAT8E8M0", "e4m3": "FLOAT8E4M3FN", "bf16": "BFLOAT16"}


def product(x: Any, layer: PackedLayer, decided: LayerForm) -> Any:
    """The output of `layer` for the value `x`, float32."""
    if decided.form == "qdq":
        x = _on_static_grid(x, layer)
    weight = _weight(layer, decided)
    if layer.kind.matrix:
        result = ops.matmul(x, weight, transpose_a=False, transpose_b=True)
    else:
        result = _convolution(x, weight, layer)
    if layer.bias is None:
        return result
    bias = layer.bias.detach().float().cpu().numpy()
    return ops.add(result, ops.constant(bias.reshape(-1, *[1] * (len(layer.weight_shape) - 2))))


def _on_static_grid(x: Any, layer: PackedLayer) -> Any:
    fmt, scale = layer.formats.activation, layer.input_scale
    assert fmt is not None and scale is not None
    limit = np.float32(fmt.max_value * float(scale))
    return ops.fake_quantize(x, -limit, limit, -limit, limit, int(2 * fmt.max_value) + 1)


def _weight(layer: PackedLayer, decided: LayerForm) -> Any:
    """codes × scales, float32 of the weight's shape, which OpenVINO computes at loading or while it multiplies."""
    fmt, shape = layer.formats.weight, list(layer.weight_shape)
    unit = np.float32(2.0 ** -_shift(layer, decided.stored))
    values = (layer.code_values() / float(unit)).cpu().numpy()
    if not isinstance(fmt, BlockFormat):
        weight = _decoded(values.reshape(shape), decided.stored)
        if layer.weight_scale is None:
            return weight
        scale = layer.weight_scale.cpu().numpy() * unit
        return ops.multiply(weight, ops.constant(scale.reshape(-1, *[1] * (len(shape) - 1))))
    assert fmt.block is not None
    outputs, blocks = fmt.scale_shape(layer.weight_shape)
    row = values.size // outputs
    filled = np.zeros((outputs, blocks * fmt.block), dtype=np.float32)
    filled[:, :row] = values.reshape(outputs, row)
    weight = _decoded(filled.reshape(outputs, blocks, fmt.block), decided.stored)
    weight = ops.multiply(weight, _block_scales(layer, fmt, (outputs, blocks, 1), unit))
    weight = ops.reshape(weight, np.array([outputs, -1]), special_zero=False)
    if row < filled.shape[1]:
        weight = ops.slice(weight, np.array([0]), np.array([row]), np.array([1]), np.array([1]))
    return weight if len(shape) == 2 else ops.reshape(weight, np.array(shape), special_zero=False)


def _shift(layer: PackedLayer, stored: str) -> int:
    """Codes in 8-bit integers are code values times 2 to this power."""
    fmt = layer.formats.weight
    return (int8_shift(fmt.element if isinstance(fmt, BlockFormat) else fmt) or 0) if stored == "INT8" else 0


def _block_scales(layer: PackedLayer, fmt: BlockFormat, shape: tuple[int, ...], unit: np.float32) -> Any:
    """In the type of the format, times what all of them share."""
    assert layer.weight_scale_codes is not None
    whole = None if layer.weight_scale is None else layer.weight_scale.new_ones(1)
    scales = decode_scales(layer.weight_scale_codes, fmt, whole).cpu().numpy().reshape(shape)
    decoded = _decoded(scales, _SCALES[fmt.scale])
    shared = unit if layer.weight_scale is None else unit * np.float32(float(layer.weight_scale))
    return decoded if shared == 1 else ops.multiply(decoded, ops.constant(np.full((1, 1, 1), shared)))


def _decoded(values: NDArray[np.float32], stored: str) -> Any:
    """A constant of `values`, which its type holds exactly, and its conversion to float32."""
    name, offset = _TYPES[stored]
    codes = constant(values + np.float32(offset), name, stored)
    converted = codes if name == "f32" else ops.convert(codes, "f32")
    return ops.subtract(converted, ops.constant(np.float32(offset))) if offset else converted


def constant(values: NDArray[np.float32], name: str, stored: str) -> Any:
    """Types of fewer than 8 bits are packed, the first value in the lowest bits."""
    kind = getattr(openvino.Type, name)
    dtype = np.dtype(np.uint8) if name.startswith("u") else onnx_ir.DataType[stored].numpy()
    data = np.ascontiguousarray(values.astype(dtype)).view(np.uint8).ravel()
    if (bits := kind.bitwidth) < 8:
        each = 8 // bits
        data = np.pad(data, (0, -data.size % each)).reshape(-1, each) & (2**bits - 1)
        data = np.bitwise_or.reduce(data << (bits * np.arange(each, dtype=np.uint8)), axis=1)
    tensor = openvino.Tensor(data, openvino.Shape(list(values.shape)), kind)
    return openvino.op.Constant(tensor, shared_memory=False)


def _convolution(x: Any, weight: Any, layer: PackedLayer) -> Any:
    g, transposed = Geometry.of(layer), layer.kind.onnx == "ConvTranspose"
    outputs, inputs, *kernel = layer.weight_shape
    moves = {"strides": g.strides, "pads_begin": g.begins, "pads_end": g.ends, "dilations": g.dilations}
    if transposed:
        moves["output_padding"] = g.output_padding
    if g.groups == 1:
        if not transposed:
            return ops.convolution(x, weight, **moves)
        weight = ops.transpose(weight, np.array([1, 0, *range(2, 2 + len(kernel))]))
        return ops.convolution_backprop_data(x, weight, **moves)
    weight = ops.reshape(weight, np.array([g.groups, outputs // g.groups, inputs, *kernel]), special_zero=False)
    if not transposed:
        return ops.group_convolution(x, weight, **moves)
    weight = ops.transpose(weight, np.array([0, 2, 1, *range(3, 3 + len(kernel))]))
    return ops.group_convolution_backprop_data(x, weight, **moves)
