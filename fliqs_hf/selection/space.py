"""The search space: which decisions there are, and how a choice for each becomes an allocation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.checks import is_number
from fliqs_hf.cost import CostTable, LayerInfo
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.formats.spaces import parse_formats
from fliqs_hf.nn import FormatSwitch
from fliqs_hf.nn.select import blocks_of, matches

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
        layers: those that can be quantized, in the order of the forward pass; [L].
        formats: the choices; [K].
        decisions: [D].
        weight_decision, activation_decision: which decision each layer's weight and input follow; int64 [L].
        allowed: which formats each decision may take; bool [D, K].
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        formats: str | Sequence[str | Format],
        activation: ActivationMode = "same",
        tie: Iterable[str] = (),
        exclude: Mapping[str, Sequence[str | Format]] | None = None,
        require: Mapping[str, Sequence[str | Format]] | None = None,
        min_bits: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            formats: list of formats or the name of a space, see `formats.spaces`. Weights never get one with a zero
                point.
            activation: "same" gives a layer's weight and input one format; "separate" decides them apart.
            tie: what shares a decision: "qkv" (layers that read the same tensor), "block" (the innermost numbered
                module that holds several layers), "model", or patterns (see `nn.select.matches`), each tying the
                layers that it matches. The inputs of layers that read one tensor always share theirs: it is quantized
                once. With "same" this ties their weights too.
            exclude: pattern -> formats that matching layers must not have, weight or input, such as
                `{"*patch_embeddings*": ["int2"]}`; a decision takes what none of its layers excludes.
            require: pattern -> formats of which matching layers must have one, weight and input.
            min_bits: pattern -> bits that formats of matching layers, weight and input, must at least have.
        Raises: ConfigError: an unknown mode, no layers, a pattern that matches none, or a decision that is left
            without a format. FormatError: bad formats.
        """
        if activation not in ("same", "separate"):
            raise ConfigError(f"activation={activation!r} does not exist; choose 'same' or 'separate'")
        if isinstance(tie, str) or not isinstance(tie, Iterable):
            raise ConfigError(f'tie={tie!r}: give a list of "qkv", "block", "model" or patterns of layer names')
        rules: dict[str, Any] = {"exclude": exclude or {}, "require": require or {}, "min_bits": min_bits or {}}
        for setting, given in rules.items():
            if not isinstance(given, Mapping):
                what = "a number" if setting == "min_bits" else "a list of formats"
                raise ConfigError(f"{setting}={given!r}: give patterns of layer names, each with {what}")
        self.layers = tuple(layer for layer in layers if layer.quantizable)
        if not self.layers:
            raise ConfigError("a search space needs at least one layer that can be quantized")
        self.formats = parse_formats(formats)
        self.activation = activation
        inputs_only = [fmt.name for fmt in self.formats if fmt.for_inputs_only]
        if inputs_only and activation == "same":
            raise ConfigError(
                f"{inputs_only[0]} has a zero point, which is for inputs, and activation='same' gives it to weights: "
                "choose activation='separate', or leave it out"
            )
        inputs = [("input", layer.input_group) for layer in self.layers]
        ties = [self._tie(word) for word in tie]
        activation_of = _components([inputs, *ties])
        if activation == "same":
            weight_of, offset = activation_of, 0
        else:
            weight_of = _components([list(range(len(self.layers))), *ties])
            offset = max(weight_of) + 1
        self.weight_decision = torch.tensor(weight_of)
        self.activation_decision = torch.tensor(activation_of) + offset
        self.decisions = tuple(self._decision(index) for index in range(max(activation_of) + offset + 1))
        self.allowed = self._allowed(rules)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def indices(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Choices [..., D] -> indices into `formats` of each layer's weight and input, [..., L] each."""
        weight, activation = self.decisions_on(choice.device)
        return choice[..., weight], choice[..., activation]

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
        choice: list[int | None] = [None] * len(self.decisions)
        decisions = zip(self.weight_decision.tolist(), self.activation_decision.tolist(), strict=True)
        for layer, (weight, activation) in zip(self.layers, decisions, strict=True):
            formats = allocation.get(layer.name)
            for decision, fmt in (
                (weight, formats and formats.weight),
                (activation, formats and formats.activation),
            ):
                index = self.formats.index(fmt) if fmt in self.formats else None
                if index is None or choice[decision] not in (None, index) or not self.allowed[decision, index]:
                    raise ConfigError(f"{layer.name}: {formats or 'fp32'} is not in the search space")
                choice[decision] = index
        return torch.tensor(choice)

    def check_table(self, table: CostTable) -> None:
        """Raises: ConfigError: a cost table of other layers or formats."""
        if [layer.name for layer in table.layers] != [layer.name for layer in self.layers]:
            raise ConfigError(
                f"the cost table is of {len(table.layers)} layers that are not the {len(self.layers)} of the search "
                "space in their order: make it as CostTable(space.layers, space.formats)"
            )
        _check_formats("the cost table is of", table.formats, self.formats)

    def check_switch(self, switch: FormatSwitch) -> None:
        """Raises: ConfigError: a model that is searchable over other layers or formats."""
        if switch.names != tuple(layer.name for layer in self.layers):
            raise ConfigError(
                f"the model is searchable over {len(switch.names)} layers that are not the {len(self.layers)} of the "
                "search space in their order: give make_searchable `names=[layer.name for layer in space.layers]`"
            )
        _check_formats("the model is searchable over", switch.formats, self.formats)

    def to_dict(self) -> dict[str, Any]:
        """For `search_space.json`. Every decision lists all formats, so that probabilities and scores line up."""
        names = [fmt.name for fmt in self.formats]
        decisions: list[dict[str, Any]] = []
        for decision, allowed in zip(self.decisions, self.allowed.tolist(), strict=True):
            entry = {"name": decision.name, "kind": decision.kind, "layers": list(decision.layers), "choices": names}
            if not all(allowed):
                entry["excluded"] = [name for name, ok in zip(names, allowed, strict=True) if not ok]
            decisions.append(entry)
        return {"formats": names, "activation": self.activation, "decisions": decisions}

    def decisions_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`weight_decision` and `activation_decision` on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = (self.weight_decision.to(device), self.activation_decision.to(device))
        return self._on_device[device]

    def _allowed(self, rules: Mapping[str, Mapping[str, Any]]) -> Tensor:
        allowed = torch.ones(len(self.decisions), len(self.formats), dtype=torch.bool)
        for index, fmt in enumerate(self.formats):
            if fmt.for_inputs_only:
                allowed[self.weight_decision, index] = False
        for setting, patterns in rules.items():
            for pattern, value in patterns.items():
                _check_pattern(setting, pattern)
                rows = [row for row, layer in enumerate(self.layers) if matches(layer.name, pattern)]
                if not rows:
                    raise ConfigError(f"{setting}: {pattern!r} matches none of the {len(self.layers)} layers")
                forbidden = self._forbidden(setting, pattern, value)
                for decision in (self.weight_decision[rows], self.activation_decision[rows]):
                    allowed[decision] &= ~forbidden
        given = " and ".join(setting for setting, patterns in rules.items() if patterns) or "a space for inputs only"
        for name, some in zip((decision.name for decision in self.decisions), allowed.any(-1).tolist(), strict=True):
            if not some:
                raise ConfigError(f"{given} leaves {name!r} without a format; exclude fewer, or tie less")
        return allowed

    def _forbidden(self, setting: str, pattern: str, value: Any) -> Tensor:
        """Which of the formats a rule keeps matching layers from, bool [K]."""
        if setting == "min_bits":
            if not is_number(value, 0):
                raise ConfigError(f"min_bits: {pattern!r} has {value!r}, which is no number of bits")
            return torch.tensor([fmt.bits < value for fmt in self.formats])
        named = parse_formats([value] if isinstance(value, str) else value)
        if missing := [fmt for fmt in named if fmt not in self.formats]:
            anyway = " anyway" if setting == "exclude" else ": add it there"
            raise ConfigError(f"{setting}: {pattern!r} has {missing[0]}, which is not in the search space{anyway}")
        return torch.tensor([(fmt in named) == (setting == "exclude") for fmt in self.formats])

    def _decision(self, index: int) -> Decision:
        rows = list(zip(self.layers, self.weight_decision.tolist(), self.activation_decision.tolist(), strict=True))
        weights = [layer.name for layer, decision, _ in rows if decision == index]
        inputs = [layer.name for layer, _, decision in rows if decision == index]
        if self.activation == "same":
            return Decision(_common_name(weights), "both", tuple(weights))
        kind: Literal["weight", "activation"] = "weight" if weights else "activation"
        return Decision(f"{_common_name(weights or inputs)}:{kind}", kind, tuple(weights or inputs))

    def _tie(self, word: str) -> list[Any]:
        """One key per layer; layers with equal keys are tied."""
        names = [layer.name for layer in self.layers]
        _check_pattern("tie", word)
        if word == "model":
            return [None] * len(names)
        if word == "qkv":
            return [("input", layer.input_group) for layer in self.layers]
        if word == "block":
            return blocks_of(names)
        if not any(matches(name, word) for name in names):
            raise ConfigError(f"tie: {word!r} matches none of the {len(names)} layers, such as {names[0]!r}")
        return [None if matches(name, word) else name for name in names]


def _check_pattern(setting: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"{setting}: {pattern!r} is no pattern of layer names, such as '*.mlp.*'")


def _check_formats(what: str, found: Sequence[Format], wanted: Sequence[Format]) -> None:
    if tuple(found) != tuple(wanted):
        lists = [", ".join(map(str, formats)) for formats in (found, wanted)]
        raise ConfigError(f"{what} {lists[0]}, the search space has {lists[1]}: use one list of formats for both")


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
