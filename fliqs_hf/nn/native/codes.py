"""Quantized inputs, as unsigned 8-bit integers or as values, made once for all layers that read one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor

from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.nn.native.compiled import Scaling, library
from fliqs_hf.quant.block import one_sided_codes
from fliqs_hf.quant.grid import grid_params, round_to_grid
from fliqs_hf.quant.scale import activation_scale, clipped_scale

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer

T = TypeVar("T")

#: Products of the largest codes that certainly fit into 32 bits.
LONGEST_SUM = 2**31 // (255 * 127)
STATIC_IMAGES = "a static scale of images, which would not show NaN in one patch"
ZERO_POINT = 128  # of input codes: unsigned ones have a fast kernel on every CPU, signed ones only on some
_MAGIC = 1.5 * 2.0**23  # adding it leaves the integer next to a float32 in its low bits, ties to even


@cache
def int8_shift(fmt: Format) -> int | None:
    """k such that every value of `fmt` times 2**k is an integer of at most 127, or None: E2M1 has 1, INT8 has 0, as
    has INT4 with a zero point per token, whose values are codes less the zero point."""
    shift = max(0, -round(math.log2(fmt.smallest)))
    one_scale = fmt.is_scaled and (not isinstance(fmt, BlockFormat) or fmt.block is None)
    return shift if one_scale and fmt.max_value * 2**shift <= 127 else None


def no_integer_product(layer: PackedLayer) -> str:
    """What keeps `layer` from exact products of 8-bit integers on any machine; "" for nothing."""
    weight, activation = layer.formats.weight, layer.formats.activation
    if activation is None:
        return "the input is not quantized"
    for role, fmt in (("weights", weight), ("inputs", activation)):
        if int8_shift(fmt) is None:
            return f"{role} in {fmt} are no 8-bit integers"
    if layer.weight_shape[1:].numel() >= LONGEST_SUM:
        return f"sums of {layer.weight_shape[1:].numel()} products may exceed 32 bits"
    return ""


def input_scale(layer: PackedLayer, x: Tensor) -> Tensor:
    """The scale that the reference path gives `x`, but NaN where codes cannot say what it holds: an infinity, which
    has no scale, or, where the scale is given, NaN in the row (an infinity saturates then, as there)."""
    fmt, granularity = layer.formats.activation, layer.settings.activation_granularity
    assert fmt is not None
    if layer.input_scale is None:
        scale = activation_scale(x, grid_params(fmt), layer.kind.tokens, granularity)
    elif granularity == "per_token_clipped":
        scale = clipped_scale(x, grid_params(fmt), layer.kind.tokens, layer.input_scale)
    else:
        return layer.input_scale + x.amax(-1, keepdim=True).clamp_(-1, 1).mul_(0)
    return scale + scale * 0


def input_codes(x: Tensor, scale: Tensor, fmt: Format, clipped: bool) -> Tensor:
    """Codes of `x` (float32) plus 128, uint8, in its shape: its values on the grid over `scale`, times 2**shift."""
    shift = int8_shift(fmt)
    assert shift is not None
    y = torch.div(x, scale)
    if not fmt.is_integer:
        y = round_to_grid(y, torch.ones((1,) * y.dim()), grid_params(fmt), saturate=clipped).mul_(2.0**shift)
    elif clipped:
        y.clamp_(-fmt.max_value, fmt.max_value)
    return y.add_(_MAGIC + ZERO_POINT).view(torch.int32).to(torch.uint8)


def quantized_codes(layer: PackedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x`, uint8 in its shape, and its scales, one for each token, image or for all, in their order."""
    return shared(layer, x, _codes)


def quantized_values(layer: PackedLayer, x: Tensor) -> Tensor:
    """`layer.quantized_input(x)`, bit for bit."""
    return shared(layer, x, _values)


def _codes(layer: PackedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    fmt, values = layer.formats.activation, x.float()
    assert fmt is not None
    shift = int8_shift(fmt)
    if isinstance(fmt, BlockFormat):
        codes, scale = _one_sided(rows_of(layer, values), fmt)
        return codes.view(x.shape), scale
    if (compiled := library()) is None or shift is None:
        scale = input_scale(layer, values)
        return input_codes(values, scale, fmt, layer.input_scale is not None), scale
    codes, scale = compiled.codes(rows_of(layer, values), fmt, shift, _scaling(layer))
    return codes.view(x.shape), scale


def _one_sided(rows: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes less the zero point of their row, plus 128: uint8 [rows, width] and float32 [rows, 1]."""
    if (compiled := library()) is not None:
        return compiled.one_sided_codes(rows, fmt)
    codes, scale = one_sided_codes(rows, fmt)
    return codes.add_(ZERO_POINT).to(torch.uint8), scale


def _values(layer: PackedLayer, x: Tensor) -> Tensor:
    fmt = layer.formats.activation
    if fmt is None or fmt.scales_itself or x.device.type != "cpu" or (compiled := library()) is None:
        return layer.quantized_input(x)
    return compiled.on_grid(rows_of(layer, x.float()), fmt, _scaling(layer)).view(x.shape).to(x.dtype)


def rows_of(layer: PackedLayer, x: Tensor) -> Tensor:
    """`x` as [scales, values that share one], contiguous."""
    fmt = layer.formats.activation
    if layer.settings.activation_granularity == "per_tensor" and not (fmt and fmt.scales_itself):
        return x.reshape(1, -1).contiguous()
    dims = layer.kind.tokens.dims
    width = x.shape[-1] if len(dims) == 1 else math.prod(x.shape[dim] for dim in dims)
    return x.reshape(-1, width).contiguous()


def _scaling(layer: PackedLayer) -> Scaling:
    if layer.settings.activation_granularity == "static":
        return Scaling(fixed=layer.input_scale)
    return Scaling(factor=layer.input_scale)


class _SharedInput(NamedTuple):
    """What was made of one tensor, and the layers that have read it."""

    tensor: ref[Tensor]
    version: int
    key: tuple[Any, ...]
    made: Any
    readers: set[int]


#: The latest one: k and v read what was made for q. Replaced as a whole, so that threads do not mix two.
_latest: list[_SharedInput | None] = [None]


def shared(layer: PackedLayer, x: Tensor, make: Callable[[PackedLayer, Tensor], T]) -> T:
    """`make(layer, x)`, or what it gave the layer before that read this very tensor in the same format.

    But not in inference mode, where nothing tells that it was written to in between, nor with numbers of the layer's
    own.
    """
    if x.is_inference() or layer._buffers["input_scale"] is not None:
        return make(layer, x)
    # A write to the tensor changes its version, and a layer that reads it once more quantizes it once more: a buffer
    # that the caller fills again and again is never taken for what it held before.
    key = (make, layer.formats.activation, layer.kind.tokens, layer.settings.activation_granularity)
    found, version, reader = _latest[0], x._version, id(layer)
    known = found is not None and found.tensor() is x and found.version == version and found.key == key
    if found is None or not known or reader in found.readers:
        found = _latest[0] = _SharedInput(ref(x), version, key, make(layer, x), set())
    found.readers.add(reader)
    made: T = found.made
    return made
