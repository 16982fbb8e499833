"""The search space: which decisions there are, and how a choice for each becomes an allocation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import CostTable, LayerInfo
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.formats.spaces import parse_formats
from fliqs_hf.nn.swap import matches

ActivationMode = Literal["same", "separate"]


@dataclass(frozen=True)
class Decision:
    """One choice of a format: for the weights, the inputs or both of one or several layers."""

    name: str
    kind: Literal["both", "weight", "activation"]
    layers: tuple[str, ...]


class SearchSpace:
    """D decisions over K formats for L layers.

    Attributes:
        layers: in the order of the forward pass; [L].
        formats: the choices; [K].
        decisions: [D].
        weight_decision, activation_decision: which decision each layer's weight and input follow; int64 [L].
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        formats: str | Sequence[str | Format],
        activation: ActivationMode = "same",
        tie: Iterable[str] = (),
    ) -> None:
        """
        Args:
            formats: list of formats or the name of a space, see `formats.spaces`.
            activation: "same" gives a layer's weight and input one format; "separate" decides them apart.
            tie: what shares a decision: "qkv" (layers that read the same tensor), "block" (up to the first number in
                the name), "model", or patterns (see `nn.swap.matches`), each tying the layers that it matches.
                The inputs of layers that read one tensor always share theirs: it is quantized once.
        Raises: ConfigError: an unknown mode, no layers, or a pattern that matches none. FormatError: bad formats.
        """
        if activation not in ("same", "separate"):
            raise ConfigError(f"activation={activation!r} does not exist; choose 'same' or 'separate'")
        if not layers:
            raise ConfigError("a search space needs at least one layer")
        self.layers = tuple(layers)
        self.formats = parse_formats(formats)
        self.activation = activation
        inputs = [("input", layer.input_group) for layer in self.layers]
        ties = [keys for word in tie for keys in [self._tie(word)]]
        if activation == "same":
            weight = inputs_ = _components([inputs, *ties])
        else:
            weight = _components([list(range(len(self.layers))), *ties])
            inputs_ = _components([inputs, *ties])
        offset = 0 if activation == "same" else max(weight) + 1
        self.weight_decision = torch.tensor(weight)
        self.activation_decision = torch.tensor([index + offset for index in inputs_])
        self.decisions = tuple(self._decision(index) for index in range(max(inputs_) + offset + 1))

    def indices(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Choices [..., D] -> indices into `formats` of each layer's weight and input, [..., L] each."""
        device = choice.device
        return choice[..., self.weight_decision.to(device)], choice[..., self.activation_decision.to(device)]

    def allocation(self, choice: Tensor) -> Allocation:
        """The allocation of one choice per decision, [D]. Synchronises with the host."""
        weight, activation = (index.tolist() for index in self.indices(choice))
        return Allocation(
            {
                layer.name: LayerFormats(self.formats[w], self.formats[a])
                for layer, w, a in zip(self.layers, weight, activation, strict=True)
            }
        )

    def choice(self, allocation: Allocation) -> Tensor:
        """Inverse of `allocation`, int64 [D]. Raises: ConfigError: an allocation outside the space."""
        choice = torch.full((len(self.decisions),), -1)
        for row, layer in enumerate(self.layers):
            formats = allocation.get(layer.name)
            for decision, fmt in (
                (self.weight_decision[row], formats and formats.weight),
                (self.activation_decision[row], formats and formats.activation),
            ):
                index = self.formats.index(fmt) if fmt in self.formats else -1
                if index < 0 or int(choice[decision]) not in (-1, index):
                    raise ConfigError(f"{layer.name}: {formats} is not in the search space")
                choice[decision] = index
        return choice

    def cost_of(self, table: CostTable, choice: Tensor) -> Tensor:
        """Cost of choices [..., D]: float64 [...], on their device."""
        return table.cost(*self.indices(choice))

    def expected_cost(self, table: CostTable, probabilities: Tensor) -> Tensor:
        """Expected cost when decisions are drawn independently from `probabilities` [D, K]: float64 scalar.

        Exact and differentiable. Layers whose two decisions are one cost Σ_k p_k T[k, k], others Σ_wa p_w p_a T[w, a].
        """
        costs = table.table.to(probabilities.device)
        p = probabilities.double()
        weight, activation = p[self.weight_decision.to(p.device)], p[self.activation_decision.to(p.device)]
        tied = (self.weight_decision == self.activation_decision).to(p.device)
        diagonal = (weight * costs.diagonal(dim1=1, dim2=2)).sum(1)
        pairs = torch.einsum("lw,la,lwa->l", weight, activation, costs)
        return torch.where(tied, diagonal, pairs).sum() + table.fixed_cost

    def to_dict(self) -> dict[str, Any]:
        """For `search_space.json`."""
        names = [fmt.name for fmt in self.formats]
        return {
            "formats": names,
            "activation": self.activation,
            "decisions": [
                {"name": d.name, "kind": d.kind, "layers": list(d.layers), "choices": names} for d in self.decisions
            ],
        }

    def _decision(self, index: int) -> Decision:
        weights = [l.name for l, d in zip(self.layers, self.weight_decision.tolist(), strict=True) if d == index]  # noqa: E741
        inputs = [l.name for l, d in zip(self.layers, self.activation_decision.tolist(), strict=True) if d == index]  # noqa: E741
        if self.activation == "same":
            return Decision(_common_name(weights), "both", tuple(weights))
        kind: Literal["weight", "activation"] = "weight" if weights else "activation"
        return Decision(f"{_common_name(weights or inputs)}:{kind}", kind, tuple(weights or inputs))

    def _tie(self, word: str) -> list[Any]:
        """One key per layer; layers with equal keys are tied."""
        names = [layer.name for layer in self.layers]
        if word == "model":
            return ["model"] * len(names)
        if word == "qkv":
            return [("input", layer.input_group) for layer in self.layers]
        if word == "block":
            blocks = [re.match(r"(.*?\.\d+)\.", name) for name in names]
            return [match[1] if match else name for match, name in zip(blocks, names, strict=True)]
        if not any(matches(name, word) for name in names):
            raise ConfigError(f"tie: {word!r} matches none of the {len(names)} layers, such as {names[0]!r}")
        return ["tied" if matches(name, word) else name for name in names]


def _components(keys: Sequence[Sequence[Any]]) -> list[int]:
    """Connected components of layers that share a key in any of the key lists, numbered in order of appearance."""
    component = list(range(len(keys[0])))
    for one in keys:
        first: dict[Any, int] = {}
        for row, key in enumerate(one):
            other = first.setdefault(key, row)
            old, new = component[row], component[other]
            component = [new if value == old else value for value in component]
    numbers = {value: index for index, value in enumerate(dict.fromkeys(component))}
    return [numbers[value] for value in component]


def _common_name(names: Sequence[str]) -> str:
    """`a.0.q`, `a.0.k` -> `a.0.{q,k}`; a single name as it is."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    rest = [".".join(part[common:]) for part in parts]
    shown = rest if len(rest) <= 4 else [*rest[:3], f"… {len(rest) - 3} more"]
    return ".".join([*parts[0][:common], "{" + ",".join(shown) + "}"])
