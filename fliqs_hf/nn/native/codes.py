"""Codes of inputs as unsigned 8-bit integers, made once for all layers that read one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fliqs_hf.formats import Format
from fliqs_hf.quant.fake import round_to_grid
from fliqs_hf.quant.scale import activation_scale, clipped_scale, format_data

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer

ZERO_POINT = 128  # of input codes: unsigned ones have a fast kernel on every CPU, signed ones only on some
_MAGIC = 1.5 * 2.0**23  # adding it leaves the integer next to a float32 in its low bits, ties to even


@cache
def int8_shift(fmt: Format) -> int | None:
    """k such that every value of `fmt` times 2**k is an integer of at most 127, or None: E2M1 has 1, INT8 has 0."""
    shift = max(0, -round(math.log2(fmt.smallest)))
    return shift if fmt.is_scaled and fmt.max_value * 2**shift <= 127 else None


def input_scale(layer: PackedLayer, x: Tensor) -> Tensor:
    """The scale that the reference path gives `x`; NaN for an input that holds an infinity, as there."""
    fmt, granularity = layer.formats.activation, layer.settings.activation_granularity
    assert fmt is not None
    if layer.input_scale is not None:
        scale = clipped_scale(x, format_data(fmt), layer.kind, layer.input_scale)
    else:
        scale = activation_scale(x, format_data(fmt), layer.kind, granularity)
    return scale + scale * 0


def input_codes(x: Tensor, scale: Tensor, fmt: Format, clipped: bool) -> Tensor:
    """Codes of `x` (float32) plus 128, uint8, in its shape: its values on the grid over `scale`, times 2**shift."""
    shift = int8_shift(fmt)
    assert shift is not None
    y = torch.div(x, scale)
    if not fmt.is_integer:
        y = round_to_grid(y, torch.ones((1,) * y.dim()), format_data(fmt), saturate=clipped).mul_(2.0**shift)
    elif clipped:
        y.clamp_(-fmt.max_value, fmt.max_value)
    return y.add_(_MAGIC + ZERO_POINT).view(torch.int32).to(torch.uint8)


@dataclass
class _Shared:
    """Codes of one tensor, and the layers that have read them."""

    version: int
    key: tuple[Any, ...]
    codes: Tensor
    scale: Tensor
    readers: set[int]


#: tensor -> its codes, for as long as the tensor lives: k and v read what was made for q.
_shared: Any = WeakIdKeyDictionary()


def quantized_codes(layer: PackedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x`, uint8 in its shape, and its scale; other layers that read this very tensor share them, but not in
    inference mode, where nothing tells that it was written to in between."""
    fmt, clipped = layer.formats.activation, layer.input_scale is not None
    assert fmt is not None

    def make() -> tuple[Tensor, Tensor]:
        values = x.float()
        scale = input_scale(layer, values)
        return input_codes(values, scale, fmt, clipped), scale

    if x.is_inference() or clipped:
        return make()
    # A write to the tensor changes its version, and a layer that reads it once more quantizes it once more: a buffer
    # that the caller fills again and again is never taken for what it held before.
    key = (fmt, layer.kind, layer.settings.activation_granularity)
    found: _Shared | None = _shared.get(x)
    if found is None or found.version != x._version or found.key != key or id(layer) in found.readers:
        found = _shared[x] = _Shared(x._version, key, *make(), readers=set())
    found.readers.add(id(layer))
    return found.codes, found.scale
