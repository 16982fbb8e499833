"""Scales: what one code step is worth, per channel, per token or per tensor, by absolute maximum or least squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fliqs_hf.errors import FormatError
from fliqs_hf.quant.grid import GridParams, round_to_grid
from fliqs_hf.quant.tokens import Tokens

ScaleMethod = Literal["absmax", "mse"]
WeightGranularity = Literal["per_channel", "per_tensor"]
ActivationGranularity = Literal["per_token", "per_tensor", "per_token_clipped", "static"]

#: Granularities for which a layer has a number of its own, from calibration images.
CALIBRATED = ("per_token_clipped", "static")


def absmax(x: Tensor, dims: Sequence[int] | None) -> Tensor:
    """max |x| over `dims` (kept, size 1), or over everything; float32. NaN propagates.

    Two reductions without a temporary of the size of `x`, which `x.abs().amax()` would make.
    """
    dims = tuple(range(x.dim())) if dims is None else tuple(dims)
    if torch.compiler.is_compiling():  # which makes no temporary, and fuses one reduction with what reads it
        return x.abs().amax(dims, keepdim=True).float()
    if not x.numel():  # an empty batch, of which nothing is largest
        return x.sum(dims, keepdim=True).float()
    return torch.maximum(x.amax(dims, keepdim=True), x.amin(dims, keepdim=True).neg_()).float()


def unit_factor(x: Tensor, dims: Sequence[int] | None) -> Tensor:
    """The power of two that brings max |x| over `dims` to between 1 and 2, float32; at most 2**126 either way.

    Products with it are exact, and squares of them neither overflow nor vanish: errors of values around 1e-22 or 1e20
    compare as those of the same values around 1 do.
    """
    binade = torch.bitwise_and(absmax(x, dims).view(torch.int32), 0x7F800000).view(torch.float32)
    return binade.clamp_(2.0**-126, 2.0**126).reciprocal_()


def absmax_scale(x: Tensor, fmt: GridParams, dims: Sequence[int] | None) -> Tensor:
    """Scale that maps max |x| over `dims` to the format's largest value; nothing is clipped.

    Returns: float32, the shape of `x` with `dims` reduced to 1.
    Source: FLIQS (Dotzel et al. 2024), section 3.
    """
    largest = absmax(x, dims)
    # A tensor also where it is a number: GPUs divide by a host number through its reciprocal, one bit off.
    limit = fmt.max_value if isinstance(fmt.max_value, Tensor) else largest.new_full((), fmt.max_value)
    return _bounded(largest / limit, fmt)


def _bounded(scale: Tensor, fmt: GridParams) -> Tensor:
    return torch.clamp(scale, fmt.min_scale, fmt.max_scale)  # type: ignore[arg-type]


def mse_scale(x: Tensor, fmt: GridParams, dims: Sequence[int] | None, candidates: int = 40) -> Tensor:
    """Scale with the least squared error among `candidates` fractions of the absmax scale in (0.2, 1].

    Values beyond the largest code saturate. For low-bit weights clipping a few outliers buys a finer grid.
    """
    x = x.float()
    full = absmax_scale(x, fmt, dims)
    dims = tuple(range(x.dim())) if dims is None else tuple(dims)
    best, best_error = full, torch.full_like(full, float("inf"))
    unit = unit_factor(x, dims)
    for step in range(candidates):
        scale = _bounded(full * (1.0 - 0.8 * step / candidates), fmt)
        error = (round_to_grid(x, scale, fmt, saturate=True) - x).mul_(unit).square_().sum(dims, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def weight_scale(weight: Tensor, fmt: GridParams, granularity: WeightGranularity, method: ScaleMethod) -> Tensor:
    """Scale of a weight [out, ...]: [out, 1, ...] per channel, all ones per tensor. float32.

    Raises: FormatError: unknown granularity or method.
    """
    check_choice("weight_granularity", granularity, WeightGranularity)
    check_choice("weight_scale", method, ScaleMethod)
    dims = range(1, weight.dim()) if granularity == "per_channel" else None
    return (absmax_scale if method == "absmax" else mse_scale)(weight, fmt, dims)


def activation_scale(x: Tensor, fmt: GridParams, tokens: Tokens, granularity: ActivationGranularity) -> Tensor:
    """Scale of a layer input, computed from the input itself.

    per_token: one scale for each of the `tokens`: each vector that a Linear multiplies, each image of a convolution. A
    result never depends on what else is in the batch.
    per_tensor: one scale for the whole batch, as in the paper; then results depend on how images are batched.

    Raises: FormatError: one of `CALIBRATED`, which no single input can give.
    """
    return absmax_scale(x, fmt, _activation_dims(tokens, granularity))


def clipped_scale(x: Tensor, fmt: GridParams, tokens: Tokens, factor: Tensor) -> Tensor:
    """`activation_scale` per token times `factor`, float32 [1]; 1 for a format that is used unscaled."""
    return _bounded(activation_scale(x, fmt, tokens, "per_token") * factor, fmt)


def activation_peak(x: Tensor, tokens: Tokens, granularity: ActivationGranularity) -> Tensor:
    """What `activation_scale` divides by a format's largest value: max |x| of a token, an image or everything."""
    return absmax(x, _activation_dims(tokens, granularity))


def _activation_dims(tokens: Tokens, granularity: ActivationGranularity) -> tuple[int, ...] | None:
    check_choice("activation_granularity", granularity, ActivationGranularity)
    if granularity in CALIBRATED:
        raise FormatError(f"activation_granularity={granularity!r} needs a number that fliqs_hf.ptq.calibrate finds")
    return None if granularity == "per_tensor" else tokens.dims


def check_choice(setting: str, value: object, choices: object) -> None:
    """Raises: FormatError: `value` is not one of the `choices` (a Literal)."""
    allowed = choices.__args__  # type: ignore[attr-defined]
    if value not in allowed:
        raise FormatError(f"{setting}={value!r} does not exist; choose from {', '.join(map(repr, allowed))}")
