"""Rounding to a grid: a format's values times a scale, with the format as a few numbers.

The rounding reads 2**floor(log2 |y|) off the exponent bits of y = x / scale, raises it to the smallest normal number
of the format, p, and rounds to a multiple of p * 2**-m by adding and subtracting K * p with K = 1.5 * 2**(23 - m):
the float32 adder then rounds half to even at exactly that bit. Integers are the case of one binade, so the same
arithmetic serves every format, with no branch and no host synchronisation.

Domain: float32, |y| * K below the float32 maximum, which always holds after absmax scaling; unscaled BF16 is exact up
to 2**111, and up to 2**104 where it is compiled for a CPU. Zeros come out as +0. NaN propagates.
`formats.round_to_format` is the exact routine without limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fliqs_hf.formats import Format

EXPONENT_MASK = 0x7F800000
_CHUNK = 2**20  # elements

#: Smallest scale. Data whose maximum lies below `max_value * 2**-100` rounds to a grid of this step, so that an
#: all-zero channel gives zeros instead of 0/0, and no scale is a float32 subnormal.
MIN_SCALE = 2.0**-100


class GridParams(NamedTuple):
    """A format as numbers: floats where it is fixed, 0-dimensional float32 tensors where it changes from step to step,
    so that a change touches data and not the graph. Both give the same bits.

    See `formats/plain.py` for the rounding that `min_normal` and `magic` describe.
    """

    min_normal: Tensor | float  # 2**min_exponent: below it the grid is uniform
    magic: Tensor | float  # K = 1.5 * 2**(23 - mantissa_bits): adding and subtracting K*p rounds to p * 2**-m
    max_value: Tensor | float
    min_scale: Tensor | float  # bounds on the scale: both 1 for a format that is used unscaled (BF16)
    max_scale: Tensor | float


def format_row(fmt: Format) -> list[float]:
    """The numbers of `GridParams` for `fmt`."""
    bounds = [MIN_SCALE, float("inf")] if fmt.is_scaled else [1.0, 1.0]
    return [2.0**fmt.min_exponent, 1.5 * 2.0 ** (23 - fmt.mantissa_bits), fmt.max_value, *bounds]


def format_table(formats: Sequence[Format]) -> Tensor:
    """`GridParams` of several formats, [formats, 5], float32. A row unpacks as `GridParams(*row.unbind())`."""
    return torch.tensor([format_row(fmt) for fmt in formats], dtype=torch.float32)


def grid_params(fmt: Format) -> GridParams:
    min_normal, magic, max_value, min_scale, max_scale = format_row(fmt)
    return GridParams(min_normal, magic, max_value, min_scale, max_scale)


def round_to_grid(x: Tensor, scale: Tensor, fmt: GridParams, saturate: bool, integer: bool = False) -> Tensor:
    """`round(x / scale) * scale` without autograd.

    Args:
        x: float32.
        scale: float32, broadcasts to `x`; real value = code value * scale.
        saturate: clamp at ±max_value; not needed where `scale` is the absmax scale.
        integer: promise that `fmt` is an integer format, whose p is constant: two passes less.
    Returns: float32, the shape of `x`, a new tensor.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= _CHUNK:  # no guard on the size if so
        return _round(x, scale, fmt, saturate, integer, torch.empty_like(x), None)
    # Flat chunks share one small scratch buffer. A second temporary of the size of `x` costs more in page faults
    # than all the arithmetic (measured: 11 passes over memory without chunks, 4 with).
    rows, scales = (
        x.reshape(-1, x.shape[-1]),
        scale.expand(*x.shape[:-1], scale.shape[-1]).reshape(-1, scale.shape[-1]),
    )
    step = max(1, _CHUNK // rows.shape[1])
    out, scratch = torch.empty_like(rows), torch.empty(step, rows.shape[1], dtype=torch.int32)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        _round(rows[part], scales[part], fmt, saturate, integer, out[part], scratch)
    return out.view(x.shape)


def _round(
    x: Tensor, scale: Tensor, fmt: GridParams, saturate: bool, integer: bool, out: Tensor, scratch: Tensor | None
) -> Tensor:
    """`round_to_grid` of one chunk into `out`; `scratch` (int32) holds p if it is given."""
    y = torch.div(x, scale, out=out)
    if saturate:
        y.clamp_(-fmt.max_value, fmt.max_value)  # type: ignore[arg-type]
    if integer:
        offset = fmt.min_normal * fmt.magic
        return y.add_(offset).sub_(offset).mul_(scale)
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        power = leading_power(y)
    else:
        bits = y.view(torch.int32)
        exponent = torch.bitwise_and(bits, EXPONENT_MASK, out=None if scratch is None else scratch[: y.shape[0]])
        power = exponent.view(torch.float32)
    p = power.clamp_(min=fmt.min_normal).mul_(fmt.magic)
    return y.add_(p).sub_(p).mul_(scale)


def leading_power(y: Tensor) -> Tensor:
    """2**floor(log2 |y|) of float32 below 2**104 without looking at bits: a compiler for CPUs (Inductor of torch 2.13)
    reinterprets them element by element, which takes ten times as long as all else. Every operation must be rounded:
    it would be wrong with fused multiply-add, which Inductor leaves out on CPUs but not on GPUs.

    Source: Rump, Zimmermann, Boldo, Melquiond 2009, "Computing predecessor and successor in rounding to nearest",
        algorithm 3.5 (unit in the first place).
    """
    q = y * (2.0**23 + 1)
    return (q - q * (1 - 2.0**-24)).abs_()
