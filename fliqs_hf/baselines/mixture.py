"""Layers that compute every format at once and mix the results: what a differentiable search trains through."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fliqs_hf.nn import FormatSwitch
from fliqs_hf.nn.searchable import SearchableLayer, SharedInput
from fliqs_hf.selection import SearchSpace


class Mixture:
    """Makes the searchable layers of a model mix their formats, in place, until `remove` is called.

    A layer then computes Σ_k p_k · layer(Q_k(x), Q_k(w)) over the formats k that its decision may take. Every branch
    keeps its quantized input, quantized weight and output for the backward pass: K times what one format keeps. As in
    a one-shot search, layers that read the same tensor share its quantized copies.

    Source: DNAS (Wu et al. 2018) and EdMIPS (Cai and Vasconcelos 2020), with one mixture for the weight and the input
    of a layer.

    Attributes:
        probabilities: of the next forward pass, [D][K] scalars. None: layers have the formats of their switch.
    """

    def __init__(self, model: nn.Module, space: SearchSpace, switch: FormatSwitch) -> None:
        """
        Args:
            model: searchable over the layers and formats of `space`, in the same order, through `switch`.
        """
        assert space.activation == "same"
        self.formats = space.formats
        self.probabilities: tuple[tuple[Tensor, ...], ...] | None = None
        self.layers = [model.get_submodule(layer.name) for layer in space.layers]
        inputs: dict[int, list[SharedInput]] = {}
        groups = list(switch.input_groups)
        for row, layer in enumerate(self.layers):
            decision = int(space.weight_decision[row])
            group = groups[row]
            shared = None
            if group is not None and groups.count(group) > 1:
                shared = inputs.setdefault(group, [SharedInput(groups.count(group)) for _ in space.formats])
            allowed = tuple(space.allowed[decision].nonzero().flatten().tolist())
            layer.__class__ = _mixed_class(type(layer))  # type: ignore[arg-type]
            layer.__dict__.update(mixture=self, decision=decision, allowed=allowed, shared_inputs=shared)

    def set(self, probabilities: Tensor | None) -> None:
        """Mix by `probabilities` [D, K], through which gradients flow; None: the formats of the switch."""
        rows = probabilities.unbind() if probabilities is not None else None
        self.probabilities = None if rows is None else tuple(row.unbind() for row in rows)

    def remove(self) -> None:
        """Turn the layers back into ordinary searchable ones. A second call does nothing."""
        for layer in self.layers:
            if isinstance(layer, _Mixed):
                layer.__class__ = layer.searchable  # type: ignore[assignment]
                for attribute in ("mixture", "decision", "allowed", "shared_inputs"):
                    del layer.__dict__[attribute]


if TYPE_CHECKING:
    _Base = SearchableLayer
else:
    _Base = nn.Module


class _Mixed(_Base):
    """What comes before the searchable class of any kind of layer. `Mixture` gives a searchable layer such a class and
    these attributes."""

    searchable: type[nn.Module]
    mixture: Mixture
    decision: int
    allowed: tuple[int, ...]
    shared_inputs: list[SharedInput] | None

    def forward(self, input: Tensor) -> Tensor:
        if self.mixture.probabilities is None:
            return super().forward(input)
        return self.mixed(input)

    def mixed(self, x: Tensor) -> Tensor:
        """Σ_k p_k · layer(Q_k(x), Q_k(weight))."""
        probabilities = self.mixture.probabilities
        assert probabilities is not None
        kind, rows = self.kind, self.kind.rows(self, self.weight)
        weights = ((k, self.switch.weights(rows, self.mixture.formats[k])) for k in self.allowed)
        branches = (
            probabilities[self.decision][k] * kind.multiply(self, self._input(x, k), weight, self.bias)
            for k, weight in weights
        )
        total = next(branches)
        for branch in branches:
            total = total + branch
        return total

    def _input(self, x: Tensor, k: int) -> Tensor:
        make = partial(self.input_quantizer, x, self.mixture.formats[k])
        return make() if self.shared_inputs is None else self.shared_inputs[k].get(x, make)


@cache
def _mixed_class(searchable: type[SearchableLayer]) -> type[nn.Module]:
    """`searchable`, which mixes formats where its mixture has probabilities."""
    name = searchable.__name__.replace("Searchable", "Mixed")
    return type(name, (_Mixed, searchable), {"searchable": searchable, "__module__": __name__})
