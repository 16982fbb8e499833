"""Multiply-accumulates of weights that belong to no quantizable layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

#: Products, and where the first of their two factors stands among the arguments.
_FACTORS = {
    aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1, aten.addbmm: 1,
    aten.convolution: 0, aten._trilinear: 0,
}  # fmt: skip
_BATCHED = (aten.bmm, aten.baddbmm, aten.addbmm)
#: Parameters that the one weight of a layer is, or is made from.
_OF_A_WEIGHT = ("weight", "weight_orig", "weight_g", "weight_v")


@dataclass(frozen=True)
class _Source:
    """What a weight is made from: the largest of its parameters.

    Attributes:
        layer: see `_layer_name`.
        multiplied: it is a product, as of low-rank factors, or of learned tokens and their projection.
    """

    layer: str
    parameter: Tensor
    multiplied: bool = False


class WeightProducts(TorchDispatchMode):
    """Watches a forward pass for products (of matrices, convolutions) in which a factor is a weight.

    A weight is a parameter, or what is made from parameters without the input, such as a standardized or normalized
    weight. Attention scores, and their products with the values, are products of two things that are none.
    What happens between `enter` and `leave`, in a layer that is counted elsewhere, is not watched.

    Args:
        found: called with the name of the weight's layer (see `_layer_name`), the largest parameter that it is made
            from, and the multiply-accumulates of each product.
    """

    def __init__(self, model: nn.Module, found: Callable[[str, Tensor, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found
        self._inside = 0
        self._weights = WeakTensorKeyDictionary()  # tensor -> _Source
        self._inputs = WeakTensorKeyDictionary()  # tensors that depend on the input -> True
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        for name, parameter in model.named_parameters():
            self._weights[parameter] = _Source(_layer_name(name), parameter)

    @contextmanager
    def of(self, arguments: Tensor | Mapping[str, Any]) -> Iterator[None]:
        """Watch within this context a pass over `arguments`."""
        self._mark(arguments if isinstance(arguments, Tensor) else dict(arguments))
        # Fused kernels, of nn.MultiheadAttention and of recurrent layers, would hide what they are made of.
        fused = torch.backends.mkldnn.flags(enabled=False) if self._recurrent else nullcontext()
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with fused, self:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def enter(self) -> None:
        self._inside += 1

    def leave(self, output: Any) -> None:
        self._inside -= 1
        self._mark(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside:
            return output
        tensors = _tensors((args, kwargs))
        depends = any(tensor in self._inputs for tensor in tensors)
        made_of = [self._weights[tensor] for tensor in tensors if tensor in self._weights]
        kind = func.overloadpacket
        factors = [self._weights[factor] for factor in _factors(kind, args) if factor in self._weights]
        # What attention does with learned tokens once they are projected is attention, not a product of a weight.
        factors = [factor for factor in factors if not (factor.multiplied and kind in _BATCHED)]
        if factors:
            source = _largest(factors)
            self._found(source.layer, source.parameter, _macs(kind, args, output))
        if depends:
            self._mark(output)
        elif made_of:
            source = _largest(made_of)
            source = replace(source, multiplied=source.multiplied or kind in _FACTORS)
            self._weights.update({leaf: source for leaf in _tensors(output) if leaf not in self._weights})
        return output

    def _mark(self, values: Any) -> None:
        for tensor in _tensors(values):
            self._inputs[tensor] = True
            self._weights.pop(tensor, None)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _largest(sources: Iterable[_Source]) -> _Source:
    return max(sources, key=lambda source: source.parameter.numel())


def _layer_name(parameter: str) -> str:
    """Of `head.weight`, of `head.weight_v` (weight norm) and of `head.parametrizations.weight.original1`: `head`."""
    owner, _, leaf = parameter.rpartition(".")
    owner, parametrized, _ = owner.partition(".parametrizations.")
    return owner if owner and (parametrized or leaf in _OF_A_WEIGHT) else parameter


def _factors(kind: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The two factors of a product, nothing for any other operation."""
    return tuple(args[_FACTORS[kind] : _FACTORS[kind] + 2]) if kind in _FACTORS else ()


def _macs(kind: Any, args: tuple[Any, ...], output: Tensor) -> int:
    first, second = _factors(kind, args)
    if kind is aten.convolution:
        transposed = args[6]
        return int((first if transposed else output).numel() * second[0].numel())
    if kind is aten._trilinear:  # of nn.Bilinear: rows, weight, rows
        return int(len(first) * second.numel())
    return int(first.numel() * (second.shape[-1] if second.dim() > 1 else 1))
