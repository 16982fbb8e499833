"""`SearchProblem`: what is chosen, what it costs, and what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fliqs_hf.cost import CostTable, Target
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.selection.solver import IntegerProgram
from fliqs_hf.selection.space import SearchSpace
from fliqs_hf.wording import figure


@dataclass(frozen=True)
class CostLimit:
    """A cost that an allocation must not exceed, beside the target.

    Raises: ConfigError: a table of costs of another kind.
    """

    costs: CostTable
    target: Target

    def __post_init__(self) -> None:
        self.target.in_cost(self.costs)


@dataclass(frozen=True)
class SearchProblem:
    """The decisions of a search with their costs and the target that they must meet, for every way of choosing.

    Attributes:
        costs: of the layers and formats of `space`, of the kind that `target` is measured by.
        target: None where only costs matter, as for a whole front.
        limits: on other costs; every choice that is made keeps them all, exactly.

    Raises: ConfigError: a table of costs of other layers or formats.
    """

    space: SearchSpace
    costs: CostTable
    target: Target | None = None
    limits: tuple[CostLimit, ...] = ()

    def __post_init__(self) -> None:
        for table in (self.costs, *(limit.costs for limit in self.limits)):
            self.space.check_table(table)

    @property
    def aim(self) -> Target:
        """The target. Raises: ConfigError: there is none."""
        if self.target is None:
            raise ConfigError("this search problem has no target: give one, SearchProblem(space, costs, target)")
        return self.target

    @cached_property
    def reachable(self) -> tuple[float, float]:
        """Cost of the cheapest and of the dearest allocation of the space, exactly."""
        cheapest, dearest = (self._program.extreme(sign) for sign in (-1.0, 1.0))
        return float(self.cost(cheapest)), float(self.cost(dearest))

    @cached_property
    def target_cost(self) -> float:
        """The target in the unit of `costs`. Raises: TargetError: out of reach of the space. ConfigError: none."""
        low, high = self.reachable
        if self.limits and self.aim.cap:  # one of several limits may be far above what there is
            high = max(high, self.aim.in_cost(self.costs))
        wanted = self.aim.resolve(self.costs, (low, high))
        if self.limits:
            self._check_together(wanted)
        return wanted

    @cached_property
    def highest(self) -> tuple[float, ...]:
        """The limits in the units of their costs. Raises: TargetError: one that no allocation keeps."""
        found = []
        for number, limit in enumerate(self.limits, 1):
            low = self._cost_by(limit.costs, self._program.extreme(-1.0, number))
            wanted = limit.target.in_cost(limit.costs)
            found.append(limit.target.resolve(limit.costs, (low, max(wanted, low))))
        return tuple(found)

    def used(self, choice: Tensor) -> dict[str, float]:
        """The share of the target and of each limit that one choice [D] takes, by their kinds."""
        found = {self.aim.kind: float(self.cost(choice)) / self.target_cost}
        for limit, high in zip(self.limits, self.highest, strict=True):
            found[limit.target.kind] = self._cost_by(limit.costs, choice) / high
        return found

    def keeps_limits(self, choice: Tensor) -> bool:
        """Whether one choice [D] exceeds none of `limits`."""
        costs = (self._cost_by(limit.costs, choice) for limit in self.limits)
        return all(cost <= high for cost, high in zip(costs, self.highest, strict=True))

    def excess(self, choice: Tensor) -> Tensor:
        """Σ over the limits of how far choices [..., D] exceed them, as a share of each: float64 [...]."""
        index = self.space.indices(choice)
        found = torch.zeros(choice.shape[:-1], dtype=torch.float64, device=choice.device)
        for limit, high in zip(self.limits, self.highest, strict=True):
            found = found + (limit.costs.cost(*index) / high - 1).clamp(min=0)
        return found

    def expected_excess(self, probabilities: Tensor) -> Tensor:
        """Σ over the limits of the square of how far the expected costs exceed them: float64 [], differentiable."""
        found = torch.zeros((), dtype=torch.float64, device=probabilities.device)
        for limit, high in zip(self.limits, self.highest, strict=True):
            found = found + (self._expected(limit.costs, probabilities) / high - 1).clamp(min=0).square()
        return found

    def cost(self, choice: Tensor) -> Tensor:
        """Cost of choices [..., D]: float64 [...], on their device."""
        return self.costs.cost(*self.space.indices(choice))

    def expected_cost(self, probabilities: Tensor) -> Tensor:
        """Expected cost when decisions are drawn independently from `probabilities` [D, K]: float64 scalar.

        Exact and differentiable, but for a cost that counts the largest peak of a layer: of that it takes the largest
        expected one, which is at most the expected largest. Layers whose two decisions are one cost Σ_k p_k T[k, k],
        others Σ_wa p_w p_a T[w, a].
        """
        return self._expected(self.costs, probabilities)

    def best_choice(self, scores: Tensor, *, low: float, high: float) -> Tensor:
        """The choice of highest total score whose cost is within [low, high], whatever the target, and that keeps
        the limits.

        The bounds hold exactly: costs are recomputed, and a choice that only the solver's tolerance admits is cut
        off. The score is optimal to about 1e-10 of the range of `scores` per decision.

        Args:
            scores: [D, K], finite, such as log-probabilities or −sensitivities; the total is summed over decisions.
            low, high: in the unit of `costs`; `low` may be −inf.
        Returns: int64 [D], on the CPU.
        Raises: TargetError: no choice has a cost in that range (it names the range of the space), or the solver gave
            up. ConfigError: scores of another shape or not finite, or bounds that are no numbers.
        """
        low, high = _number("low", low), _number("high", high)
        if (choice := self._program.solve(scores, self._bounds(low, high))) is not None:
            return choice
        cheapest, dearest = self.reachable
        reason = (
            "the space has a gap there, or the limits leave none: widen the range, tie fewer layers or add formats"
            if self.limits and cheapest <= high and low <= dearest
            else "the space has a gap there: widen the range, tie fewer layers or add formats"
            if cheapest <= high and low <= dearest
            else "choose a target within that"
        )
        raise TargetError(
            f"no allocation costs between {figure(low)} and {figure(high)}; the space reaches "
            f"from {figure(cheapest)} to {figure(dearest)}; {reason}"
        )

    def choice_at_target(self, scores: Tensor, band: float = 0.03) -> Tensor:
        """The choice of highest total score that meets the target.

        It costs between 1 − `band` and 1 times the target, and a two-sided target is met within its tolerance. Where
        no choice lies in that band, it is widened to what the target allows. With limits, a cap has no such band:
        which of the costs is used up is not known.

        Args:
            scores: [D, K], as for `best_choice`.
        Returns: int64 [D], on the CPU.
        Raises: TargetError: the target is outside the range of the space, or in a gap of it.
        """
        target, cost, band = self.aim, self.target_cost, _number("band", band)
        tolerance = Target.TOLERANCE - 1e-9  # rounding of cost / target must not exceed it
        band = band if target.cap else min(band, tolerance)
        if self.limits and target.cap:
            return self.best_choice(scores, low=-math.inf, high=cost)
        try:
            return self.best_choice(scores, low=(1 - band) * cost, high=cost)
        except TargetError:
            low, high = (0.0, 1.0) if target.cap else (1 - tolerance, 1 + tolerance)
            return self.best_choice(scores, low=low * cost, high=high * cost)

    def _expected(self, table: CostTable, probabilities: Tensor) -> Tensor:
        costs, _ = table.on(probabilities.device)
        p = probabilities.double()
        weight_decision, activation_decision = self.space.decisions_on(p.device)
        weight, activation = p[weight_decision], p[activation_decision]
        tied = weight_decision == activation_decision

        def expected(values: Tensor) -> Tensor:
            diagonal = (weight * values.diagonal(dim1=1, dim2=2)).sum(1)
            return torch.where(tied, diagonal, torch.einsum("lw,la,lwa->l", weight, activation, values))

        cost = expected(costs).sum() + table.fixed_cost
        if table.peaks is None:
            return cost
        return cost + expected(table.peaks.to(p.device)).amax().clamp(min=table.fixed_peak)

    def _bounds(self, low: float, high: float) -> list[tuple[float, float]]:
        return [(low, high), *((-math.inf, most) for most in self.highest)]

    def _cost_by(self, costs: CostTable, choice: Tensor) -> float:
        return float(costs.cost(*self.space.indices(choice)))

    def _check_together(self, wanted: float) -> None:
        """Raises: TargetError: no allocation meets the target and all limits; with the nearest value of each."""
        least = 0.0 if self.aim.cap else (1 - Target.TOLERANCE) * wanted
        bounds = self._bounds(least, wanted if self.aim.cap else (1 + Target.TOLERANCE) * wanted)
        if self._program.least(0, bounds) is not None:
            return
        every = [(self.costs, self.aim), *((limit.costs, limit.target) for limit in self.limits)]
        said, names = [], []
        for number, (costs, target) in enumerate(every):
            names.append(f"target_{target.kind}={figure(target.value)}")
            others = [*bounds[:number], (-math.inf, math.inf), *bounds[number + 1 :]]
            if (choice := self._program.least(number, others)) is not None:
                nearest = _rounded_up(target.in_own_unit(self._cost_by(costs, choice), costs))
                said.append(f"target_{target.kind} can be had from {figure(nearest)} on")
        remedy = "; or ".join(said) or "no single one of them is to blame, so more than one has to be raised"
        raise TargetError(
            f"no allocation of the search space meets {' and '.join(names)} together, though some meet each alone. "
            f"With the others as they are, {remedy}"
        )

    @cached_property
    def _program(self) -> IntegerProgram:
        return IntegerProgram(self.space, self.costs, *(limit.costs for limit in self.limits))


def _rounded_up(value: float) -> float:
    """To what `figure` shows of it, so that what it shows can be kept."""
    if value <= 0:
        return value
    digits = 5 - math.floor(math.log10(value)) if value < 999_999 else 0
    return math.ceil(value * 10.0**digits) / 10.0**digits


def _number(name: str, value: object) -> float:
    """Raises: ConfigError: `value` is no number."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{name}={value!r} must be a number")
    return number
