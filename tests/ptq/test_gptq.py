"""GPTQ against a naive implementation of its own, and against rounding to nearest."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.formats import COMMON, parse
from fliqs_hf.formats.rounding import code_values
from fliqs_hf.nn import PackedLinear, QuantizerSettings
from fliqs_hf.ptq import gptq_round, input_hessian
from fliqs_hf.ptq.gptq import SCALE_FACTORS, gptq_round_scaled
from fliqs_hf.quant import quantize_weight
from fliqs_hf.quant.grid import grid_params
from fliqs_hf.quant.scale import weight_scale

FORMATS = ["int2", "int4", "int8", "e2m1", "e2m3", "e4m3"]


def problem(seed: int, rows: int = 6, columns: int = 150) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns], more columns than a block, and correlated inputs [500, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3
    return (
        torch.randn(rows, columns, generator=generator),
        torch.randn(500, columns, generator=generator) @ mixing * torch.rand(columns, generator=generator),
    )


def hessian_of(x: Tensor) -> Tensor:
    return input_hessian(nn.Linear(x.shape[-1], 1), x)


def scale_of(weight: Tensor, name: str, method: str = "mse", granularity: str = "per_channel") -> Tensor:
    return weight_scale(weight, grid_params(parse(name)), granularity, method)  # type: ignore[arg-type]


def naive(weight: Tensor, scale: Tensor, name: str, hessian: Tensor, damping: float) -> NDArray[np.float64]:
    """Optimal brain quantization in a fixed order: the inverse of what is left of the Hessian anew for each column."""
    grid = code_values(parse(name)).numpy().astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    w, h, s = weight.double().numpy().copy(), hessian.double().numpy(), scale.double().numpy()
    h = h + damping * h.diagonal().mean() * np.eye(len(h))
    result = np.zeros_like(w)
    remaining = sorted(range(len(h)), key=lambda j: -h[j, j])
    while remaining:
        j, *remaining = remaining
        inverse = np.linalg.inv(h[np.ix_([j, *remaining], [j, *remaining])])
        result[:, j] = grid[np.abs(w[:, j, None] / s - grid).argmin(1)] * s[:, 0]
        w[:, remaining] -= np.outer((w[:, j] - result[:, j]) / inverse[0, 0], inverse[0, 1:])
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_naive_implementation(name: str) -> None:
    weight, x = problem(0)
    scale, hessian = scale_of(weight, name), hessian_of(x)
    expected = naive(weight, scale, name, hessian, 0.01)
    # Values of the grid times the scale, rounded to float32 once here and not there: the codes are the same.
    np.testing.assert_allclose(gptq_round(weight, scale, parse(name), hessian).double(), expected, rtol=2**-23)
    assert (gptq_round(weight, scale, parse(name), hessian) != quantize_weight(weight, parse(name))).any()


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("name", [fmt.name for fmt in COMMON])
def test_uncorrelated_inputs_give_rounding_to_nearest(name: str, method: str, granularity: str) -> None:
    weight, _ = problem(1)
    nearest = quantize_weight(weight, parse(name), granularity, method)  # type: ignore[arg-type]
    scale = scale_of(weight, name, method, granularity)
    for diagonal in (torch.ones(150), torch.linspace(0, 7, 150), torch.zeros(150)):
        rounded = gptq_round(weight, scale, parse(name), diagonal.diag())
        assert torch.equal(rounded.view(torch.int32), nearest.view(torch.int32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_output_error_is_below_that_of_nearest(name: str, seed: int) -> None:
    weight, x = problem(seed)
    scale = scale_of(weight, name)
    nearest = quantize_weight(weight, parse(name), "per_channel", "mse")
    rounded = gptq_round(weight, scale, parse(name), hessian_of(x))
    error, reference = (((weight - w).double() @ x.double().T).square().sum() for w in (rounded, nearest))
    assert error < 0.7 * reference  # correlated inputs leave much to make up for; the weights themselves are further
    assert (weight - rounded).square().sum() > (weight - nearest).square().sum()


@pytest.mark.parametrize("name", [fmt.name for fmt in COMMON])
def test_packing_keeps_the_rounded_weight_bit_for_bit(name: str) -> None:
    weight, x = problem(2)
    scale = scale_of(weight, name)
    rounded = gptq_round(weight, scale, parse(name), hessian_of(x))
    packed = PackedLinear(weight.shape, LayerFormats.of(name, None), QuantizerSettings(), None)
    packed.pack_(rounded, scale)
    assert torch.equal(packed.decoded_weight(), rounded)


def test_an_input_that_is_always_zero_changes_nothing_else() -> None:
    weight, x = problem(3)
    x[:, 7] = 0
    fmt = parse("int4")
    scale = scale_of(weight, "int4")
    rounded = gptq_round(weight, scale, fmt, hessian_of(x))
    weight[:, 7] = 0
    other = gptq_round(weight, scale, fmt, hessian_of(x))
    changed = (rounded != other).any(0)
    assert changed[7] and changed.sum() == 1


#: Inputs around 1e-22, 1e-30, 1e20 and the largest of float32: squares of them are 0 or infinite in float32.
SIZES = [2.0**-73, 2.0**-100, 2.0**66, 2.0**120]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_size_of_the_inputs_changes_no_bit(size: float, dtype: torch.dtype) -> None:
    weight, x = problem(4)
    x = x.to(dtype)
    scale, fmt, hessian = scale_of(weight, "int3"), parse("int3"), hessian_of(x)
    assert torch.equal(hessian_of(x * size), hessian * size * size)
    expected = gptq_round(weight, scale, fmt, hessian)
    assert torch.equal(gptq_round(weight, scale, fmt, hessian_of(x * size)), expected)
    for power in (-1000, 900):
        assert torch.equal(gptq_round(weight, scale, fmt, hessian * 2.0**power), expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_size_of_the_inputs_changes_no_bit_of_a_convolution(size: float) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(input_hessian(layer, x * size), input_hessian(layer, x) * size * size)


@pytest.mark.parametrize("size", [1e-22, 1e-30, 1e-42, 0.0, 1e20, 3e38])
def test_inputs_that_are_all_alike_are_rounded(size: float) -> None:
    weight, _ = problem(5)
    x = torch.full((20, 150), size)
    rounded = gptq_round(weight, scale_of(weight, "int4"), parse("int4"), hessian_of(x))
    error, nearest = (
        (weight - w).double().sum(1).abs().sum()
        for w in (rounded, quantize_weight(weight, parse("int4"), method="mse"))
    )
    # a constant input sees the sum of the weights alone, which one rounding of the last column can nearly keep
    assert error == nearest if size == 0 else error < 0.2 * nearest


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_hessian_of_a_convolution_is_that_of_its_output(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 5), bias=False, **settings).double()  # type: ignore[arg-type]
    x = torch.randn(5, 3, 8, 9, dtype=torch.float64)
    output = layer(x)
    rows = layer.weight.flatten(1)
    energy = (rows @ input_hessian(layer, x) * rows).sum(1)  # wᵀHw = 2/n · Σ output²
    expected = 2 * output.square().sum((0, 2, 3)) / output[:, 0].numel()
    torch.testing.assert_close(energy, expected, rtol=1e-5, atol=0)  # the products are summed in float32


def test_hessian_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(-8, 9, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    layers = [(nn.Conv2d(3, 4, 3, padding=1), x), (nn.Linear(8, 4), x)]
    whole = [input_hessian(*pair) for pair in layers]
    monkeypatch.setattr("fliqs_hf.ptq.gptq._CHUNK", 1)
    for pair, expected in zip(layers, whole, strict=True):
        assert torch.equal(input_hessian(*pair), expected)  # small integers: every sum is exact


@pytest.mark.parametrize("groups", [2, 4, 12])
def test_groups_have_a_hessian_each(groups: int) -> None:
    """Of a grouped convolution each part is what a convolution of its own would be, depthwise ones included."""
    torch.manual_seed(0)
    whole = nn.Conv2d(12, 24, 3, padding=1, stride=2, groups=groups)
    # Mixed channels: uncorrelated ones would leave nothing to make up for.
    x = nn.Conv2d(12, 12, 3, padding=1)(torch.randn(8, 12, 9, 9)).detach()
    weight, fmt = whole.weight.detach().flatten(1), parse("int3")
    scale, hessian = scale_of(weight, "int3"), input_hessian(whole, x)
    rounded = gptq_round(weight, scale, fmt, hessian)
    assert hessian.shape == (groups, 108 // groups, 108 // groups)
    rows, channels = 24 // groups, 12 // groups
    for group in range(groups):
        part = nn.Conv2d(channels, rows, 3, padding=1, stride=2)
        of_part = input_hessian(part, x[:, group * channels : (group + 1) * channels])
        torch.testing.assert_close(hessian[group], of_part, rtol=1e-5, atol=1e-6)  # sums of float32 products
        mine = slice(group * rows, (group + 1) * rows)
        expected = naive(weight[mine], scale[mine], "int3", hessian[group], 0.01)
        np.testing.assert_allclose(rounded[mine].double(), expected, rtol=2**-23)
    assert (rounded != quantize_weight(weight, fmt, "per_channel", "mse")).any()


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf"), 10**400, "0.1", None, True, [1]])
def test_bad_damping_is_named(damping: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"damping={damping!r}")):
        gptq_round(torch.ones(1, 2), torch.ones(1, 1), parse("int4"), torch.eye(2), damping)


def test_bad_hessians_are_named() -> None:
    weight, scale, fmt = torch.ones(1, 2), torch.ones(1, 1), parse("int4")
    with pytest.raises(DataError, match=r"\[3, 3\] and must be \[2, 2\]"):
        gptq_round(weight, scale, fmt, torch.eye(3))
    for groups in (0, 2):  # for one output channel
        with pytest.raises(DataError, match=rf"\[{groups}, 2, 2\].* groups that divide the 1 output channels"):
            gptq_round(weight, scale, fmt, torch.eye(2).expand(groups, 2, 2))
    with pytest.raises(DataError, match="NaN"):
        gptq_round(weight, scale, fmt, torch.full((2, 2), float("nan")))
    for hessian, damping in (([[1.0, 2.0], [2.0, 1.0]], 0.01), ([[1.0, 1.0], [1.0, 1.0]], 1e-17)):
        with pytest.raises(DataError, match=f"damping={damping:g}: raise it"):
            gptq_round(weight, scale, fmt, torch.tensor(hessian), damping)


def test_a_factor_whose_inverse_has_none_is_named() -> None:
    """Of 1 and some last bits; how many, depends on the library, but none may end in another error."""
    for damping in (2e-16, 5e-16, 1e-15):
        with suppress(DataError):
            assert (
                gptq_round(torch.ones(1, 300), torch.ones(1, 1), parse("int4"), torch.ones(300, 300), damping)
                .isfinite()
                .all()
            )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["int3", "e2m1"])
def test_the_scale_by_the_output_is_the_best_of_those_tried_one_by_one(name: str, groups: int) -> None:
    fmt, generator = parse(name), torch.Generator().manual_seed(5)
    weight = torch.randn(6, 10, generator=generator)
    scale = scale_of(weight, name)
    inputs = torch.randn(groups, 400, 10, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(groups, 10, 10, generator=generator, dtype=torch.float64)
    hessian = 2 * inputs.mT @ inputs / 400
    hessian = hessian if groups > 1 else hessian[0]
    found, found_scale = gptq_round_scaled(weight, scale, fmt, hessian)
    damped = hessian.view(groups, 10, 10)
    mean = damped.diagonal(dim1=1, dim2=2).mean(1)
    damped = damped + 0.01 * mean[:, None, None] * torch.eye(10, dtype=torch.float64)
    tried = [gptq_round(weight, scale * factor, fmt, hessian) for factor in SCALE_FACTORS]
    chosen = set()
    for row in range(6):
        errors = [(one[row] - weight[row]).double() for one in tried]
        costs = [float(error @ damped[row * groups // 6] @ error) for error in errors]
        best = costs.index(min(costs))
        assert torch.equal(found[row], tried[best][row])
        assert torch.equal(found_scale[row], (scale * SCALE_FACTORS[best])[row])
        chosen.add(best)
    assert len(chosen) > 1
