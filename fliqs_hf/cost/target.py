"""What a search aims at, in the units that people think in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fliqs_hf.checks import check_fields, is_number
from fliqs_hf.cost.models import BOPS, FP32_BITS, MEMORY, WEIGHT_BYTES, Cost, registered
from fliqs_hf.cost.table import CostTable
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.wording import engineering, figure, percent, short, size


@dataclass(frozen=True)
class TargetKind:
    """A unit that targets are given in.

    Attributes:
        name: of the argument, after "target_".
        cost: that it is measured by. to_cost, from_cost: between this unit and that of a table of the cost.
        help: what a value means. said: a value in a sentence.
        highest: value that makes sense. is_limit: always a cap, never exceeded.
    """

    name: str
    cost: Cost
    to_cost: Callable[[float, CostTable], float]
    from_cost: Callable[[float, CostTable], float]
    help: str
    said: Callable[[float], str]
    highest: float = math.inf
    is_limit: bool = False


def target_kinds() -> dict[str, TargetKind]:
    """By name: those of BOPs and bytes, then one per cost that was registered beside them, in its own unit."""
    others = [cost for cost in registered() if cost not in (BOPS, WEIGHT_BYTES, MEMORY)]
    return {**_BUILT_IN, **{cost.name: _of_cost(cost) for cost in others}}


@dataclass(frozen=True)
class Target:
    """The cost that a search aims at.

    Attributes:
        kind: "bits" (the BOPs of the uniform model of so many bits; fractions allowed), "bops", "size_mb"
            (10**6 bytes of weights, with whatever the table's `fixed_cost` adds), "ratio" (to the BOPs of the fp32
            model: 1/64 is 4 bits), or the name of a registered cost.
        value: in the unit of `kind`.
        cap: an upper limit, never exceeded; otherwise two-sided, met within 2 % either way.

    Raises: TargetError: an unknown kind, or a value that is no positive number, above 32 bits, or above a ratio of 1.
    """

    kind: str
    value: float
    cap: bool = False

    #: A two-sided target is met where |cost / target - 1| is at most this.
    TOLERANCE: ClassVar[float] = 0.02

    def __post_init__(self) -> None:
        kinds = target_kinds()
        if not (isinstance(self.kind, str) and self.kind in kinds):
            raise TargetError(f"unknown kind of target {self.kind!r}: use {', '.join(kinds)}")
        check_fields(self, TargetError, ["cap"])
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TargetError(f"target_{self.kind}={self.value!r} must be a number")
        highest = kinds[self.kind].highest
        if not (is_number(self.value, 0, highest) and self.value):
            limit = f", at most {highest:g}" if math.isfinite(highest) else ""
            raise TargetError(f"target_{self.kind}={self.value!r} must be a positive number{limit}")

    @classmethod
    def of(cls, *, cap: bool = False, **target: float | None) -> Target:
        """From exactly one argument such as `target_bits=4`; see `target_kinds`. A size is a cap only where it says.

        Raises: TargetError: none, several, or an unknown one.
        """
        known = [f"target_{kind}" for kind in target_kinds()]
        given = [(name, value) for name, value in target.items() if value is not None]
        for name in target:
            if name not in known:
                raise TargetError(f"unknown kind of target {name!r}: use {', '.join(known)}")
        if len(given) != 1:
            raise TargetError(
                f"give exactly one of {', '.join(known)}, "
                f"not {' and '.join(f'{name}={value!r}' for name, value in given) or 'none'}"
            )
        name, value = given[0]
        return cls(name.removeprefix("target_"), value, cap)

    @property
    def label(self) -> str:
        """For names of folders and repositories, such as "bits-3.5" or "bops-1e09"."""
        return f"{self.kind}-{self.value:g}".replace("+", "")

    @property
    def cost_kind(self) -> str:
        """The name of the cost that this target is measured by."""
        return self._kind.cost.name

    @property
    def _kind(self) -> TargetKind:
        return target_kinds()[self.kind]

    def resolve(self, table: CostTable, reachable: tuple[float, float] | None = None) -> float:
        """The target in the unit of `table`.

        Args:
            reachable: cheapest and dearest cost of the search space; default: the table's own, which is the right
                one where every layer may take every format.
        Raises: TargetError: below the cheapest or above the dearest allocation; it gives the range in the unit of
            the target. ConfigError: a table of the wrong kind.
        """
        kind, wanted = self._kind, self.in_cost(table)
        low, high = table.reachable if reachable is None else reachable
        slack = 1e-9 * high  # a ratio such as 1/64 is rounded when it is multiplied out
        if low - slack <= wanted <= high + slack:
            return min(max(wanted, low), high)
        problem, remedy = (
            ("below the cheapest", "raise it or allow formats of fewer bits, such as those of search_space mixed")
            if wanted < low
            else ("above the dearest", "lower it or allow formats of more bits")
        )
        raise TargetError(
            f"target_{self.kind}={figure(self.value)} is {problem} allocation of the search space, which reaches from "
            f"{figure(kind.from_cost(low, table))} to {figure(kind.from_cost(high, table))}; {remedy}"
        )

    def in_cost(self, table: CostTable) -> float:
        """The target in the unit of `table`, in reach or not. Raises: ConfigError: a table of the wrong kind."""
        kind = self._kind
        if table.measure != kind.cost:
            raise ConfigError(
                f"a target in {self.kind} needs a cost table of {kind.cost.name}, not of {table.measure.name}"
            )
        return kind.to_cost(self.value, table)

    def in_own_unit(self, cost: float, table: CostTable) -> float:
        """A cost of `table` in the unit of this target: the inverse of `in_cost`."""
        return self._kind.from_cost(cost, table)

    def is_met(self, cost: float, resolved: float) -> bool:
        """Whether `cost` meets the target whose cost `resolve` gave."""
        return cost <= resolved if self.cap else abs(cost / resolved - 1) <= self.TOLERANCE


def given_targets(arguments: Mapping[str, Any]) -> dict[str, list[float]]:
    """Values by kind, from arguments such as `target_bits`, and from `target`, a list of "NAME=VALUE".

    Raises: TargetError: a name that is no kind of target, or a value that is no number.
    """
    kinds = target_kinds()
    found: dict[str, list[float]] = {}
    for name, value in arguments.items():
        if name.startswith("target_") and name.removeprefix("target_") not in kinds and value not in (None, []):
            remedy = "give latency_table, as fliqs-hf profile writes it" if "latency" in name else "register it"
            raise TargetError(f"{name}={value!r}: there is no such cost; {remedy}")
    for name in kinds:
        value = arguments.get(f"target_{name}")
        if value is not None and value != []:
            found[name] = list(value) if isinstance(value, list) else [value]
    for text in arguments.get("target") or []:
        name, _, number = str(text).partition("=")
        if name not in kinds:
            raise TargetError(f"target {text!r}: give NAME=VALUE with a NAME of {', '.join(kinds)}")
        try:
            value = float(number)
        except ValueError as error:
            raise TargetError(f"target {text!r}: {number!r} is no number; give NAME=VALUE") from error
        found.setdefault(name, []).append(value)
    return found


def described(record: Mapping[str, Any]) -> str:
    """What a search aimed at, from the `target` of its results.json.

    Raises: TypeError: a value that is no number.
    """
    kinds = target_kinds()
    known = [kinds[kind].said(value) for kind, value in record.items() if kind in kinds]
    return ", ".join(known or [f"{kind} {value}" for kind, value in record.items()])


def _of_cost(cost: Cost) -> TargetKind:
    """Of a registered cost, in its own unit: what costs money, energy or time is a limit."""
    return TargetKind(
        cost.name,
        cost,
        lambda value, table: value,
        lambda value, table: value,
        f"{cost.unit}, never exceeded",
        lambda value: f"at most {cost.show(value)} {cost.unit}",
        is_limit=True,
    )


def _same(value: float, table: CostTable) -> float:
    return float(value)


def _bits_of(cost: float, table: CostTable) -> float:
    return math.sqrt((cost - table.fixed_cost) / sum(layer.macs for layer in table.layers))


_BUILT_IN = {
    kind.name: kind
    for kind in (
        TargetKind(
            "bits", BOPS, lambda value, table: table.uniform_bits(value), _bits_of,
            "bit operations of the uniform model of so many bits",
            lambda value: f"the bit operations of a uniform {short(value)}-bit model", FP32_BITS,
        ),
        TargetKind(
            "bops", BOPS, _same, _same, "bit operations per image",
            lambda value: f"{engineering(value)} bit operations per image",
        ),
        TargetKind(
            "size_mb", WEIGHT_BYTES, lambda value, table: value * 1e6, lambda cost, table: cost / 1e6,
            "size of the checkpoint in 10^6 bytes, never exceeded",
            lambda value: f"a checkpoint of at most {size(value * 1e6)}", is_limit=True,
        ),
        TargetKind(
            "memory_mb", MEMORY, lambda value, table: value * 1e6, lambda cost, table: cost / 1e6,
            "weights with the largest input and output of a layer in 10^6 bytes, never exceeded",
            lambda value: f"at most {size(value * 1e6)} of weights and activations", is_limit=True,
        ),
        TargetKind(
            "ratio", BOPS, lambda value, table: value * table.fp32, lambda cost, table: cost / table.fp32,
            "bit operations over those of fp32",
            lambda value: f"{percent(value)} of the bit operations of fp32", 1,
        ),
    )
}  # fmt: skip
