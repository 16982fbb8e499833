"""Layers that compute every format at once and mix the results: what a differentiable search trains through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.nn import FormatSwitch, SearchableConv2d, SearchableLinear
from fliqs_hf.nn.searchable import SharedInput
from fliqs_hf.search import SearchSpace


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
            layer.__class__ = _MIXED[type(layer)]
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


class _Mixed(nn.Module):
    """What both layer types share. `Mixture` gives a searchable layer this class and these attributes."""

    searchable: type[nn.Module]
    kind: str
    weight: Tensor
    switch: FormatSwitch
    mixture: Mixture
    decision: int
    allowed: tuple[int, ...]
    shared_inputs: list[SharedInput] | None

    def mixed(self, x: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ_k p_k · `compute`(Q_k(x), Q_k(weight))."""
        probabilities = self.mixture.probabilities
        assert probabilities is not None
        branches = (
            probabilities[self.decision][k] * compute(self._input(x, k), self._weight(k)) for k in self.allowed
        )
        total = next(branches)
        for branch in branches:
            total = total + branch
        return total

    def _input(self, x: Tensor, k: int) -> Tensor:
        make = partial(self.switch.inputs[self.kind], x, self.mixture.formats[k])
        return make() if self.shared_inputs is None else self.shared_inputs[k].get(x, make)

    def _weight(self, k: int) -> Tensor:
        return self.switch.weights(self.weight, self.mixture.formats[k])


class MixedLinear(_Mixed, SearchableLinear):
    """`SearchableLinear` that mixes formats where its mixture has probabilities."""

    searchable = SearchableLinear

    def forward(self, input: Tensor) -> Tensor:
        if self.mixture.probabilities is None:
            return super().forward(input)
        return self.mixed(input, lambda x, weight: functional.linear(x, weight, self.bias))


class MixedConv2d(_Mixed, SearchableConv2d):
    """`SearchableConv2d` that mixes formats where its mixture has probabilities."""

    searchable = SearchableConv2d

    def forward(self, input: Tensor) -> Tensor:
        if self.mixture.probabilities is None:
            return super().forward(input)
        return self.mixed(input, lambda x, weight: self._conv_forward(x, weight, self.bias))


_MIXED: dict[type[nn.Module], type[nn.Module]] = {SearchableLinear: MixedLinear, SearchableConv2d: MixedConv2d}
