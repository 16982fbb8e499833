"""Formats with scales of their own in ONNX: weights as blocked DequantizeLinear, inputs by their own scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir

from fliqs_hf.formats import BlockFormat, FloatFormat
from fliqs_hf.hf.export.nodes import Writer
from fliqs_hf.nn.native.codes import int8_shift
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.quant.block import decode_scales
from fliqs_hf.quant.grid import MIN_SCALE

#: ONNX's types of scales that ONNX Runtime casts: powers of two are exact in BF16.
_SCALES = {"e8m0": "BFLOAT16", "e4m3": "FLOAT8E4M3FN", "bf16": "BFLOAT16"}
_E4M3 = FloatFormat(4, 3)


def decoded_blocks(writer: Writer, name: str, layer: PackedLayer, codes: Any) -> Any:
    """The weight in fp32, [out, row]. Args: codes: [out, row], in a type of `forms.storage`, or int8 of a table."""
    fmt, scales = layer.formats.weight, layer.weight_scale_codes
    assert isinstance(fmt, BlockFormat) and scales is not None
    shape = fmt.scale_shape(layer.weight_shape)
    whole = None if layer.weight_scale is None else layer.weight_scale.new_ones(1)
    values = decode_scales(scales, fmt, whole).cpu().numpy().reshape(shape)
    dtype = onnx_ir.DataType[_SCALES[fmt.scale]]
    stored = onnx_ir.Tensor(values.astype(dtype.numpy()), dtype=dtype)
    scale = writer.op("Cast", writer.tensor(stored, f"{name}.scale"), to=onnx_ir.DataType.FLOAT)
    shared = 2.0 ** -(int8_shift(fmt.element) or 0)
    if layer.weight_scale is not None:
        shared *= float(layer.weight_scale)
    if shared != 1:
        scale = writer.op("Mul", scale, shared)
    return writer.op("DequantizeLinear", codes, scale, axis=1, block_size=fmt.block)


class BlockInputs:
    """Args: on_grid: rounds values within the range of an element to the element's, ties to even."""

    def __init__(self, writer: Writer, on_grid: Callable[[Any, Any], Any]) -> None:
        self.writer, self.on_grid = writer, on_grid

    def rounded(self, x: Any, layer: PackedLayer) -> Any:
        """`x` as `InputQuantizer` rounds it, float32: by blocks of features, or of channels of each pixel."""
        fmt, op, matrix = layer.formats.activation, self.writer.op, layer.kind.matrix
        assert isinstance(fmt, BlockFormat)
        if fmt.block is None:
            return op("Mul", *self.one_sided_codes(x, fmt, layer.kind.tokens.dims))
        rank, features = len(x.shape), layer.weight_shape[1] * layer.geometry.get("groups", 1)
        last = [0, *range(2, rank), 1]
        if not matrix:
            x = op("Transpose", x, perm=last)
        missing = -features % fmt.block
        filled = op("Pad", x, self.writer.integers(*[0] * (2 * rank - 1), missing)) if missing else x
        blocks = op("Reshape", filled, self.writer.integers(*[0] * (rank - 1), -1, fmt.block))
        if fmt.zero_point:
            values = op("Mul", *self.one_sided_codes(blocks, fmt, (-1,)))
        else:
            values = self._two_sided(blocks, fmt, layer)
        values = op("Reshape", values, self.writer.integers(*[0] * (rank - 1), -1))
        if missing:
            values = op("Slice", values, *(self.writer.integers(n) for n in (0, features, -1)))
        return values if matrix else op("Transpose", values, perm=[0, rank - 1, *range(1, rank - 1)])

    def _two_sided(self, blocks: Any, fmt: BlockFormat, layer: PackedLayer) -> Any:
        op, element = self.writer.op, fmt.element
        largest = op("ReduceMax", op("Abs", blocks), self.writer.integers(-1), keepdims=1)
        if fmt.scale == "e8m0":
            scale = self._bounded(op("Mul", self._binade(largest), 2.0**-fmt.max_exponent))
        elif fmt.scale == "e4m3":
            batch = layer.settings.activation_granularity == "per_tensor"
            dims = (-2,) if layer.kind.matrix else tuple(range(1, len(layer.kind.tokens.dims) + 1))
            axes = [] if batch else [self.writer.integers(*dims)]
            peak = op("ReduceMax", largest, *axes, keepdims=1)
            whole = self._bounded(op("Div", peak, fmt.max_value * _E4M3.max_value))
            codes = self._cast(op("Div", op("Div", largest, fmt.max_value), whole), "FLOAT8E4M3FN")
            scale = self._bounded(op("Mul", op("Max", codes, _E4M3.smallest), whole))
        else:
            scale = self._bounded(self._cast(op("Div", largest, fmt.max_value), "BFLOAT16"))
        y = op("Clip", op("Div", blocks, scale), -element.max_value, element.max_value)
        return op("Mul", self.on_grid(y, element), scale)

    def one_sided_codes(self, x: Any, fmt: BlockFormat, axes: tuple[int, ...]) -> tuple[Any, Any]:
        """`quant.block.one_sided_codes` of what shares a scale along `axes`, both float32."""
        op, where = self.writer.op, self.writer.integers(*axes)
        low = op("Min", op("ReduceMin", x, where, keepdims=1), 0.0)
        high = op("Max", op("ReduceMax", x, where, keepdims=1), 0.0)
        scale = op("Div", op("Sub", op("Div", high, 2.0), op("Div", low, 2.0)), fmt.max_value)
        scale = self._bounded(scale if fmt.scale == "fp32" else self._cast(scale, "BFLOAT16"))
        scale = op("Mul", scale, 2.0)
        zero = op("Clip", op("Round", op("Div", op("Neg", low), scale)), 0.0, fmt.max_value)
        codes = op("Clip", op("Add", op("Round", op("Div", x, scale)), zero), 0.0, fmt.max_value)
        return op("Sub", codes, zero), scale

    def _binade(self, x: Any) -> Any:
        """The largest power of two that is not above `x`. The logarithm may be one off next to one."""
        op = self.writer.op
        power = op("Pow", 2.0, op("Floor", op("Div", op("Log", x), float(np.log(2.0)))))
        power = op("Where", op("Less", x, power), op("Mul", power, 0.5), power)
        double = op("Mul", power, 2.0)
        return op("Where", op("Less", x, double), power, double)

    def _bounded(self, scale: Any) -> Any:
        return self.writer.op("Clip", scale, MIN_SCALE, 2.0**127)

    def _cast(self, x: Any, name: str) -> Any:
        narrow = self.writer.op("Cast", x, to=onnx_ir.DataType[name])
        return self.writer.op("Cast", narrow, to=onnx_ir.DataType.FLOAT)
