"""A kind of layer: all that the package asks of one, in one object; and the kinds that are known.

A kind is one file: a `LayerKind`, registered. Search, cost, packing, calibration,
kernels, checkpoints and export ask the kind, and nothing else, what a layer is.
"""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.searchable import SearchableLayer
from fliqs_hf.quant.tokens import Tokens


class LayerKind:
    """Layers that multiply what they read with one weight, and add a bias.

    In all of the package a weight is [out, ...], an output per row, whatever the layout of the layer's parameter;
    `rows` and `parameter` go from one to the other. Methods take a plain, searchable or packed layer of the kind.

    Attributes:
        name: in records, such as "conv2d".
        plain: the class of its layers.
        searchable, packed: what takes its place, see `SearchableLayer` and `PackedLayer`; `register_kind` makes them
            where a kind has none of its own.
        tokens: of the layer's input; outputs have their channels where inputs have their features.
        arguments: of the plain class, other than `bias`, all of them attributes of a layer.
        state: other attributes that `multiply` reads.
        matrix: the layer is a matrix [out, in] times every row of its input, which is [..., in].
        onnx: the operator that its packed layers become, "MatMul", "Conv" or "ConvTranspose", "" for
            none.
        lora: the name of the class in `peft.tuners.lora` that can be put on its packed layers, "" for none.
    """

    name: ClassVar[str]
    plain: ClassVar[type[nn.Module]]
    searchable: type[nn.Module]
    packed: type[nn.Module]
    tokens: ClassVar[Tokens]
    arguments: ClassVar[tuple[str, ...]]
    state: ClassVar[tuple[str, ...]] = ()
    matrix: ClassVar[bool] = False
    onnx: ClassVar[str] = ""
    lora: ClassVar[str] = ""

    def is_plain(self, cls: type[nn.Module]) -> bool:
        """Whether layers of class `cls` compute exactly what those of `plain` do. A subclass may do anything."""
        return cls is self.plain

    def rows(self, layer: Any, weight: Tensor) -> Tensor:
        """The layer's parameter as [out, ...]."""
        return weight

    def parameter(self, layer: Any, rows: Tensor) -> Tensor:
        """Inverse of `rows`."""
        return rows

    def multiply(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes. Args: weight: [out, ...]."""
        raise NotImplementedError

    def macs(self, layer: Any, x: Tensor, output: Tensor) -> int:
        """Multiply-accumulates of one call; products with padding count."""
        return output.numel() * prod(self.weight_shape(layer)[1:])

    def weight_shape(self, layer: Any) -> torch.Size:
        """[out, ...]."""
        packed: torch.Size | None = getattr(layer, "weight_shape", None)
        return self.rows(layer, layer.weight).shape if packed is None else packed

    def geometry(self, layer: Any) -> dict[str, Any]:
        """What a packed layer keeps of the one that it replaces."""
        return {name: getattr(layer, name) for name in (*self.arguments, *self.state)}

    def make_plain(self, layer: Any, bias: bool) -> nn.Module:
        """A plain layer of the geometry of `layer`, on the meta device."""
        arguments = {name: getattr(layer, name) for name in self.arguments}
        return self.plain(**arguments, bias=bias, device="meta")

    # What calibration asks.

    def tokens_of(self, x: Tensor) -> Tensor:
        """What the layer reads as [tokens, ...]."""
        dims = len(self.tokens.dims)
        return x.reshape(-1, *x.shape[x.dim() - dims :])

    def copies(self, layer: Any) -> int:
        """How often a value of the input occurs in `input_rows`, at most."""
        return 1

    def input_rows(self, layer: Any, x: Tensor) -> Tensor:
        """Everything that an output is the product of a row of the weight with, [rows, in]; [groups, rows, in] where
        the outputs read their own group of channels alone.

        Args:
            x: [tokens, ...], as `tokens_of` gives it.
        Raises: DataError: not known, so that its weights cannot be rounded by GPTQ.
        """
        raise DataError(f"GPTQ is not known for layers of kind {self.name!r}: give rounding='nearest'")

    # What kernels ask.

    def not_a_product(self, layer: Any) -> str:
        """Why the layer is not `product_rows` times its weight, each value of the input once; "" where it is."""
        return f"no product of rows, but a {self.plain.__name__}"

    def product_rows(self, layer: Any, x: Tensor) -> Tensor:
        """What an output is the product of a row of the weight with, [rows, in], those of one token together."""
        raise NotImplementedError

    def product_output(self, layer: Any, products: Tensor, shape: torch.Size) -> Tensor:
        """The layer's output from [rows, out]. Args: shape: of the input."""
        raise NotImplementedError

    def takes(self, layer: Any, x: Tensor) -> bool:
        """Whether `x` has a shape that kernels expect; what has not goes the reference path, which reports it."""
        return x.dim() > len(self.tokens.dims) and x.numel() > 0


_KINDS: dict[str, LayerKind] = {}


def _make_layers(kind: LayerKind) -> None:
    """Give a kind the classes of its layers, where it has none of its own. They are named after the kind, in its
    module, so that they can be pickled if they are assigned to these names there."""
    name, module = type(kind).__name__, type(kind).__module__
    for role, bases in (("searchable", (SearchableLayer, kind.plain)), ("packed", (PackedLayer,))):
        if getattr(getattr(kind, role, None), "kind", None) is not kind:
            about = {"kind": kind, "__module__": module, "__doc__": f"`{kind.plain.__name__}`, {role}."}
            setattr(kind, role, type(role.capitalize() + name, bases, about))


def register_kind(kind: LayerKind) -> LayerKind:
    """Make a kind of layer known: its layers are then searched, packed and counted as all others are.

    Returns: `kind`. Raises: ConfigError: another one of this name, or for the same layers, is registered.
    """
    if not (isinstance(kind.name, str) and kind.name.isidentifier() and kind.name != "fp32"):
        raise ConfigError(f"the name of a kind of layer is a word such as 'conv2d', not {kind.name!r}")
    for other in _KINDS.values():
        if type(other) is not type(kind) and (other.name == kind.name or other.is_plain(kind.plain)):
            raise ConfigError(
                f"layer kind {other.name!r} is registered already, for {other.plain.__name__}: choose another name "
                f"than {kind.name!r}, or unregister it"
            )
    if kind.name not in _KINDS:
        _make_layers(kind)
    return _KINDS.setdefault(kind.name, kind)


def unregister_kind(name: str) -> None:
    """Forget a kind of layer. Raises: ConfigError: it is none."""
    find_kind(name)
    del _KINDS[name]


def kinds() -> tuple[LayerKind, ...]:
    """All that are registered."""
    return tuple(_KINDS.values())


def find_kind(name: str) -> LayerKind:
    """A kind by its name. Raises: ConfigError: there is none."""
    if name not in _KINDS:
        raise ConfigError(f"unknown kind of layer {name!r}: use {', '.join(map(repr, _KINDS))}, or register it")
    return _KINDS[name]


def plain_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that is neither searchable nor packed, None for what is no layer of a known kind."""
    cls = type(module)
    return next((kind for kind in _KINDS.values() if kind.is_plain(cls)), None)


def kind_of(layer: nn.Module) -> LayerKind:
    """The kind of a plain, searchable or packed layer. Raises: ConfigError: it is of no known one."""
    kind = getattr(type(layer), "kind", None) if getattr(layer, "is_fliqs_layer", False) else plain_kind(layer)
    if not isinstance(kind, LayerKind):
        raise ConfigError(f"a {type(layer).__name__} is no layer of a known kind: {known_classes()}")
    return kind


def known_classes(conjunction: str = "and") -> str:
    """The classes of layers that can be quantized, in words."""
    *names, last = [kind.plain.__name__ for kind in _KINDS.values()]
    return f"{', '.join(names)} {conjunction} {last}"
