"""Fake quantization: round to a format's grid and stay in floating point, gradients passing straight through.

The rounding reads 2**floor(log2 |y|) off the exponent bits of y = x / scale, raises it to the smallest normal number
of the format, p, and rounds to a multiple of p * 2**-m by adding and subtracting K * p with K = 1.5 * 2**(23 - m):
the float32 adder then rounds half to even at exactly that bit. Integers are the case of one binade, so the same
arithmetic serves every format, with no branch and no host synchronisation.

Domain: float32 (other dtypes are converted and back), |y| * K below the float32 maximum, which always holds after
absmax scaling; unscaled BF16 is exact up to 2**111, and up to 2**104 where it is compiled for a CPU. Zeros come out
as +0. NaN propagates, and an infinity makes its whole scale group NaN: there is no scale for it.
`formats.round_to_format` is the exact routine without limits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fliqs_hf.formats import Format
from fliqs_hf.quant.scale import (
    ActivationGranularity,
    FormatData,
    ScaleMethod,
    WeightGranularity,
    activation_scale,
    format_data,
    weight_scale,
)

EXPONENT_MASK = 0x7F800000
_CHUNK = 2**20  # elements


def round_to_grid(x: Tensor, scale: Tensor, fmt: FormatData, saturate: bool, integer: bool = False) -> Tensor:
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
    x: Tensor, scale: Tensor, fmt: FormatData, saturate: bool, integer: bool, out: Tensor, scratch: Tensor | None
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


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator: identity gradient inside the clipping range, zero outside; for a scale that is
    learned, round(x / s) − x / s inside and ± the largest code outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fmt: FormatData, saturate: bool, integer: bool) -> Tensor:
        rounded = round_to_grid(x.float(), scale, fmt, saturate, integer).to(x.dtype)
        ctx.saturate = saturate
        if saturate:
            learned = (rounded, scale) if ctx.needs_input_grad[1] else ()
            ctx.save_for_backward(x, scale * fmt.max_value, *learned)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if not ctx.saturate:
            return grad, None, None, None, None
        x, bound, *learned = ctx.saved_tensors
        outside, by_scale = x.abs() > bound, None
        if learned:
            rounded, scale = learned
            change = rounded.float() - x.float().masked_fill(outside, 0)
            by_scale = change.mul_(grad).sum_to_size(scale.shape) / scale
        return grad.masked_fill(outside, 0), by_scale, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, fmt: Format | FormatData, *, saturate: bool = True, integer: bool = False
) -> Tensor:
    """Round `x` to the grid `fmt` × `scale`, passing gradients straight through.

    Ties go to even; overflow saturates and gets no gradient; NaN propagates; zeros come out as +0.

    Args:
        x: any shape, float32 or bfloat16 (computed in float32).
        scale: float32, broadcasts to `x`, positive; real value = code value × scale. Gets a gradient where it asks for
            one and `saturate` is set.
        fmt: a format, or its numbers on the device of `x` where the format changes from step to step.
        saturate: False skips the clamp and its mask: right only where `scale` is an absmax scale of `x`.
        integer: True where `fmt` is known to be an integer format: saves two passes over memory.
    Returns: shape and dtype of `x`.
    Source: straight-through estimator, Bengio et al. 2013; formats as in FLIQS (Dotzel et al. 2024), section 3; the
        gradient of the scale: LSQ, Esser et al. 2020, equation 3.
    """
    data = fmt if isinstance(fmt, FormatData) else format_data(fmt)
    return _FakeQuantize.apply(x, scale, data, saturate, integer)


def quantize_weight(
    weight: Tensor,
    fmt: Format | FormatData,
    granularity: WeightGranularity = "per_channel",
    method: ScaleMethod = "absmax",
    integer: bool = False,
) -> Tensor:
    """Fake-quantize a weight [out, ...] with its own scale. Shape and dtype of `weight`."""
    data = fmt if isinstance(fmt, FormatData) else format_data(fmt)
    scale = weight_scale(weight.detach(), data, granularity, method)
    return fake_quantize(weight, scale, data, saturate=method != "absmax", integer=integer)


def quantize_activation(
    x: Tensor,
    fmt: Format | FormatData,
    kind: str,
    granularity: ActivationGranularity = "per_token",
    integer: bool = False,
) -> Tensor:
    """Fake-quantize a layer input with its own absmax scale. Shape and dtype of `x`.

    Args:
        kind: "linear" or "conv2d", the layer that reads `x`: it says what one token is.
    """
    data = fmt if isinstance(fmt, FormatData) else format_data(fmt)
    scale = activation_scale(x.detach(), data, kind, granularity)
    return fake_quantize(x, scale, data, saturate=False, integer=integer)
