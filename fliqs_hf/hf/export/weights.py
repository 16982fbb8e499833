"""Codes of weights as ONNX tensors, in the narrowest type that holds them exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from fliqs_hf.formats import BlockFormat
from fliqs_hf.formats.packing import unpack
from fliqs_hf.formats.rounding import code_values
from fliqs_hf.hf.export.nodes import Writer
from fliqs_hf.nn.native.codes import ZERO_POINT, int8_shift
from fliqs_hf.nn.packed import PackedLayer


def channels(layer: PackedLayer) -> NDArray[np.float32]:
    """What a code value is worth, float32 [out]; ones where the format is used unscaled."""
    outputs = layer.weight_shape[0]
    if layer.weight_scale is None:
        return np.ones(outputs, dtype=np.float32)
    return np.ascontiguousarray(layer.weight_scale.cpu().expand(outputs).numpy())


def stored_codes(writer: Writer, name: str, layer: PackedLayer, stored: str) -> Any:
    """The weight's codes, [in, out] of a Linear and [out, in, height, width] of a convolution: int8 where they are
    integers (times 2**shift), or uint8 with zero point 128, else in the type that they are stored in. Of
    formats with blocks [out, row], as they are stored but for those of a table.

    Types of fewer than 8 bits are cast, or looked up, in the graph: runtimes do that once, at loading.
    """
    fmt, key = layer.formats.weight, f"{name}.weight"
    blocks = isinstance(fmt, BlockFormat)
    shape = (layer.weight_shape[0], -1) if blocks else layer.weight_shape
    transposed = layer.kind.matrix and not blocks
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt

    def arranged(values: Any) -> NDArray[Any]:
        array: NDArray[Any] = values.view(shape).cpu().numpy()
        return np.ascontiguousarray(array.T if transposed else array)

    shift = int8_shift(element)
    if stored == "UINT4":
        assert shift is not None
        places = arranged(unpack(layer.weight_codes, fmt.bits, layer.weight_shape.numel()))
        table = np.nan_to_num(code_values(element).numpy() * 2.0**shift).astype(np.int8)
        index = writer.op("Cast", writer.tensor(_tensor(places, stored), key), to=onnx_ir.DataType.INT32)
        return writer.op("Gather", writer.constant(table, f"{name}.values"), index)
    values = arranged(layer.code_values().mul_(2.0 ** (shift or 0)))
    tensor = writer.tensor(_tensor(values + ZERO_POINT if stored == "UINT8" else values, stored), key)
    if stored in ("INT2", "INT4") and not blocks:
        return writer.op("Cast", tensor, to=onnx_ir.DataType.INT8)
    return tensor


def _tensor(values: NDArray[Any], stored: str) -> Any:
    dtype = onnx_ir.DataType[stored]
    return onnx_ir.Tensor(values.astype(dtype.numpy()), dtype=dtype)
