"""Multiply-accumulates of weights that no format reaches, worked out by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from fliqs_hf import Allocation
from fliqs_hf.baselines.allocations import manual, uniform
from fliqs_hf.cost import CostTable, Target, bops, trace_layers, unlisted_bytes, weight_bytes
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.nn import make_searchable, pack_model
from fliqs_hf.selection import SearchSpace
from tests.helpers.models import tiny


class Standardized(nn.Conv2d):
    """As in BiT: a convolution whose weight is normalized at every pass."""

    def forward(self, input: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        )
        return functional.conv2d(input, weight.reshape_as(self.weight), self.bias)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Bare(nn.Module):
    """Parameters that belong to no layer, multiplied with [batch, 6, 4]."""

    def __init__(self, multiply: Callable[[Bare, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.multiply = multiply
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self, x)


class Reader(nn.Module):
    """Computes with a layer's weight in a way that its source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.k
        return functional.linear(x, layer.weight, layer.bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


def old_norm(make: Callable[..., Any], layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning) if make is nn.utils.weight_norm else Nothing():
        return make(layer)


class Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


#: model, shape of the input of one image, layer -> MACs per image
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "standardized": (lambda: Standardized(2, 3, 2), (2, 5, 4), {"0": 4 * 3 * 3 * 2 * 4}),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3), {"0": 3 * 8 * 2 * 8}),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 2, stride=2), (4, 8), {"0": 4 * 8 * 6 * 2}),
    "bilinear": (lambda: Bare(lambda m, x: functional.bilinear(x, x, m.w), w=(3, 4, 4)), (6, 4), {"0.w": 6 * 3 * 16}),
    # four gates, from the input and from the state
    "lstm": (Recurrent, (6, 4), {"0.lstm.weight_ih_l0": 6 * 4 * 5 * 4, "0.lstm.weight_hh_l0": 6 * 4 * 5 * 5}),
    "einsum": (lambda: Bare(lambda m, x: torch.einsum("bnc,kc->bnk", x, m.w), w=(5, 4)), (6, 4), {"0.w": 6 * 5 * 4}),
    "matmul": (lambda: Bare(lambda m, x: x @ m.w, w=(4, 5)), (6, 4), {"0.w": 6 * 5 * 4}),
    "vector": (lambda: Bare(lambda m, x: x @ m.w, w=(4,)), (6, 4), {"0.w": 6 * 4}),
    "transformed": (lambda: Bare(lambda m, x: x @ m.w.t().exp(), w=(5, 4)), (6, 4), {"0.w": 6 * 5 * 4}),
    # The weight itself is a product, 4 × 2 × 4, of the larger of two equal parameters: the first.
    "low rank": (lambda: Bare(lambda m, x: x @ (m.a @ m.b), a=(4, 2), b=(2, 4)), (6, 4), {"0.a": 6 * 16 + 32}),
    "parametrized": (lambda: parametrized(nn.Linear(4, 3)), (6, 4), {"0": 6 * 12}),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 1)), (2, 5, 4), {"0": 20 * 6}),
    "old weight norm": (lambda: old_norm(nn.utils.weight_norm, nn.Linear(4, 3)), (6, 4), {"0": 6 * 12}),
    # and 12 + 3 for the singular value
    "old spectral norm": (lambda: old_norm(nn.utils.spectral_norm, nn.Linear(4, 3)), (6, 4), {"0": 6 * 12 + 15}),
    "read": (Reader, (6, 4), {"0.k": 6 * 12}),
    "attention scores": (lambda: Bare(lambda m, x: functional.softmax(x @ x.mT, -1) @ x), (6, 4), {}),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name: str, device: str) -> None:
    make, shape, expected = CASES[name]
    model = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.rand(1, *shape))  # makes the last layer
    model.to(device)
    *rest, last = trace_layers(model, torch.zeros(1, *shape, device=device))
    assert {layer.name: layer.macs for layer in rest} == expected
    assert last.name == "2" and last.quantizable and not any(layer.quantizable for layer in rest)


class Pooling(nn.Module):
    """Attention of a learned token, as SigLIP pools: its projections are layers, its scores are not."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.rand(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.probe.expand(len(x), -1, -1), x, x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_attention(batch: int) -> None:
    """Its fast path, one operation that hides all others, is not taken."""
    layers = trace_layers(Pooling().eval(), torch.zeros(batch, 6, 4))
    assert {layer.name: layer.macs for layer in layers} == {
        "attention.in_proj_weight": (1 + 6 + 6) * 16, "attention.out_proj": 16
    }  # fmt: skip
    assert torch.backends.mha.get_fastpath_enabled()
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    whole = trace_layers(block, torch.zeros(batch, 6, 4))
    assert sum(layer.macs for layer in whole) == 6 * (4 * 16 + 2 * 32)


def test_searchable_and_packed_models_cost_the_same() -> None:
    model = nn.Sequential(
        Standardized(2, 3, 2), nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 1), Standardized(2, 2, 1)
    )
    x = torch.zeros(1, 2, 5, 4)
    layers = trace_layers(model, x)
    assert [layer.kind for layer in layers] == ["fp32", "conv2d", "conv_transpose2d", "fp32"]
    make_searchable(model, ["int4"])
    assert trace_layers(model, x) == layers
    pack_model(model, Allocation.uniform(["1", "2"], "int4"))
    assert trace_layers(model, x) == layers


def test_they_are_in_every_cost_and_in_no_space(caplog: pytest.LogCaptureFixture) -> None:
    config = hf.BitConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], num_groups=4, num_labels=5
    )
    model = hf.BitForImageClassification(config)
    with caplog.at_level(logging.WARNING, logger="fliqs_hf.cost"):
        layers = trace_layers(model, torch.zeros(1, 3, 32, 32))
    assert "99.9 % of the multiply-accumulates of BitForImageClassification stay in fp32" in caplog.text
    rest = sum(layer.macs for layer in layers if not layer.quantizable)
    head = 64 * 5
    assert rest + head == sum(layer.macs for layer in layers)
    space = SearchSpace(layers, ["int4", "int8"])
    table = CostTable(layers, space.formats)
    assert [layer.name for layer in space.layers] == [layer.name for layer in table.layers] == ["classifier.1"]
    four = Allocation.uniform(["classifier.1"], "int4")
    assert table.fixed_cost == rest * 1024
    assert bops(layers, four) == table.of(four) == rest * 1024 + head * 16
    assert Target.of(target_bits=4).resolve(table) == rest * 1024 + head * 16
    assert uniform(layers, "int4") == four and list(manual(layers)) == ["classifier.1"]
    with pytest.raises(AllocationError, match=r"'bit.embedder.convolution', which stays in fp32"):
        bops(layers, Allocation.uniform([layer.name for layer in layers], "int4"))
    for refused in (lambda: CostTable(layers[:-1], ["int4"]), lambda: SearchSpace(layers[:-1], ["int4"])):
        with pytest.raises(ConfigError, match="at least one layer that can be quantized"):
            refused()
    # Their bytes are among those of everything else, whatever they are made of.
    state = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert weight_bytes(layers, {}, other_bytes=unlisted_bytes(model, layers)) == state


def test_a_model_of_linear_layers_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fliqs_hf.cost"):
        trace_layers(tiny("siglip"))
    assert "stay in fp32" not in caplog.text
