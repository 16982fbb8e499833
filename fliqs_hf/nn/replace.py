"""Exchanging layers of a model for others, wherever the model keeps them."""

from __future__ import annotations

import functools
import re
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fliqs_hf.errors import ConfigError

#: What `nn.Module` keeps in `__dict__` and is no place of a layer that it computes with. Hooks only watch.
_OWN = frozenset(vars(nn.Module()))
_HOOKS = [name for name in _OWN if re.fullmatch("_(forward|backward)(_pre)?_hooks.*", name)]
_LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.Tensor)


class Places:
    """Where a model keeps some of its layers: every name in the module tree, attributes, and lists, tuples, sets and
    dictionaries in attributes, however nested.

    Transformers' mask heads, for one, name their layers and run a list of them.

    Raises: ConfigError: a layer is also held where nothing can take its place (a closure, a bound method); it names
        both.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._names = {id(layer): name for name, layer in layers.items()}
        self._layers = dict(layers)
        self._found: dict[str, list[_Place]] = {name: [] for name in layers}
        self._walked: set[int] = set()
        self._visit(model, type(model).__name__)

    def replace(self, name: str, new: nn.Module) -> None:
        """Put `new`, which takes over its hooks, everywhere in place of the layer. Whoever still calls the old one,
        from a place that no search of the model can see, gets a ConfigError rather than what it computes.
        """
        old = self._layers[name]
        for place in self._found[name]:
            place.put(old, new)
        vars(new).update({hooks: vars(old)[hooks] for hooks in _HOOKS})
        old.forward = functools.partial(_refuse, name)

    def _visit(self, module: nn.Module, path: str) -> None:
        self._walked.add(id(module))
        for child in module._modules:
            self._look(_Place(module._modules, child), f"{path}.{child}")
        for attribute in [key for key in vars(module) if key not in _OWN]:
            self._look(_Place(vars(module), attribute), f"{path}.{attribute}")

    def _look(self, place: _Place, path: str) -> None:
        value = place.get()
        if id(value) in self._names:
            self._found[self._names[id(value)]].append(place)
            return
        if isinstance(value, _LEAVES) or id(value) in self._walked:
            return
        if isinstance(value, nn.Module):
            self._visit(value, path)
            return
        if not isinstance(value, (tuple, frozenset)):  # what cannot be changed is exchanged at every place of its own
            self._walked.add(id(value))
        inside = _contents(place, value)
        if inside is not None:
            for inner in inside:
                self._look(inner, path)
            return
        for held in _held(value):
            if isinstance(held, nn.Module) and id(held) in self._names:
                raise ConfigError(
                    f"{self._names[id(held)]!r} cannot be replaced: {path} holds it in a {type(value).__name__}; "
                    "leave the layer out with modules_to_not_convert, or keep it in an attribute, list or dictionary"
                )


class _Place:
    """One reference: an entry of a container, or an element of a set (key None)."""

    def __init__(self, holder: Any, key: Any, parent: _Place | None = None) -> None:
        self._holder, self._key, self._parent = holder, key, parent

    def get(self) -> Any:
        return self._current()[self._key]

    def put(self, old: Any, new: Any) -> None:
        holder = self._current()
        if isinstance(holder, tuple):
            items = [*holder[: self._key], new, *holder[self._key + 1 :]]
            rebuilt = holder._make(items) if hasattr(holder, "_make") else type(holder)(items)
            assert self._parent is not None
            self._parent.put(holder, rebuilt)
        else:
            holder[self._key] = new

    def _current(self) -> Any:
        # A tuple is made anew by each exchange, so what its place holds now counts.
        return self._holder if self._parent is None else self._parent.get()


class _Element(_Place):
    """An element of a set."""

    def get(self) -> Any:
        return self._key

    def put(self, old: Any, new: Any) -> None:
        holder = self._current()
        if isinstance(holder, frozenset):
            assert self._parent is not None
            self._parent.put(holder, (holder - {old}) | {new})
        else:
            holder.discard(old)
            holder.add(new)
        self._key = new


def _contents(place: _Place, value: Any) -> list[_Place] | None:
    """Places in a container or in a plain object's attributes; None for what cannot be changed."""
    if isinstance(value, (list, tuple, deque)):
        return [_Place(value, index, place) for index in range(len(value))]
    if isinstance(value, dict):
        return [_Place(value, key, place) for key in value]
    if isinstance(value, (set, frozenset)):
        return [_Element(value, element, place) for element in value]
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)):
        return None
    attributes = getattr(value, "__dict__", None)
    return [_Place(attributes, key) for key in attributes] if isinstance(attributes, dict) else []


def _held(function: Any) -> Iterator[Any]:
    """What a function, method or partial holds, however nested."""
    waiting, seen = [function], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, types.FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, types.MethodType):
            waiting += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            waiting += list(value)
        elif isinstance(value, dict):
            waiting += list(value.values())


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise ConfigError(
        f"the model still calls the layer that {name!r} was before it was replaced, through a reference that it keeps "
        "outside of its modules' attributes: leave the layer out with modules_to_not_convert"
    )


def replace(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the layer of that name, wherever `model` keeps the layer (see `Places`).

    Raises: ConfigError: a layer is held where nothing can take its place. Nothing is changed then.
    """
    places = Places(model, {name: model.get_submodule(name) for name in replacements})
    for name, module in replacements.items():
        places.replace(name, module)
