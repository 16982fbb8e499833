"""Packed layers with their native kernels, and what exact products give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fliqs_hf
from fliqs_hf import Allocation, LayerFormats
from fliqs_hf.formats import BlockFormat, round_to_format
from fliqs_hf.nn import QuantizerSettings, pack_model
from fliqs_hf.nn.kernels import ENVIRONMENT, set_kernels
from fliqs_hf.nn.kinds import PackedConv2d
from fliqs_hf.nn.native import codes, compiled, int8
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.quant.block import one_sided_codes

#: Every test of kernels runs in both.
WAYS = ("eager", "compiled")
UNIT = 2.0**-24  # largest relative error of one float32 rounding


def choose_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled code, or with it; where there is no compiler, the test is skipped."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if way == "eager":
        for module in (codes, int8):
            monkeypatch.setattr(module, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("no C++ compiler")


def packed(layer: nn.Module, weight: str, activation: str | None, granularity: Any = "per_token") -> PackedLayer:
    """One layer, packed, with its native kernel allowed."""
    model = nn.Sequential(layer).eval()
    clipped = granularity == "per_token_clipped"
    if clipped:
        fliqs_hf.make_searchable(model, [weight], settings=QuantizerSettings(activation_granularity=granularity))
        with torch.no_grad():
            model[0].input_clip.fill_(-0.01)  # type: ignore[union-attr, operator]
    allocation = Allocation({"0": LayerFormats.of(weight, activation)})
    static = granularity == "static"
    pack_model(model, allocation, QuantizerSettings(activation_granularity="per_token" if static else granularity))
    set_kernels(model)
    if static:  # as after calibration
        model[0].settings = QuantizerSettings(activation_granularity="static")
        if activation not in (None, "bf16"):
            model[0].input_scale = torch.tensor([0.01])
    return model[0]  # type: ignore[return-value]


def some(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-2, 2, shape[0])[(..., *[None] * (len(shape) - 1))]


def exact(layer: PackedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer in float64 from the same codes and scales, and the bound on what a native kernel may differ by."""
    fmt = layer.formats.activation
    assert fmt is not None and layer.weight_scale is not None
    if isinstance(fmt, BlockFormat):
        conv = isinstance(layer, PackedConv2d)
        quantized, scale = one_sided_codes(x.flatten(1) if conv else x, fmt)
        quantized, scale = quantized.view_as(x).double(), scale[..., None, None] if conv else scale
    else:
        scale = codes.input_scale(layer, x)
        quantized = round_to_format(torch.div(x, scale), fmt).double()
    weight = layer.code_values().double().view(layer.weight_shape)
    shape = (1, -1, *[1] * (x.dim() - 2)) if isinstance(layer, PackedConv2d) else (-1,)
    scales = layer.weight_scale.double().expand(layer.weight_shape[0]).view(shape) * scale.double()
    if isinstance(layer, PackedConv2d):
        product = nn.functional.conv2d(quantized, weight, stride=layer.geometry["stride"]) * scales
    else:
        product = quantized @ weight.T * scales
    whole = product if layer.bias is None else product + layer.bias.double().view(shape)
    # Second-order terms are far below a millionth of the first-order ones.
    return whole, (3 * UNIT * product.abs() + UNIT * whole.abs()) * (1 + 1e-6)


def assert_exact(layer: PackedLayer, x: Tensor) -> None:
    assert layer.kernel.kernel == "int8", layer.kernel
    with torch.no_grad():
        found = layer(x)
    expected, bound = exact(layer, x)
    assert found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= bound).all())
