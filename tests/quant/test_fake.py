"""Fake quantization against the exact rounding of `formats`, and its gradients against finite arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from fliqs_hf.formats import COMMON, FloatFormat, Format, IntFormat, parse
from fliqs_hf.formats.rounding import code_values, round_to_format
from fliqs_hf.quant import IMAGE, ROW, GridParams, fake_quantize, format_table, quantize_activation, quantize_weight
from fliqs_hf.quant.grid import _CHUNK, MIN_SCALE, grid_params
from fliqs_hf.quant.scale import absmax_scale, mse_scale, weight_scale

FORMATS: list[Format] = [
    *COMMON,
    IntFormat(12),
    IntFormat(16),
    FloatFormat(5, 10),
    FloatFormat(4, 7),
    FloatFormat(2, 13),
]
ONE = torch.ones(1)


def probes(fmt: Format) -> torch.Tensor:
    """Every value, every midpoint of two neighbours, and the float32 neighbours of both, also beyond the range."""
    values = code_values(fmt).unique()
    values = values[values.isfinite() & (values.abs() < 2.0**111)]  # the documented domain of unscaled BF16
    points = torch.cat([values, (values[1:].double() + values[:-1].double()).div(2).float(), values * 1.5])
    infinity = torch.tensor(math.inf)
    points = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])
    return points[points.abs() < 2.0**111]


def expected(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    return round_to_format(x, fmt) + 0.0  # fake quantization gives +0 for -0, as documented


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("as_data", [False, True], ids=["numbers", "tensors"])
def test_equals_exact_rounding(fmt: Format, as_data: bool) -> None:
    x = probes(fmt)
    data = GridParams(*format_table([fmt])[0].unbind()) if as_data else fmt
    for integer in {False, fmt.is_integer}:
        result = fake_quantize(x, ONE, data, integer=integer)
        assert torch.equal(result.view(torch.int32), expected(x, fmt).view(torch.int32))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bfloat16_input(fmt: Format) -> None:
    x = probes(fmt).bfloat16().unique()
    x = x[x.abs() < 2.0**111]
    result = fake_quantize(x, ONE, fmt)
    assert result.dtype is torch.bfloat16
    # Rounded to the format first, then to bfloat16: the second rounding matters for formats with more digits.
    assert torch.equal(result, expected(x.float(), fmt).bfloat16())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_chunks_change_nothing(fmt: Format) -> None:
    x = torch.randn(5, _CHUNK // 512, 300, generator=torch.Generator().manual_seed(0)) * 3
    whole = quantize_activation(x, fmt, ROW)
    parts = torch.stack([quantize_activation(part[:999], fmt, ROW) for part in x])
    assert torch.equal(whole[:, :999], parts)


def test_scales_against_the_definition() -> None:
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    largest = weight.abs().flatten(1).amax(1)
    for name in ("int4", "e2m1"):
        fmt = parse(name)
        scale = weight_scale(weight, grid_params(fmt), "per_channel", "absmax")
        assert torch.equal(scale, (largest / torch.tensor(fmt.max_value)).view(6, 1, 1, 1))
        assert torch.equal(quantize_weight(weight, fmt), expected(weight / scale, fmt) * scale)
        one = weight_scale(weight, grid_params(fmt), "per_tensor", "absmax")
        assert one.shape == (1, 1, 1, 1) and float(one) == float(largest.amax() / torch.tensor(fmt.max_value))


@pytest.mark.parametrize("name", ["int2", "int4", "e2m1", "e4m3"])
def test_absmax_scaling_clips_nothing(name: str) -> None:
    """The largest value of each token lands on the largest code, whatever rounding does to the scale."""
    x = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 20000)[:, None]
    units = quantize_activation(x, parse(name), ROW) / (x.abs().amax(-1, keepdim=True) / parse(name).max_value)
    assert torch.allclose(
        units.abs().amax(-1), torch.tensor(parse(name).max_value), rtol=1e-6
    )  # two float32 roundings


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "e2m1"])
def test_mse_scale_is_better_than_absmax(name: str) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    error = [
        (quantize_weight(weight, parse(name), method=method) - weight).square().sum() for method in ("absmax", "mse")
    ]
    assert error[1] < error[0]
    # and no candidate scale of an independent, finer grid is better by more than the grid's own step can explain
    fmt, full = parse(name), weight.abs().amax(1, keepdim=True) / parse(name).max_value
    finer = [
        (expected((weight / (full * f)).float(), fmt) * full * f - weight).square().sum(1)
        for f in torch.linspace(0.2, 1, 400)
    ]
    assert error[1] <= torch.stack(finer).amin(0).sum() * 1.02


def test_a_token_does_not_depend_on_its_batch() -> None:
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 100, 1000]).view(
        4, 1, 1
    )
    together = quantize_activation(x, parse("int4"), ROW)
    assert torch.equal(together[:1], quantize_activation(x[:1], parse("int4"), ROW))
    images = x.view(4, 1, 5, 16)
    together = quantize_activation(images, parse("e2m1"), IMAGE)
    assert torch.equal(together[2:3], quantize_activation(images[2:3], parse("e2m1"), IMAGE))
    per_tensor = quantize_activation(x, parse("int4"), ROW, "per_tensor")
    assert not torch.equal(per_tensor[:1], quantize_activation(x[:1], parse("int4"), ROW, "per_tensor"))


def test_gradient_is_one_inside_and_zero_outside_the_clipping_range() -> None:
    fmt = parse("int3")  # codes -3 ... 3
    x = torch.tensor([-4.0, -3.1, -3.0, -0.2, 0.0, 2.7, 3.0, 3.2], requires_grad=True)
    scale = torch.tensor([2.0])
    fake_quantize(x * 2, scale, fmt).backward(torch.arange(1.0, 9.0))
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * torch.tensor([0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]))


def test_absmax_gradient_is_the_identity_and_saves_nothing() -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(3, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = quantize_activation(x, parse("e2m1"), ROW)
    y.backward(grad := torch.randn(3, 7))
    assert torch.equal(x.grad, grad) and not saved


@pytest.mark.parametrize("name", ["int3", "e2m1", "e4m3"])
def test_gradients_of_a_learned_scale(name: str) -> None:
    """Against autograd through the published form: codes are clamp(x / s) with their rounding taken as a constant."""
    torch.manual_seed(0)
    fmt, x, weights = parse(name), torch.randn(6, 40), torch.randn(6, 40)
    limit = fmt.max_value
    scale = (x.abs().amax(1, keepdim=True) / limit * torch.linspace(0.4, 1.1, 6)[:, None]).requires_grad_()
    ours, ours_scale = x.clone().requires_grad_(), scale.detach().clone().requires_grad_()
    (fake_quantize(ours, ours_scale, fmt) * weights).sum().backward()
    inputs = x.clone().requires_grad_()
    codes = (inputs / scale).clamp(-limit, limit)
    codes = codes + (round_to_format(codes.detach(), fmt) - codes).detach()
    (codes * scale * weights).sum().backward()
    assert ours.grad is not None and ours_scale.grad is not None and scale.grad is not None
    assert torch.equal(ours.grad == 0, inputs.grad == 0) and (ours.grad == 0).any()
    torch.testing.assert_close(ours.grad, inputs.grad)
    torch.testing.assert_close(ours_scale.grad, scale.grad, rtol=1e-4, atol=1e-4)  # sums of 40 in another order


def test_zeros_nan_and_infinity() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 2.0, -4.0]])
    for fmt in COMMON:
        result = quantize_activation(x, fmt, ROW)
        assert torch.equal(result[0].view(torch.int32), torch.zeros(3, dtype=torch.int32))  # +0
        assert result[1].isnan().any() and result[2].isnan().any()  # not silently a number
        assert result[3].isfinite().all()


def test_tiny_values_do_not_divide_by_zero() -> None:
    x = torch.full((1, 4), MIN_SCALE * 3.2)
    assert torch.equal(quantize_activation(x, parse("int8"), ROW), torch.full((1, 4), MIN_SCALE * 3))
    assert torch.equal(quantize_activation(torch.full((1, 4), 1e-45), parse("e2m1"), ROW), torch.zeros(1, 4))


def test_compiled_fake_quantization_is_the_same_and_never_recompiles() -> None:
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(lambda x, data: quantize_activation(x, data, ROW), backend=count, fullgraph=True)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for row, fmt in zip(format_table(COMMON), COMMON, strict=True):
        assert torch.equal(compiled(x, GridParams(*row.unbind())), quantize_activation(x, fmt, ROW))
    assert graphs == 1


@pytest.mark.parametrize("name", ["int2", "int4", "e2m1", "e4m3"])
def test_mse_scale_is_the_best_of_forty_fractions(name: str) -> None:
    """Of 1 down to above 0.2 of the absmax scale; where a few values are far out, the least are the best."""
    x = torch.randn(6, 400, generator=torch.Generator().manual_seed(0))
    x[:, :2] *= torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 64.0])[:, None]
    fmt, data = parse(name), grid_params(parse(name))
    scales = torch.stack([absmax_scale(x, data, (1,)) * (1.0 - 0.8 * step / 40) for step in range(40)])
    errors = torch.stack([(fake_quantize(x, scale, fmt) - x).square().sum(1, keepdim=True) for scale in scales])
    assert torch.equal(mse_scale(x, data, (1,)), scales.gather(0, errors.argmin(0, keepdim=True))[0])
