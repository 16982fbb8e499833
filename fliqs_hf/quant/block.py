"""Fake quantization in formats that bring their own scales (`formats/block.py`).

Blocks are neighbours in the last dimension; the last one of a row is filled up with zeros, which change no scale. An
element is rounded as everywhere: ties to even, beyond the range saturated. A NaN or an infinity makes its block NaN,
or all that shares its float32. No scale is below 2**-100 (2**-109 in NVFP4): a block of smaller numbers, and one of
zeros, has the smallest scale, so nothing is divided by 0 and no scale is subnormal (MX ends at 2**-127).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.formats import BlockFormat, FloatFormat, decode, encode, pack, round_to_format, unpack
from fliqs_hf.formats.plain import BF16
from fliqs_hf.quant.fake import fake_quantize
from fliqs_hf.quant.grid import EXPONENT_MASK, MIN_SCALE
from fliqs_hf.quant.scale import absmax, unit_factor

_E4M3 = FloatFormat(4, 3)
#: Parts of the absmax scale that "mse" tries: 2 is of use where scales are powers of two, which round down.
_FACTORS = (2.0, *(1.0 - 0.8 * step / 40 for step in range(40)))


def to_blocks(x: Tensor, fmt: BlockFormat) -> Tensor:
    """[..., n] -> [..., blocks, elements]."""
    block = fmt.block or max(x.shape[-1], 1)
    if missing := -x.shape[-1] % block:
        x = functional.pad(x, (0, missing))
    return x.unflatten(-1, (-1, block))


def from_blocks(x: Tensor, length: int) -> Tensor:
    """Inverse of `to_blocks`, [..., length]."""
    return x.flatten(-2).narrow(-1, 0, length)


def tensor_scale(peak: Tensor, fmt: BlockFormat) -> Tensor:
    """The float32 that brings the largest E4M3 scale of what `peak` is max |x| of to 448; ones for other scales."""
    if fmt.scale != "e4m3":
        return torch.ones_like(peak)
    return _finite(peak / peak.new_full((), fmt.max_value * _E4M3.max_value), peak)


def block_scale(peak: Tensor, fmt: BlockFormat, whole: Tensor) -> Tensor:
    """Scale of blocks whose max |x| (width, of a format with a zero point) is `peak`, as their format can hold it,
    times `whole` of `tensor_scale`; float32, the shape of `peak`."""
    if fmt.scale == "e8m0":
        binade = torch.bitwise_and(peak.view(torch.int32), EXPONENT_MASK).view(torch.float32)
        return _finite(binade * 2.0**-fmt.max_exponent, peak)
    # A tensor made on the device: GPUs divide by a host number through its reciprocal, one bit off.
    scale = peak / peak.new_full((), fmt.max_value)
    if fmt.scale == "fp32":
        return _finite(scale, peak)
    if fmt.scale == "bf16":
        return _finite(round_to_format(scale, BF16), peak)
    codes = round_to_format(scale / whole, _E4M3).clamp(min=_E4M3.smallest)
    return codes * whole


def _finite(scale: Tensor, peak: Tensor) -> Tensor:
    """Within the bounds, and NaN where `peak` is NaN or infinite."""
    return scale.clamp(MIN_SCALE, 2.0**127) + peak * 0


def weight_block_scale(weight: Tensor, fmt: BlockFormat, method: str) -> tuple[Tensor, Tensor]:
    """Scales of a weight [out, in], float32 [out, blocks, 1], and the float32 [1, 1, 1] that is in all of them.

    Args:
        method: "absmax", or "mse" for those of `_FACTORS` with the least squared error of each block.
    """
    values = to_blocks(weight.float(), fmt)
    peak = absmax(values, (-1,))
    whole = tensor_scale(absmax(values, None), fmt)
    best = block_scale(peak, fmt, whole)
    if method == "absmax":
        return best, whole
    unit = unit_factor(values, (-1,))
    least = torch.full_like(best, torch.inf)
    for factor in _FACTORS:
        scale = block_scale(peak * factor, fmt, whole)
        rounded = fake_quantize(values, scale, fmt, integer=fmt.is_integer)
        error = (rounded - values).mul_(unit).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best, whole


def quantize_blocks(x: Tensor, fmt: BlockFormat, scale: Tensor) -> Tensor:
    """`x` [..., n] on the grid of `scale` [..., blocks, 1]; shape and dtype of `x`. What saturates has no gradient."""
    return from_blocks(fake_quantize(to_blocks(x, fmt), scale, fmt, integer=fmt.is_integer), x.shape[-1])


def quantize_rows(x: Tensor, fmt: BlockFormat, shared: tuple[int, ...] | None) -> Tensor:
    """Fake-quantize an input [..., n] with blocks along its last dimension, by scales of its own.

    Args:
        shared: the dimensions over which E4M3 scales share one float32; None: all.
    Returns: shape and dtype of `x`.
    """
    blocks = to_blocks(x.detach().float(), fmt)
    if fmt.zero_point:
        codes, scale = one_sided_codes(blocks, fmt)
        rounded = from_blocks(codes.mul_(scale), x.shape[-1]).to(x.dtype)
        value: Tensor = _StraightThrough.apply(x, rounded)
        return value
    whole = blocks.new_ones(())
    if fmt.scale == "e4m3":
        whole = tensor_scale(absmax(x.detach(), shared), fmt).unsqueeze(-1)
    return quantize_blocks(x, fmt, block_scale(absmax(blocks, (-1,)), fmt, whole))


def one_sided_codes(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes 0 … 2**bits - 1 less the zero point of their row, and the scale of the row. The range always holds 0,
    which is exact.

    Args:
        x: float32 [..., n], each row a block of its own.
    Returns: float32 [..., n], whole numbers; float32 [..., 1], NaN where the row holds NaN or infinity.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = block_scale(high / 2 - low / 2, fmt, low) * 2  # halves, whose difference cannot overflow
    zero = (-low / scale).round_().clamp_(0, fmt.max_value)
    return (x / scale).round_().add_(zero).clamp_(0, fmt.max_value).sub_(zero), scale


class _StraightThrough(torch.autograd.Function):
    """A given value forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def encode_scales(scale: Tensor, fmt: BlockFormat, whole: Tensor) -> Tensor:
    """Scales as bytes: uint8 [elements · bits / 8]. `decode_scales` gives the same float32 back."""
    if fmt.scale == "e8m0":
        return ((scale.flatten() * _ocp_step(fmt)).view(torch.int32) >> 23).to(torch.uint8)
    if fmt.scale == "bf16":
        return pack(encode(scale.flatten(), BF16), BF16.bits)
    return encode(scale.flatten() / whole.view(1), _E4M3)


def decode_scales(codes: Tensor, fmt: BlockFormat, whole: Tensor | None) -> Tensor:
    """Inverse of `encode_scales`, float32 [elements]."""
    if fmt.scale == "e8m0":
        bits = codes.to(torch.int32) << 23
        return bits.masked_fill(codes == 255, 0x7FC00000).view(torch.float32) / _ocp_step(fmt)
    if fmt.scale == "bf16":
        return decode(unpack(codes, BF16.bits, codes.numel() // 2), BF16, check=False)
    assert whole is not None
    return decode(codes, _E4M3, check=False) * whole


def _ocp_step(fmt: BlockFormat) -> float:
    """OCP's integers count 64ths (MX v1.0, section 5.3.4), ours are whole: its scale is 64 of our steps."""
    return 2.0**fmt.mantissa_bits if fmt.is_integer else 1.0
