"""One number per layer for the scale of its input, chosen from what the layer reads on the calibration images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fliqs_hf.checks import is_number
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.quant.grid import GridParams, grid_params, round_to_grid
from fliqs_hf.quant.scale import absmax_scale, activation_scale, unit_factor

METHODS = ("absmax", "percentile", "mse")
PERCENTILE = 99.99
#: The MSE search tries absmax · 2**(-i / STEPS_PER_OCTAVE). Inputs of transformers have outliers of 50 times the rest.
STEPS_PER_OCTAVE, OCTAVES = 8, 6
#: Elements that the MSE search looks at, drawn at random: evenly spaced ones miss channels, and outliers with them.
SAMPLE = 2**18
#: Factors that are tried on the absmax scale of each token, and inputs that they are tried on.
FACTORS = tuple(1 - step / 20 for step in range(15))
TOKENS, IMAGES = 4096, 64


def static_scale(x: Tensor, fmt: Format, method: str, percentile: float = PERCENTILE) -> Tensor:
    """One scale for all of `x`, such that real value = code value × scale; what lies beyond saturates.

    Args:
        x: any shape, floating-point, finite.
        method: "absmax" (nothing saturates), "percentile" (that part of |x| does not saturate), or "mse" (least
            squared error of a sample of `x`).
        percentile: in (0, 100], of |x|.
    Returns: float32 [1], positive and finite.
    Raises: ConfigError: another method, or a percentile out of range.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"activations={method!r} does not exist; choose from {', '.join(map(repr, METHODS))}")
    check_percentile(percentile)
    data, flat = grid_params(fmt), x.detach().flatten()
    if method == "percentile":
        kept = max(1, round(flat.numel() * percentile / 100))
        flat = flat.abs().float().kthvalue(kept).values.reshape(1)
    full = absmax_scale(flat, data, None)
    return _mse(flat, full, data, fmt.is_integer) if method == "mse" else full


def clip_factor(x: Tensor, layer: nn.Module, fmt: Format) -> Tensor:
    """The factor on the absmax scales of tokens (of images in a convolution) with which the layer's output changes
    least: what lies beyond saturates, and the rest gets a finer grid.

    Args:
        x: what `layer` reads: floating-point, finite.
    Returns: float32 [1], one of `FACTORS`, the largest of equally good ones.
    Source: MSE calibration with the error taken behind the layer, as GPTQ does for weights.
    """
    kind = kind_of(layer)
    inputs, limit = kind.tokens_of(x), IMAGES if len(kind.tokens.dims) > 1 else TOKENS
    if len(inputs) > limit:
        drawn = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:limit]
        inputs = inputs[drawn.to(inputs.device)]
    inputs, data = inputs.float(), grid_params(fmt)
    weight: Tensor = kind.rows(layer, layer.weight.detach()).float()  # type: ignore[operator]
    unit = unit_factor(inputs, None), unit_factor(weight, None)
    full = activation_scale(inputs, data, kind.tokens, "per_token")
    errors = []
    for factor in FACTORS:
        error = round_to_grid(inputs, full * factor, data, saturate=True, integer=fmt.is_integer) - inputs
        change = kind.multiply(layer, error, weight, None)
        errors.append(change.mul_(unit[0]).mul_(unit[1]).square_().sum())
    return inputs.new_tensor([FACTORS[int(torch.stack(errors).argmin())]])


def check_percentile(percentile: float) -> None:
    """Raises: ConfigError: not in (0, 100]."""
    if not (is_number(percentile, 0, 100) and percentile):
        raise ConfigError(f"percentile={percentile!r}: give a number above 0 and at most 100, such as {PERCENTILE}")


def _mse(flat: Tensor, full: Tensor, data: GridParams, integer: bool) -> Tensor:
    if flat.numel() > SAMPLE:
        drawn = torch.randint(flat.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        flat = flat[drawn.to(flat.device)]
    sample, unit = flat.float(), unit_factor(flat, None)
    scales = full * 2.0 ** (-torch.arange(OCTAVES * STEPS_PER_OCTAVE, device=full.device) / STEPS_PER_OCTAVE)
    scales = scales.clamp(min=data.min_scale)
    errors = [
        (round_to_grid(sample, scale, data, saturate=True, integer=integer) - sample).mul_(unit).square_().sum()
        for scale in scales.unsqueeze(1)
    ]
    return scales[torch.stack(errors).argmin()].reshape(1)
