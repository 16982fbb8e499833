"""Which layers of a model can be quantized, and why others stay in floating point."""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import logging
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils import parametrize

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn.kinds import known_classes, plain_kind
from fliqs_hf.nn.searchable import SearchableLayer

logger = logging.getLogger(__name__)

#: What code may ask of a weight without computing with it.
_METADATA = {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "element_size", "requires_grad", "is_meta"}
#: Classes of torch whose modules multiply by weights of their own.
_MULTIPLY = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
#: Methods that fill or tie weights; no forward pass calls them.
_SETUP = {"__init__", "_init_weights", "init_weights", "reset_parameters", "tie_weights"}


def matches(name: str, pattern: str) -> bool:
    """Whether a module name matches: `re:` + regular expression (searched for), else a glob over the whole name, a
    dotted part of it (`classifier`, `encoder.layer.3`) or the exact name.

    Raises: ConfigError: a regular expression that does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def blocks_of(names: Sequence[str]) -> list[str]:
    """Of each layer the innermost numbered module that holds several of them, or else its own name."""
    numbered = [[name[: match.end()] for match in re.finditer(r"(?<=\.)\d+(?=\.)", name)] for name in names]
    holds = Counter(prefix for prefixes in numbered for prefix in prefixes)
    shared = [[prefix for prefix in prefixes if holds[prefix] > 1] for prefixes in numbered]
    return [prefixes[-1] if prefixes else name for prefixes, name in zip(shared, names, strict=True)]


def is_searchable(module: nn.Module) -> bool:
    return isinstance(module, SearchableLayer)


def quantizable_layers(model: nn.Module, modules_to_not_convert: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The layers that can be quantized, by name in the order of the model: those of a registered kind (see `kinds`)
    and layers that are searchable already, without those of `left_out`, which are logged once.

    Args:
        modules_to_not_convert: patterns (see `matches`) of layers to leave out.
    Raises: ConfigError: a pattern that matches no layer, or one text in place of a list.
    """
    if isinstance(modules_to_not_convert, str):
        raise ConfigError(f"modules_to_not_convert={modules_to_not_convert!r}: give a list of patterns")
    layers = _candidates(model)
    reasons = left_out(model)
    for reason in dict.fromkeys(reasons.values()):
        alike = [name for name in reasons if reasons[name] == reason]
        names = ", ".join(map(repr, alike[:3])) + (f" and {len(alike) - 3} others" if len(alike) > 3 else "")
        stay = "stays" if len(alike) == 1 else "stay"
        _say_once(f"{type(model).__name__}: {names} {stay} in floating point: {reason}")
    excluded = set(reasons)
    for pattern in modules_to_not_convert or ():
        hits = {name for name in (*layers, *reasons) if matches(name, pattern)}
        if not hits:
            raise ConfigError(
                f"modules_to_not_convert: {pattern!r} matches none of the {len(layers)} layers "
                f"({known_classes()}) of {type(model).__name__}, such as {next(iter(layers), None)!r}"
            )
        excluded |= hits
    return {name: module for name, module in layers.items() if name not in excluded}


def left_out(model: nn.Module) -> dict[str, str]:
    """Modules with a weight for products that cannot be quantized -> why.

    These are modules of no known kind, and layers whose weight has another name too (one of them would be packed, the
    other not), is computed anew at every pass (parametrizations, weight and spectral norm, pruning), or is read by the
    code around them, which would multiply the quantized weight by an input that nothing has quantized; and those whose
    `forward` is an attribute of the object, which would run in place of the quantized one.
    """
    reasons: dict[str, str] = {}
    tied, read = _tied(model), _read_directly(model)
    for name, module in model.named_modules():
        known = plain_kind(module) is not None or is_searchable(module)
        if not (known or isinstance(module, _MULTIPLY)):
            continue
        if parametrize.is_parametrized(module):
            reasons[name] = "it is parametrized, so its weight is made anew at every pass"
        elif not known:
            reasons[name] = f"a {type(module).__name__} is none of the layers that can be quantized, {known_classes()}"
        elif module._parameters.get("weight") is None:
            reasons[name] = "a hook makes its weight anew at every pass (weight norm, spectral norm, pruning)"
        elif "forward" in vars(module):
            reasons[name] = "its forward pass was replaced on the object (as accelerate does for several devices)"
        elif others := sorted(tied[f"{name}.weight"] - {f"{name}.weight"}):
            reasons[name] = f"its weight is that of {others[0]!r} too"
        elif name in read:
            reasons[name] = f"{read[name]} computes with its weight instead of calling it"
    return reasons


def why_not(model: nn.Module, name: str) -> str:
    """For an error about a layer that cannot be quantized: `name`, quoted, and what it is."""
    reason = left_out(model).get(name)
    if reason:
        return f"{name!r}, which stays in floating point: {reason}"
    return f"{name!r}, which is no layer of {type(model).__name__} that can be quantized ({known_classes()})"


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if plain_kind(module) or is_searchable(module)}


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def _tied(model: nn.Module) -> defaultdict[str, set[str]]:
    """Parameter name -> all names of the same values, itself included.

    By identity, by memory, and by Transformers' own list, which alone knows ties while a model is still empty.
    """
    by_value: defaultdict[object, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key: object = id(parameter)
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel():
            key = (parameter.data_ptr(), parameter.shape)
        by_value[key].add(name)
    names: defaultdict[str, set[str]] = defaultdict(set)
    for group in by_value.values():
        names.update(dict.fromkeys(group, group))
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = names[target] | names[source] | {target, source}
        names.update(dict.fromkeys(group, group))
    return names


def _read_directly(model: nn.Module) -> dict[str, str]:
    """Layer -> class of the module whose code computes with the layer's weight."""
    return {
        f"{name}.{path}" if name else path: type(module).__name__
        for name, module in model.named_modules()
        for path in _weights_read(type(module))  # type: ignore[arg-type]
    }


@functools.cache
def _weights_read(cls: type[nn.Module]) -> frozenset[str]:
    """Paths P for which the methods of a class compute with `self.P.weight`; found in its source, so that a model that
    is still empty, or that no example input is known for, tells as much as one that runs.
    """
    found: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, function in vars(base).items():
            if inspect.isfunction(function) and name not in _SETUP and "weight" in function.__code__.co_names:
                found.update(_paths_read(function))
    return frozenset(found)


def _paths_read(function: object) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, SyntaxError):  # no source at hand: tracing still finds what such code does
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        owner, _, path = ast.unparse(node.value).partition(".")
        parent = parents[node]
        metadata = isinstance(parent, ast.Attribute) and parent.attr in _METADATA
        question = isinstance(parent, ast.Compare) or (
            isinstance(parent, ast.Call) and ast.unparse(parent.func) in ("isinstance", "hasattr", "getattr", "id")
        )
        if owner == "self" and path and not (metadata or question):
            yield path
