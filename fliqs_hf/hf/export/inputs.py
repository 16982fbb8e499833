"""Quantizing the inputs of layers in ONNX, once for all layers that read a tensor in one format."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir

from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.hf.export.blocks import BlockInputs
from fliqs_hf.hf.export.nodes import Writer
from fliqs_hf.nn.native.codes import ZERO_POINT, int8_shift
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.quant.grid import MIN_SCALE

#: Formats whose rounding is a cast to an ONNX type and back.
_CASTS = {"e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2", "e5m10": "FLOAT16", "bf16": "BFLOAT16"}


@dataclass(frozen=True)
class Codes:
    """Codes of an input, uint8 with a zero point: real value = (code - zero) × scale × 2**-shift."""

    values: Any
    scale: Any
    zero: Any
    shift: int
    scalar: bool  # whether `scale` is one number of the whole input


class InputWriter:
    """What was written for a tensor is written once.

    Args: casts: formats to which the runtime rounds exactly where it casts to their type.
    """

    def __init__(self, writer: Writer, casts: Collection[str] = tuple(_CASTS)) -> None:
        self.writer, self.casts = writer, casts
        self._written: dict[Any, Any] = {}

    def codes(self, x: Any, layer: PackedLayer) -> Codes:
        """The codes that the packed layer computes with, plus 128."""
        fmt = layer.formats.activation
        assert fmt is not None
        shift = int8_shift(fmt)
        assert shift is not None
        key = ("codes", x.name, *self._kind(layer))
        if key not in self._written:
            y, scale, scalar = self._scaled(x, layer)
            zero = self.writer.constant(np.uint8(ZERO_POINT))
            values = self.writer.op("QuantizeLinear", y, 2.0**-shift, zero)
            self._written[key] = Codes(values, scale, zero, shift, scalar)
        found: Codes = self._written[key]
        return found

    def asymmetric(self, x: Any) -> Codes:
        """Codes over the range of the whole batch."""
        key = ("asymmetric", x.name)
        if key not in self._written:
            values, scale, zero = self.writer.op("DynamicQuantizeLinear", x, outputs=3)
            self._written[key] = Codes(values, scale, zero, 0, scalar=True)
        found: Codes = self._written[key]
        return found

    def rounded(self, x: Any, layer: PackedLayer) -> Any:
        """`x` on the grid of the layer's input format, float32."""
        fmt = layer.formats.activation
        if fmt is None:
            return x
        key = ("rounded", x.name, *self._kind(layer))
        if key not in self._written:
            self._written[key] = self._round(x, layer, fmt)
        return self._written[key]

    def _round(self, x: Any, layer: PackedLayer, fmt: Format) -> Any:
        if isinstance(fmt, BlockFormat):
            return BlockInputs(self.writer, self._on_grid).rounded(x, layer)
        if not fmt.is_scaled:
            return self._on_grid(x, fmt)
        scale, _ = self._scale(x, layer)
        return self.writer.op("Mul", self._on_grid(self._in_range(x, layer, scale), fmt), scale)

    def _scaled(self, x: Any, layer: PackedLayer) -> tuple[Any, Any, bool]:
        """What QuantizeLinear rounds to codes; their scale; and whether that is one number."""
        fmt = layer.formats.activation
        assert fmt is not None
        if isinstance(fmt, BlockFormat):  # one with a zero point for each token, which has no other scale
            return *BlockInputs(self.writer, self._on_grid).one_sided_codes(x, fmt, layer.kind.tokens.dims), False
        scale, scalar = self._scale(x, layer)
        y = self._in_range(x, layer, scale)
        return (y if fmt.is_integer else self._on_grid(y, fmt)), scale, scalar

    def _in_range(self, x: Any, layer: PackedLayer, scale: Any) -> Any:
        """x / scale, cut off at the format's largest value where the scale is not that of the largest input."""
        y, fmt = self.writer.op("Div", x, scale), layer.formats.activation
        assert fmt is not None
        return y if layer.input_scale is None else self.writer.op("Clip", y, -fmt.max_value, fmt.max_value)

    def dequantized(self, x: Any, layer: PackedLayer) -> tuple[Any, Any]:
        """A value that comes from QuantizeLinear and DequantizeLinear, int8 with zero point 0, and the scale that is
        still to be applied to products with it: None for a static one, which is part of them."""
        key = ("dequantized", x.name, *self._kind(layer))
        if key not in self._written:
            self._written[key] = self._dequantize(x, layer)
        found: tuple[Any, Any] = self._written[key]
        return found

    def _dequantize(self, x: Any, layer: PackedLayer) -> tuple[Any, Any]:
        writer, zero, fmt = self.writer, self.writer.constant(np.int8(0)), layer.formats.activation
        assert fmt is not None
        if layer.settings.activation_granularity == "static" and layer.input_scale is not None and fmt.is_integer:
            scale, _ = self._scale(x, layer)
            limit = fmt.max_value * float(layer.input_scale)  # by itself QuantizeLinear saturates at -128 and 127
            codes = writer.op("QuantizeLinear", writer.op("Clip", x, -limit, limit), scale, zero)
            return writer.op("DequantizeLinear", codes, scale, zero), None
        step = 2.0 ** -(int8_shift(fmt) or 0)
        y, scale, _ = self._scaled(x, layer)
        codes = writer.op("QuantizeLinear", y, step, zero)
        return writer.op("DequantizeLinear", codes, step, zero), scale

    def _kind(self, layer: PackedLayer) -> tuple[Any, ...]:
        own = None if layer.input_scale is None else float(layer.input_scale)
        tokens, granularity = layer.kind.tokens, layer.settings.activation_granularity
        return layer.formats.activation, tokens, granularity, own

    def _scale(self, x: Any, layer: PackedLayer) -> tuple[Any, bool]:
        """float32: what one code value is worth, per token, image or tensor; and whether it is one number."""
        fmt, granularity = layer.formats.activation, layer.settings.activation_granularity
        assert fmt is not None
        key = ("scale", x.name, *self._kind(layer))
        whole = granularity in ("static", "per_tensor")
        if key in self._written:
            return self._written[key], whole
        if granularity == "static":
            assert layer.input_scale is not None
            scale = self.writer.constant(np.float32(float(layer.input_scale)))
        else:
            axes = [] if whole else [self.writer.integers(*layer.kind.tokens.dims)]
            largest = self.writer.op("ReduceMax", self.writer.op("Abs", x), *axes, keepdims=0 if whole else 1)
            scale = self.writer.op("Div", largest, fmt.max_value)
            if layer.input_scale is not None:
                scale = self.writer.op("Mul", self.writer.op("Max", scale, MIN_SCALE), float(layer.input_scale))
            scale = self.writer.op("Max", scale, MIN_SCALE)
        self._written[key] = scale
        return scale, whole

    def _on_grid(self, y: Any, fmt: Format) -> Any:
        """`y`, within the range of `fmt`, rounded to its values, ties to even."""
        writer, float32 = self.writer, onnx_ir.DataType.FLOAT
        if fmt.is_integer:
            return writer.op("Round", y)
        if fmt.name in self.casts:
            return writer.op("Cast", writer.op("Cast", y, to=onnx_ir.DataType[_CASTS[fmt.name]]), to=float32)
        step = self._step(y, fmt)
        return writer.op("Mul", writer.op("Round", writer.op("Div", y, step)), step)

    def _step(self, y: Any, fmt: Format) -> Any:
        """The distance of the values of `fmt` around `y`: by comparisons where there are few binades.

        The logarithm may be one off next to a power of two: there both steps round to that power.
        """
        writer, magnitude = self.writer, self.writer.op("Abs", y)
        top = int(np.floor(np.log2(fmt.max_value)))
        smallest = fmt.min_exponent - fmt.mantissa_bits
        if top - fmt.min_exponent <= 3:
            step = writer.constant(np.float32(2.0**smallest))
            for exponent in range(fmt.min_exponent + 1, top + 1):
                above = writer.op("Less", writer.constant(np.float32(2.0**exponent)), magnitude)
                step = writer.op("Where", above, 2.0 ** (exponent - fmt.mantissa_bits), step)
            return step
        exponent = writer.op("Floor", writer.op("Div", writer.op("Log", magnitude), float(np.log(2.0))))
        exponent = writer.op("Sub", writer.op("Clip", exponent, float(fmt.min_exponent)), float(fmt.mantissa_bits))
        return writer.op("Pow", 2.0, exponent)
