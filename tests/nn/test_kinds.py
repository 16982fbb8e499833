"""Every kind of layer, asked for all that the package asks of it, against the plain layer and products by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import (
    LayerKind,
    make_searchable,
    pack_model,
    quantizable_layers,
    register_kind,
    restore,
    unpack_model,
    unregister_kind,
)
from fliqs_hf.nn.kernels import kernels_of, set_kernels
from fliqs_hf.nn.kinds import CONV2D, find_kind, kind_of, kinds
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.searchable import QuantizerSettings, SearchableLayer
from fliqs_hf.nn.select import left_out
from fliqs_hf.ptq.gptq import input_hessian

#: name -> layer, shape of its input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (2, 5, 12)),
    "transposed-linear": (lambda: Conv1D(8, 12), (2, 5, 12)),
    "transposed-linear-short": (lambda: Conv1D(5, 3), (1, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1, stride=2), (2, 4, 9)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 8, 2, groups=2, dilation=2, bias=False), (2, 4, 9)),
    "conv1d-patches": (lambda: nn.Conv1d(4, 8, 3, stride=3), (2, 4, 10)),
    "conv1d-circular": (lambda: nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 5)),
    "conv2d-patches": (lambda: nn.Conv2d(3, 8, (2, 3), stride=(2, 3)), (2, 3, 6, 7)),
    "conv2d-same": (lambda: nn.Conv2d(3, 8, 3, padding="same", bias=False), (2, 3, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 3)),
    "transposed-groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, dilation=(2, 1)), (2, 4, 5, 3)),
    "transposed-cut": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=3, padding=2), (2, 4, 5, 3)),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer = make()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(layer).eval(), torch.randn(shape)


def test_the_searchable_layer_computes_what_the_plain_one_does(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    expected, plain, parameters = model(x), type(model[0]), dict(model[0].named_parameters())
    switch = make_searchable(model, ["int8"])
    with switch.disabled():
        assert torch.equal(model(x), expected)
    assert switch.settings and not torch.equal(model(x), expected)
    assert all(model[0].get_parameter(name) is value for name, value in parameters.items())
    restore(model)
    assert type(model[0]) is plain and torch.equal(model(x), expected)


@pytest.mark.parametrize(("weight", "activation"), [("int4", "int8"), ("e2m1", "e4m3"), ("mxfp4", "int4_zp")])
def test_the_packed_layer_has_the_bits_of_the_searchable_one(
    case: tuple[nn.Module, Tensor], weight: str, activation: str
) -> None:
    model, x = case
    plain, shape = type(model[0]), model[0].weight.shape
    switch = make_searchable(model, [weight, activation])
    allocation = Allocation.uniform(["0"], weight, activation)
    switch.set_allocation(allocation)
    expected = model(x)
    pack_model(model, allocation)
    assert torch.equal(model(x), expected) and model[0].weight.shape == shape
    set_kernels(model, "auto")
    with torch.no_grad():
        fast = model(x)
    if kernels_of(model)["0"].kernel == "int8":  # the order of float32 scaling differs, see nn/native
        assert torch.allclose(fast, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    else:
        assert torch.equal(fast, expected)
    decoded = model[0].weight.clone().as_subclass(Tensor)
    unpack_model(model)
    assert type(model[0]) is plain and torch.equal(model[0].weight, decoded)


def test_scales_are_those_of_output_channels(case: tuple[nn.Module, Tensor]) -> None:
    """Each output channel's weights, found by the derivative of its outputs, have the scale of its largest one."""
    model, x = case
    layer = model[0]
    channel = kind_of(layer).tokens.features
    output = layer(torch.ones_like(x))
    peaks = []
    for index in range(output.shape[channel]):
        (gradient,) = torch.autograd.grad(output.select(channel, index).sum(), layer.weight, retain_graph=True)
        peaks.append(layer.weight.detach()[gradient != 0].abs().max())
    pack_model(model, Allocation.uniform(["0"], "int4"))
    assert torch.equal(model[0].weight_scale, torch.stack(peaks) / 7)


