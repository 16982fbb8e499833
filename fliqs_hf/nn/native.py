"""Fast kernels for packed layers on CPUs, chosen per layer, beside the reference path, which decodes the weight.

**Numerics.** Codes and scales of weights and inputs are those of the reference path. The products of codes are summed
in 32-bit integers, exactly; the sum S is then rounded to float32 once and multiplied by the two scales w and s. With
bias b, the result lies within 3 u |S w s| + u |S w s + b| of the real number S w s + b, to first order in u = 2**-24,
whatever the batch and the number of threads. (The reference path rounds every partial sum instead, so its error grows
with the number of input features.) Layers are equal to that bound, but models not bit for bit: a value on the
midpoint of two codes may be rounded the other way in the next layer, as by any other change of arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fliqs_hf.formats import Format
from fliqs_hf.quant.fake import round_to_grid
from fliqs_hf.quant.scale import activation_scale, clipped_scale, format_data

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedConv2d, PackedLayer

#: "auto": the fastest kernel that a layer has on this machine; "reference": always the one that training simulates.
Kernels = Literal["auto", "reference"]

ZERO_POINT = 128  # of input codes: unsigned ones have a fast kernel on every CPU, signed ones only on some
_MAGIC = 1.5 * 2.0**23  # adding it leaves the integer next to a float32 in its low bits, ties to even
_LONGEST_SUM = 2**31 // (255 * 127)


@cache
def int8_shift(fmt: Format) -> int | None:
    """k such that every value of `fmt` times 2**k is an integer of at most 127, or None: E2M1 has 1, INT8 has 0."""
    shift = max(0, -round(math.log2(fmt.smallest)))
    return shift if fmt.is_scaled and fmt.max_value * 2**shift <= 127 else None


@cache
def largest_exact_weight() -> int:
    """The largest weight code whose int8 products this CPU sums exactly: 127, 64 without VNNI, 0 without a kernel.

    Found by products that would saturate 16-bit sums, of the shapes that select different kernels, not by the name of
    the CPU: 255 · 127 · 2 is beyond 16 bits, 255 · 64 · 2 is not.
    """
    for largest in (127, 64):
        if all(_sums_exactly(rows, features, outputs, largest) for rows, features, outputs in _PROBES):
            return largest
    return 0


_PROBES = ((1, 64, 16), (3, 100, 10), (64, 192, 576), (200, 768, 192))


def _sums_exactly(rows: int, features: int, outputs: int, largest: int) -> bool:
    try:
        weight = torch.full((outputs, features), largest, dtype=torch.int8)
        weight[::2] = -largest
        codes = torch.full((rows, features), 255, dtype=torch.uint8)
        product = _product(codes, _prepacked(weight), torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32))
    except (RuntimeError, NotImplementedError, AttributeError):  # a build of torch without oneDNN
        return False
    return torch.equal(product, (weight.double().sum(1) * (255 - ZERO_POINT)).float().expand(rows, -1))


def _prepacked(weight: Tensor) -> Any:
    return torch.ops.onednn.qlinear_prepack(weight, None)


def _product(codes: Tensor, weight: Any, scale: Tensor, zeros: Tensor) -> Tensor:
    """Σ (code − 128) · weight · scale, float32 [rows, outputs]."""
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO_POINT, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@dataclass(frozen=True)
class Choice:
    """The kernel of a layer, "int8" or "reference", and why, in words."""

    kernel: Literal["int8", "reference"]
    reason: str


def choose(layer: PackedLayer) -> Choice:
    """The fastest kernel that is exact for `layer` on its device, for inference."""
    weight, activation = layer.formats.weight, layer.formats.activation
    device = layer.weight_codes.device.type
    if device != "cpu":
        return Choice("reference", f"no kernel for {device} yet")
    if activation is None:
        return Choice("reference", "the input is not quantized")
    for role, fmt in (("weights", weight), ("inputs", activation)):
        if int8_shift(fmt) is None:
            return Choice("reference", f"{role} in {fmt} are no 8-bit integers")
    if layer.settings.activation_granularity == "static":
        return Choice("reference", "a static input scale, which would not show NaN in the input")
    if reason := layer.not_a_product:
        return Choice("reference", reason)
    if layer.weight_shape[1:].numel() >= _LONGEST_SUM:
        return Choice("reference", f"sums of {layer.weight_shape[1:].numel()} products may exceed 32 bits")
    largest = largest_exact_weight()
    if weight.max_value * 2 ** (int8_shift(weight) or 0) > largest:
        return Choice("reference", f"this CPU sums int8 products exactly for weights up to {largest} only")
    return Choice("int8", f"{weight} and {activation} as 8-bit integers, summed exactly")


class Int8Product:
    """The prepared weight of one layer: rows of input codes in, float32 products out."""

    def __init__(self, layer: PackedLayer) -> None:
        shift_w, shift_x = int8_shift(layer.formats.weight), int8_shift(layer.formats.activation)
        assert shift_w is not None and shift_x is not None and layer.weight_scale is not None
        outputs = layer.weight_shape[0]
        codes = layer.code_values().mul_(2.0**shift_w).to(torch.int8)
        self._weight = _prepacked(codes.view(outputs, -1))
        self._scale = (layer.weight_scale * 2.0 ** -(shift_w + shift_x)).expand(outputs).contiguous()
        self._zeros = torch.zeros(outputs, dtype=torch.int32)

    def __call__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """float32 [rows, outputs] from codes [rows, features], uint8, and scales [rows, 1] or [1, 1], float32."""
        out = _product(codes, self._weight, self._scale, self._zeros).mul_(scale)
        return out if bias is None else out.add_(bias.float())


class Native:
    """The kernel of one layer, made for the codes and scales that it has now."""

    def __init__(self, layer: PackedLayer) -> None:
        self.choice = choose(layer)
        self._source = _state(layer)
        self._product: Int8Product | None = None

    def is_of(self, layer: PackedLayer) -> bool:
        """Whether nothing has been written to the layer's codes or scales since."""
        now = _state(layer)
        return all(a[0] is b[0] and a[1] == b[1] for a, b in zip(now, self._source, strict=True))

    def product(self, layer: PackedLayer) -> Int8Product:
        if self._product is None:  # at the first forward pass, not while a model is loaded
            self._product = Int8Product(layer)
        return self._product


