"""Triton kernels for CUDA devices: inputs become codes in one pass, and a product unpacks the weight in registers.

The arithmetic is that of `codes.py`: true divisions, ties to even by adding and subtracting, and sums of integer codes
in 32-bit integers, so that the sums are exact. With E4M3 codes the device multiplies, and sums blocks of 32 products,
in the precision of its FP8 units before they are added up in float32.

Triton's interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1, before this module is imported).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.quant.grid import MIN_SCALE, grid_params

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


@triton.jit
def _bounded(scale, least):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(scale, least), 2.0**127)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, codes, scales, factor, rows, width, limit, least, min_normal, magic, unit,
    ZERO_POINT: tl.constexpr, CLIPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows: their absmax scales, or those times `factor`, and their codes; with a zero point, codes less that."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (column < width) & (row < rows)
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    # As numbers, bits of magnitudes order as the magnitudes do, NaN above infinity, so that NaN wins.
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(magnitudes, 1).to(tl.float32, bitcast=True)[:, None]
    if ZERO_POINT:
        low = tl.minimum(tl.min(values, 1), 0.0)[:, None]
        high = tl.maximum(tl.max(values, 1), 0.0)[:, None]
        scale = _bounded(tl.div_rn(high / 2 - low / 2, limit), least) * 2
        zero = tl.minimum((tl.div_rn(-low, scale) + _ROUND) - _ROUND, limit)
        y = ((tl.div_rn(values, scale) + _ROUND) - _ROUND) + zero
        y = tl.minimum(tl.maximum(y, 0.0), limit) - zero
    else:
        scale = _bounded(tl.div_rn(top, limit), least)
        if CLIPPED:
            scale = _bounded(scale * tl.load(factor), least)
        y = tl.div_rn(values, scale)
        if CLIPPED:
            y = tl.minimum(tl.maximum(y, -limit), limit)
        power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        grid = tl.maximum(power, min_normal) * magic
        y = ((y + grid) - grid) * unit
    tl.store(scales + row, scale + top * 0, mask=row < rows)  # there is no scale for what is not finite
    if codes.dtype.element_ty == tl.int8:
        code = (y + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        code = y.to(codes.dtype.element_ty)
    tl.store(codes + row * width + column, code, mask=inside)


def quantize(
    rows: Tensor, fmt: Format, unit: float, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes of rows [rows, width], contiguous, each times `unit`, in `dtype`, and their scales, float32 [rows].

    Args:
        unit: what makes the values of `fmt` values of `dtype`.
        factor: float32 [1] on the absmax scale of every row; what lies beyond saturates.
    """
    count, width = rows.shape
    codes, scales = torch.empty_like(rows, dtype=dtype), rows.new_empty(count, dtype=torch.float32)
    zero_point = isinstance(fmt, BlockFormat)
    data = grid_params(fmt)
    block = triton.next_power_of_2(width)
    together = 4 if block <= 256 else 1
    _quantize[(triton.cdiv(count, together),)](
        rows, codes, scales, factor, count, width, fmt.max_value, MIN_SCALE if zero_point else data.min_scale,
        data.min_normal, data.magic, unit,
        ZERO_POINT=zero_point, CLIPPED=factor is not None, ROWS=together, BLOCK=block,
        num_warps=4 if together > 1 else min(16, block // 256),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _plane(  # type: ignore[no-untyped-def]
    weight, row, k, inside, rows, width, OFFSET: tl.constexpr, BITS: tl.constexpr
):
    """Bits OFFSET … OFFSET + BITS - 1 of the codes, in place: see `formats/packing.py` for the layout."""
    part_rows = rows // (8 // BITS)
    part = row // part_rows
    byte = rows * width // 8 * OFFSET + (row - part * part_rows) * width + k
    value = tl.load(weight + byte, mask=inside, other=0)
    return ((value >> (part * BITS).to(tl.uint8)) & (2**BITS - 1)) << OFFSET


@triton.jit
def _integers(  # type: ignore[no-untyped-def]
    code, WIDTH: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr
):
    """Values of codes, signed integers of WIDTH bits, in units of the format's smallest. MANTISSA: -1 for integers."""
    if MANTISSA < 0:
        value = (code << (WIDTH - BITS)) >> (WIDTH - BITS)
    else:
        fraction = code & ((1 << MANTISSA) - 1)
        field = (code >> MANTISSA) & ((1 << (BITS - 1 - MANTISSA)) - 1)
        value = tl.where(field > 0, (fraction + (1 << MANTISSA)) << tl.maximum(field - 1, 0), fraction)
        value = tl.where((code >> (BITS - 1)) > 0, -value, value)
    return value


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, weight, scales, weight_scales, bias, out, tokens, rows, width, repeat, weight_scale_stride, unit, smallest,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block [BLOCK_M, BLOCK_N] of x [tokens, width] · weightᵀ, times both scales, plus the bias.

    The weight is on the left: only there do the units for products take what is in registers. BITS: 0 where it is no
    packed codes, but what is multiplied.
    """
    blocks = tl.cdiv(rows, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.minimum(m, tokens - 1)[None, :].to(tl.int64) * width
    row = tl.minimum(n, rows - 1)[:, None]
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if EXACT else tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + k
        across, down = (inner < width)[None, :] | EVEN, (inner < width)[:, None] | EVEN
        b = tl.load(x + token + inner[:, None], mask=down, other=0.0)
        if BITS == 0:
            a = tl.load(weight + row * width + inner[None, :], mask=across, other=0.0)
        else:
            code = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.uint8)
            if BITS & 4:
                code |= _plane(weight, row, inner[None, :], across, rows, width, 0, 4)
            if BITS & 2:
                code |= _plane(weight, row, inner[None, :], across, rows, width, BITS & 4, 2)
            if BITS & 1:
                code |= _plane(weight, row, inner[None, :], across, rows, width, BITS & 6, 1)
            if EXACT:
                a = _integers(code.to(tl.int8), 8, BITS, MANTISSA).to(tl.int8)
            else:
                a = (_integers(code.to(tl.int32), 32, BITS, MANTISSA).to(tl.float32) * smallest).to(tl.float8e4nv)
        # 0: blocks of 32 products of E4M3 are added up in float32, not in the fewer bits of the device's FP8 units.
        total = tl.dot(a, b, total, max_num_imprecise_acc=None if EXACT else 0, out_dtype=total.dtype)
    scale = tl.load(scales + tl.minimum(m, tokens - 1) // repeat)
    weight_scale = tl.load(weight_scales + tl.minimum(n, rows - 1) * weight_scale_stride) * unit
    result = tl.trans(total).to(tl.float32) * weight_scale[None, :] * scale[:, None]
    if bias is not None:
        result += tl.load(bias + tl.minimum(n, rows - 1)).to(tl.float32)[None, :]
    place = out + m[:, None].to(tl.int64) * rows + n[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(m < tokens)[:, None] & (n < rows)[None, :])


class Blocks(NamedTuple):
    """How the product is cut, and what runs a block."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def blocks_of(tokens: int, rows: int, width: int, unpacked: bool) -> Blocks:
    """The best cut of those tried on an H100, on products of DeiT-Tiny and -Base with 197, 12608 and 50432 tokens."""
    if tokens < 1024:
        return Blocks(32, 64, 64, 4, 4)
    if min(rows, width) < 512:
        return Blocks(128, 64, 64, 4, 3)
    return Blocks(128, 128, 128, 8, 3) if unpacked else Blocks(256, 64, 64, 4, 4)


def product(
    codes: Tensor, weight: Tensor, fmt: Format, scales: Tensor, weight_scale: Tensor, bias: Tensor | None,
    shape: tuple[int, int], unit: float, dtype: torch.dtype, blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """Products with a weight, `dtype` [tokens, rows].

    Args:
        codes: of the input, int8 or float8_e4m3fn [tokens, width], contiguous.
        weight: packed codes of `fmt`, uint8 [bytes], or values in the dtype of `codes` [rows, width].
        scales: of the input, float32 [n], each of tokens / n tokens in turn.
        weight_scale: float32 [rows] or [1].
        shape: (rows, width) of the weight.
        unit: on all products, beside the scales.
    """
    tokens, (rows, width) = codes.shape[0], shape
    out = codes.new_empty((tokens, rows), dtype=dtype)
    unpacked = weight.dtype == codes.dtype
    cut = blocks or blocks_of(tokens, rows, width, unpacked)
    _product[(triton.cdiv(tokens, cut.m) * triton.cdiv(rows, cut.n),)](
        codes, weight, scales, weight_scale, bias, out, tokens, rows, width,
        tokens // scales.numel(), int(weight_scale.numel() > 1), unit, fmt.smallest,
        BITS=0 if unpacked else fmt.bits, MANTISSA=-1 if fmt.is_integer else fmt.mantissa_bits,
        EVEN=width % cut.k == 0, EXACT=codes.dtype == torch.int8,
        BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=cut.k, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out