def test_input_rows_are_what_outputs_are_products_of(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    layer: Any = model[0]
    kind = kind_of(layer)
    rows = kind.input_rows(layer, kind.tokens_of(x))
    weight = kind.rows(layer, layer.weight).flatten(1)
    groups = rows if rows.dim() == 3 else rows[None]
    found = torch.cat([r @ w.T for r, w in zip(groups, weight.chunk(len(groups)), strict=True)], -1)
    expected = layer(x) - (0 if layer.bias is None else kind_bias(layer))
    expected = expected.movedim(kind.tokens.features, -1).reshape(-1, len(weight))
    assert torch.allclose(found, expected, atol=1e-5)
    hessian = input_hessian(layer, x)
    by_group = 2 * groups.double().mT @ groups.double() / groups.shape[1]
    assert torch.allclose(hessian, by_group if rows.dim() == 3 else by_group[0], rtol=1e-5, atol=1e-6)


def kind_bias(layer: Any) -> Tensor:
    features = kind_of(layer).tokens.features
    bias: Tensor = layer.bias.detach()
    return bias.view(-1, *[1] * (-1 - features))


def test_products_are_counted(case: tuple[nn.Module, Tensor]) -> None:
    """Of ones with ones, without a bias: the outputs are the numbers of products, but for those with padding."""
    model, x = case
    layer: Any = model[0]
    (traced,) = trace_layers(model, x)
    assert (traced.weight_numel, traced.kind) == (layer.weight.numel(), kind_of(layer).name)
    nn.init.ones_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    output = layer(torch.ones_like(x[:1]))
    channel = kind_of(layer).tokens.features
    assert traced.out_channels == output.shape[channel]
    padded = any(layer.padding) if hasattr(layer, "padding") else False
    counted = int(output.detach().sum())
    assert counted <= traced.macs if padded else counted == traced.macs


def test_product_rows_give_the_output(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    layer: Any = model[0]
    kind = kind_of(layer)
    if kind.not_a_product(layer):
        pytest.skip("its windows overlap")
    products = kind.product_rows(layer, x) @ kind.rows(layer, layer.weight).flatten(1).T
    found = kind.product_output(layer, products, x.shape)
    assert torch.allclose(found + kind_bias(layer), layer(x), atol=1e-5)
    assert kind.takes(layer, x) and not kind.takes(layer, x[:0])


def test_batches_do_not_change_results(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    pack_model(model, Allocation.uniform(["0"], "int4"))
    # A product of fewer rows may sum in another order; inputs of another batch would differ in the third digit.
    assert torch.allclose(model(x)[1:], model(x[1:]), atol=1e-5)


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_an_empty_batch_gives_an_empty_output(case: tuple[nn.Module, Tensor], granularity: Any) -> None:
    model, x = case
    settings = QuantizerSettings(activation_granularity=granularity)
    shape = model(x[:0]).shape
    switch = make_searchable(model, ["int8", "nvfp4"], settings=settings)
    for activation in ("int8", "nvfp4"):
        switch.set_allocation(Allocation.uniform(["0"], "int8", activation))
        assert model(x[:0]).shape == shape
    pack_model(model, Allocation.uniform(["0"], "int8"), settings)
    set_kernels(model, "auto")
    assert model(x[:0]).shape == shape


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_the_layers_of_a_kind_are_its_own_and_can_be_pickled(kind: LayerKind) -> None:
    assert issubclass(kind.searchable, (SearchableLayer, kind.plain)) and issubclass(kind.packed, PackedLayer)
    for role in (kind.searchable, kind.packed):
        assert role.kind is kind and pickle.loads(pickle.dumps(role)) is role  # type: ignore[attr-defined]


def test_names_and_classes_are_taken_once() -> None:
    class Again(LayerKind):
        name, plain = "conv2d", nn.Conv3d

    class Same(LayerKind):
        name, plain = "image", nn.Conv2d

    class Spaced(LayerKind):
        name, plain = "conv 3d", nn.Conv3d

    for kind in (Again(), Same()):
        with pytest.raises(ConfigError, match="'conv2d' is registered already, for Conv2d"):
            register_kind(kind)
    with pytest.raises(ConfigError, match="is a word such as 'conv2d', not 'conv 3d'"):
        register_kind(Spaced())
    assert register_kind(CONV2D) is CONV2D and kinds().count(CONV2D) == 1
    with pytest.raises(ConfigError, match=r"unknown kind of layer 'conv3d': use .*'conv2d'"):
        find_kind("conv3d")
    with pytest.raises(ConfigError, match="unknown kind of layer 'conv3d'"):
        unregister_kind("conv3d")
    with pytest.raises(ConfigError, match=r"a Conv3d is no layer of a known kind.*Conv2d"):
        kind_of(nn.Conv3d(1, 1, 1))


@pytest.mark.parametrize("make", [
    lambda: nn.Conv3d(1, 1, 1), lambda: nn.ConvTranspose1d(1, 1, 1), lambda: nn.Bilinear(2, 2, 2),
    lambda: nn.GRU(2, 2), lambda: nn.LSTMCell(2, 2), lambda: nn.MultiheadAttention(2, 1),
    lambda: type("Odd", (nn.Conv1d,), {"forward": abs})(1, 1, 1),
])  # fmt: skip
def test_what_is_of_no_kind_is_named(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    assert not quantizable_layers(model)
    name = type(model[0]).__name__
    assert left_out(model)["0"].startswith(f"a {name} is none of the layers that can be quantized")
