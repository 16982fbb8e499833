"""Fake quantization: round to a format's grid and stay in floating point, gradients passing straight through.

See `quant/grid.py` for the rounding and its domain. Dtypes other than float32 are converted and back. An infinity
makes its whole scale group NaN: there is no scale for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fliqs_hf.formats import Format
from fliqs_hf.quant.grid import GridParams, grid_params, round_to_grid


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator: identity gradient inside the clipping range, zero outside; for a scale that is
    learned, round(x / s) − x / s inside and ± the largest code outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fmt: GridParams, saturate: bool, integer: bool) -> Tensor:
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
    x: Tensor, scale: Tensor, fmt: Format | GridParams, *, saturate: bool = True, integer: bool = False
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
    data = fmt if isinstance(fmt, GridParams) else grid_params(fmt)
    return _FakeQuantize.apply(x, scale, data, saturate, integer)
