"""Which layers can be quantized: not those whose weight is shared, computed or read by others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.nn import make_searchable, pack_model, quantizable_layers, select


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def pair(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    if kind == "parameter":
        model[1].weight = model[0].weight
    elif kind == "memory":
        model[1].weight = nn.Parameter(model[0].weight.data)
    elif kind == "module":
        model[1] = model[0]
    elif kind == "embedding":
        model.words = nn.Embedding(4, 4)
        model.words.weight = model[1].weight
    elif kind == "declared":
        model.all_tied_weights_keys = {"1.weight": "0.weight"}
        model.to("meta")
    return model


@pytest.mark.parametrize(("kind", "left"), [
    ("parameter", ["2"]), ("memory", ["2"]), ("module", ["2"]), ("embedding", ["0", "2"]), ("declared", ["2"]),
    ("none", ["0", "1", "2"]),
])  # fmt: skip
def test_tied_weights_stay_in_floating_point(kind: str, left: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = pair(kind)
    select._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fliqs_hf.nn"):
        assert list(quantizable_layers(model)) == list(quantizable_layers(model)) == left
    assert [record.message.count("its weight is that of") for record in caplog.records] == [1] * (
        len({id(module) for module in model if isinstance(module, nn.Linear)}) - len(left)
    )  # once each, not at every call
    for refused in (
        lambda: pack_model(model, Allocation.uniform(["0", "1"], "int4")),
        lambda: make_searchable(model, ["int4"], names=["0", "1"]),
    ):
        if kind != "none":
            with pytest.raises(AllocationError, match=r"'[01]', which stays in floating point: its weight is that of"):
                refused()
            assert all(type(module) in (nn.Linear, nn.Embedding) for module in model)


def test_a_tied_layer_may_be_named_in_modules_to_not_convert() -> None:
    assert list(quantizable_layers(pair("parameter"), ["1"])) == ["2"]


def spectral(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv2d(4, 4, 1)], ids=["linear", "conv2d"])
@pytest.mark.parametrize("compute", [
    lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
    parametrizations.weight_norm, parametrizations.spectral_norm,
    nn.utils.weight_norm, spectral, lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
], ids=["parametrized", "bias", "weight norm", "spectral norm", "old weight", "old spectral", "pruned"])  # fmt: skip
def test_computed_weights_stay_in_floating_point(make: Callable[[], nn.Module], compute: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Flatten(), nn.Linear(16, 2)).eval()
    compute(model[0])
    x = torch.randn(2, 4, 4) if isinstance(model[0], nn.Linear) else torch.randn(2, 4, 2, 2)
    names = list(quantizable_layers(model))
    assert names == ["2"]
    inner = model[0](x)
    traced = {layer.name: (layer.kind, layer.macs) for layer in trace_layers(model, x)}
    assert traced["0"][0] == "fp32" and traced["0"][1] >= 64 and traced["2"] == ("linear", 32)
    searchable = copy.deepcopy(model)
    make_searchable(searchable, ["int4"])
    pack_model(model, Allocation.uniform(names, "int4"))
    assert torch.equal(model(x), searchable(x)) and torch.equal(model[0](x), inner)
    with pytest.raises(AllocationError, match=r"'0', which stays in floating point: .*(anew|parametrized)"):
        make_searchable(searchable, ["int4"], names=["0"])


def test_a_forward_pass_on_the_object_would_hide_ours() -> None:
    """accelerate puts one there when it spreads a model over devices."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = model[0].forward
    assert list(quantizable_layers(model)) == ["1"]
    assert [layer.kind for layer in trace_layers(model, torch.zeros(1, 4))] == ["fp32", "linear"]


class Reader(nn.Module):
    """Uses of a weight that compute, and such that only ask."""

    def __init__(self) -> None:
        super().__init__()
        self.viewed, self.passed, self.cut, self.asked = (nn.Linear(4, 4) for _ in range(4))
        self.inner = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.block.head = nn.Linear(4, 4)
        self.filled = nn.Linear(4, 4)
        nn.init.zeros_(self.filled.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.asked.weight.dtype)
        if isinstance(self.asked.weight, Tensor) and self.asked.weight.shape[0] and self.asked.weight is not None:
            x = self.asked(x)
        x = functional.conv1d(x[..., None], self.viewed.weight.unsqueeze(-1), self.viewed.bias)[..., 0]
        x = functional.linear(x, self.passed.weight) + x @ self.cut.weight[:, :4] + x @ self.block.head.weight
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return self.filled(self.block(self.inner["a"](x)))


def test_a_weight_that_other_code_computes_with_stays_in_floating_point() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Reader())
    names = ["0.asked", "0.inner.a", "0.block.0", "0.filled"]
    assert sorted(quantizable_layers(model)) == sorted(names)
    x = torch.randn(2, 4)
    kinds = {layer.name: layer.kind for layer in trace_layers(model, x)}
    assert {name for name, kind in kinds.items() if kind == "fp32"} == {
        "0.viewed", "0.passed", "0.cut", "0.block.head"
    }  # fmt: skip
    searchable = copy.deepcopy(model)
    make_searchable(searchable, ["int4"])
    pack_model(model, Allocation.uniform(names, "int4"))
    assert torch.equal(model(x), searchable(x))


class HiddenReader(nn.Module):
    """Reads a weight in a way that its source does not show."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.k, self.product = nn.Linear(4, 4), product

    def forward(self, x: Tensor) -> Tensor:
        layer = self.k
        return self.product(x.to(layer.weight.dtype), layer.weight)


@pytest.mark.parametrize("product", [
    functional.linear, lambda x, w: x @ w, lambda x, w: torch.einsum("bi,ki->bk", x, w), torch.mm,
    lambda x, w: functional.conv1d(x[..., None], w.unsqueeze(-1)), lambda x, w: (w.t() @ x.t()).t(),
    lambda x, w: torch.addmm(torch.zeros(4), x, w.mul(2)), lambda x, w: w.detach().matmul(x.t()),
], ids=["linear", "@", "einsum", "mm", "convolution", "transposed", "addmm", "matmul"])  # fmt: skip
def test_a_hidden_product_with_a_weight_is_found_or_refused(product: Any) -> None:
    """Tracing finds it, so a search leaves the layer alone; who packs it untraced gets an error, not other values."""
    model, x = nn.Sequential(HiddenReader(product)), torch.randn(2, 4)
    assert [(layer.name, layer.kind) for layer in trace_layers(model, x)] == [("0.k", "fp32")]
    assert list(quantizable_layers(model)) == ["0.k"]  # its source says nothing
    pack_model(model, Allocation.uniform(["0.k"], "int4"))
    with pytest.raises(ConfigError, match=r"a product with the weight \[4, 4(, 1)?\] of a packed layer"):
        model(x)
    assert torch.equal(model[0].k.weight, model[0].k.decoded_weight())
