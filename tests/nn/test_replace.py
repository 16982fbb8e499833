"""Layers that a model keeps in more than one place."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import PackedLinear, make_searchable, pack_model, packed_layers, unpack_model

Pair = namedtuple("Pair", "first second")


class Holder(nn.Module):
    """Names a layer `fc`, and calls what `find` finds in `kept`."""

    def __init__(self, keep: Callable[[nn.Module], Any], find: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kept = keep(self.fc)
        self.find = staticmethod(find)

    def forward(self, x: Tensor) -> Tensor:
        return self.find.__func__(self.kept)(x)  # type: ignore[no-any-return, attr-defined]


class Hidden(nn.Module):
    """A module that no other names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer


def first(kept: Any) -> Any:
    return kept[0]


REPLACED: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "list": (lambda fc: [fc], first),
    "tuple": (lambda fc: (fc, None), first),
    "named tuple": (lambda fc: Pair(fc, 1), lambda kept: kept.first),
    "deque": (lambda fc: deque([fc]), first),
    "dictionary": (lambda fc: {"fc": fc}, lambda kept: kept["fc"]),
    "ordered dictionary": (lambda fc: OrderedDict(fc=fc), lambda kept: kept["fc"]),
    "set": (lambda fc: {fc}, lambda kept: next(iter(kept))),
    "frozen set": (lambda fc: frozenset([fc]), lambda kept: next(iter(kept))),
    "nested": (lambda fc: [{"a": ([1], (fc, "b"))}], lambda kept: kept[0]["a"][1][0]),
    "tuple of tuples": (lambda fc: ((fc, fc), (fc,)), lambda kept: kept[1][0]),
    "tuple in a set": (lambda fc: {(fc, 1)}, lambda kept: next(iter(kept))[0]),
    "plain object": (lambda fc: SimpleNamespace(layers=[fc]), lambda kept: kept.layers[0]),
    "module in a list": (lambda fc: [Hidden(fc)], lambda kept: kept[0].inner),
    "lists that hold each other": (lambda fc: _ring(fc), lambda kept: kept[0][0][1]),
}


def _ring(layer: nn.Module) -> list[Any]:
    ring: list[Any] = [[], layer]
    ring[0].append(ring)
    return ring


@pytest.mark.parametrize("name", REPLACED)
def test_every_reference_is_replaced(name: str) -> None:
    torch.manual_seed(0)
    model, x = Holder(*REPLACED[name]), torch.randn(3, 4)
    plain = model(x)
    searchable = Holder(*REPLACED[name])
    searchable.load_state_dict(model.state_dict())
    make_searchable(searchable, ["int4"])
    expected = searchable(x)
    assert not torch.equal(expected, plain)
    pack_model(model, Allocation.uniform(["fc"], "int4"))
    assert torch.equal(model(x), expected)
    assert isinstance(REPLACED[name][1](model.kept), PackedLinear)
    pack_model(searchable, Allocation.uniform(["fc"], "int4"))
    assert torch.equal(searchable(x), expected)
    unpack_model(model)
    assert REPLACED[name][1](model.kept) is model.fc
    assert not torch.equal(model(x), expected)  # the inputs are quantized no longer


def test_a_tuple_that_holds_several_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.both = self.again = (self.a, [self.b], self.b)
            self.set = {(self.a, self.b)}

    model = Model()
    pack_model(model, Allocation.uniform(["a", "b"], "int4"))
    for held in (model.both, model.again):
        assert held[0] is model.a and held[1][0] is model.b and held[2] is model.b
    assert model.set == {(model.a, model.b)}
    assert len(packed_layers(model)) == 2


def closure(layer: nn.Module) -> Any:
    return lambda x: layer(x)


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "closure": closure,
    "nested closure": lambda fc: closure(closure(fc)),  # type: ignore[arg-type]
    "default argument": lambda fc: lambda x, layer=fc: layer(x),
    "partial": lambda fc: functools.partial(lambda layer, x: layer(x), fc),
    "bound method": lambda fc: fc.forward,
    "list of closures": lambda fc: [closure(fc)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reference_that_nothing_can_replace_is_refused_before_anything_changes(name: str) -> None:
    model = Holder(REFUSED[name], lambda kept: kept[0] if isinstance(kept, list) else kept)
    x = torch.randn(2, 4)
    before = model(x)
    for change in (
        lambda: pack_model(model, Allocation.uniform(["fc"], "int4")),
        lambda: make_searchable(model, ["int4"]),  # a bound method would go on as before; others fail when packed
    ):
        with pytest.raises(ConfigError, match=r"'fc' cannot be replaced: Holder\.kept holds it in"):
            change()
        assert type(model.fc) is nn.Linear and torch.equal(model(x), before)


ELSEWHERE: list[nn.Module] = []


def test_a_reference_that_no_search_finds_is_refused_when_it_is_called() -> None:
    model = Holder(lambda fc: None, lambda kept: ELSEWHERE[0])
    ELSEWHERE[:] = [model.fc]
    pack_model(model, Allocation.uniform(["fc"], "int4"))
    with pytest.raises(ConfigError, match="the model still calls the layer that 'fc' was"):
        model(torch.randn(2, 4))


def test_hooks_and_copies_do_not_stand_in_the_way() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layer, seen = model[0], []
    model.register_forward_hook(lambda *_: seen.append(layer))
    other = copy.deepcopy(model)
    pack_model(model, Allocation.uniform(["0"], "int4"))
    assert type(other[0]) is nn.Linear
    other(torch.randn(1, 4))
    model(torch.randn(1, 4))


def test_hooks_of_the_layer_stay() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    before = model[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    model[0].register_forward_hook(lambda *_: seen.append("after"), always_call=True)
    pack_model(model, Allocation.uniform(["0"], "int4"))
    model(torch.randn(1, 4))
    before.remove()
    unpack_model(model)
    model(torch.randn(1, 4))
    assert seen == ["before", "after", "after"]


def test_a_weight_that_cannot_be_packed_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = torch.nan
    make_searchable(model, ["int4"])
    layers = list(model)
    with pytest.raises(ValueError, match="NaN"):
        pack_model(model, Allocation.uniform(["0", "1"], "int4"))
    assert list(model) == layers and not packed_layers(model)
    assert all(hasattr(layer, "switch") for layer in layers)