def _state(layer: PackedLayer) -> list[tuple[Tensor | None, int]]:
    parts = (layer.weight_codes, layer.weight_scale)
    return [(part, -1 if part is None or part.is_inference() else part._version) for part in parts]


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


def linear(layer: PackedLayer, product: Int8Product, x: Tensor) -> Tensor:
    """`nn.Linear` of x [..., features]; its dtype out."""
    codes, scale = quantized_codes(layer, x)
    rows = scale.reshape(-1, 1)
    out = product(codes.reshape(-1, codes.shape[-1]), rows, layer.bias)
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def patches(layer: PackedConv2d, product: Int8Product, x: Tensor) -> Tensor:
    """`nn.Conv2d` whose stride is its kernel, of x [images, channels, height, width]; its dtype out."""
    codes, scale = quantized_codes(layer, x)
    images, channels = x.shape[:2]
    kh, kw = layer.geometry["kernel_size"]
    height, width = x.shape[2] // kh, x.shape[3] // kw
    blocks = codes[:, :, : height * kh, : width * kw].reshape(images, channels, height, kh, width, kw)
    rows = blocks.permute(0, 2, 4, 1, 3, 5).reshape(images * height * width, -1)
    scales = scale.reshape(-1, 1).expand(images, 1).repeat_interleave(height * width, 0)
    out = product(rows, scales, layer.bias).to(x.dtype)
    return out.view(images, height, width, -1).permute(0, 3, 1, 2)
