"""Static input scales against their definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import COMMON, parse
from fliqs_hf.ptq import static_scale
from fliqs_hf.ptq.ranges import clip_factor
from fliqs_hf.quant import fake_quantize
from fliqs_hf.quant.grid import grid_params
from fliqs_hf.quant.scale import mse_scale

SCALED = [fmt for fmt in COMMON if fmt.is_scaled]


def inputs(count: int = 20_000) -> torch.Tensor:
    """Mostly near 1, one in a thousand 50 times that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    x[::1000] *= 50
    return x


@pytest.mark.parametrize("fmt", SCALED, ids=str)
def test_absmax_saturates_nothing(fmt: Any) -> None:
    scale = static_scale(inputs(), fmt, "absmax")
    assert torch.equal(scale, (inputs().abs().max() / torch.tensor(fmt.max_value)).reshape(1).float())


@pytest.mark.parametrize("fmt", SCALED, ids=str)
def test_mse_is_the_least_of_its_candidates(fmt: Any) -> None:
    x = inputs()

    def error(scale: torch.Tensor) -> float:
        return float((fake_quantize(x, scale, fmt) - x).square().sum())

    absmax, best = static_scale(x, fmt, "absmax"), static_scale(x, fmt, "mse")
    candidates = [absmax * 2.0 ** (-i / 8) for i in range(48)]
    # float32 sums: candidates that are as good as equal may change places
    assert error(best) <= min(map(error, candidates)) * (1 + 1e-5)
    assert error(static_scale(x, fmt, "mse")) <= error(absmax)


@pytest.mark.parametrize("size", [2.0**-73, 2.0**66, 2.0**100])
@pytest.mark.parametrize("fmt", ["int3", "int4", "e2m1"])
def test_least_squares_do_not_depend_on_the_size_of_the_values(size: float, fmt: str) -> None:
    """Squares of values around 1e-22 and 1e20 are 0 and infinite in float32: then every candidate is as good."""
    x, data = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)), grid_params(parse(fmt))
    found = static_scale(x, parse(fmt), "mse")
    assert found < static_scale(x, parse(fmt), "absmax")
    assert torch.equal(static_scale(x * size, parse(fmt), "mse"), found * size)
    assert torch.equal(mse_scale(x * size, data, (1,)), mse_scale(x, data, (1,)) * size)
    layer = nn.Linear(128, 8)
    layer.weight.data = x[:8].clone()
    for inner, outer in ((size, 1.0), (1.0, size)):
        again = copy.deepcopy(layer)
        again.weight.data *= outer
        assert torch.equal(clip_factor(x * inner, again, parse(fmt)), clip_factor(x, layer, parse(fmt)))
    assert clip_factor(x, layer, parse(fmt)) < 1


def test_mse_clips_outliers_of_coarse_grids() -> None:
    x, fmt = torch.randn(20_000, generator=torch.Generator().manual_seed(0)), parse("int4")
    x[0] = 100  # clipped to a few units it costs half of the squares of all others, kept it rounds them all to zero
    assert static_scale(x, fmt, "mse") < static_scale(x, fmt, "absmax") / 2


def test_mse_sees_every_channel_of_a_large_input() -> None:
    x = torch.randn(128, 64, 192, generator=torch.Generator().manual_seed(0))
    x[..., 1] *= 50  # of 192 channels; most of the squares are there
    assert static_scale(x, parse("int8"), "mse") > static_scale(x, parse("int8"), "absmax") / 2


@pytest.mark.parametrize(("percentile", "kept"), [(100, 1000), (99.9, 999), (50, 500), (0.1, 1), (1e-6, 1)])
def test_percentile_keeps_that_part(percentile: float, kept: int) -> None:
    x = torch.arange(-1000, 0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))].float()
    scale = static_scale(x, parse("int8"), "percentile", percentile)
    assert torch.equal(scale, torch.tensor([kept / torch.tensor(127.0)]))


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_scale_is_positive_where_all_is_zero(method: str) -> None:
    scale = static_scale(torch.zeros(8), parse("int4"), method)
    assert scale.shape == (1,) and scale.dtype == torch.float32 and bool((scale > 0) & scale.isfinite())


def test_shape_and_dtype_of_the_input_do_not_matter() -> None:
    x = inputs(24).bfloat16()
    for method in ("absmax", "percentile", "mse"):
        flat = static_scale(x.float(), parse("e2m1"), method)
        assert torch.equal(static_scale(x.view(2, 3, 4), parse("e2m1"), method), flat)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="activations='max'"):
        static_scale(torch.ones(2), parse("int4"), "max")
    for percentile in (0.0, -1.0, 101.0, float("nan")):
        with pytest.raises(ConfigError, match="percentile="):
            static_scale(torch.ones(2), parse("int4"), "percentile", percentile)
