"""A floor of accuracy for models that are not trained: the precision that it takes, and a statement that holds.

Allocations are tested from the most precise one down, and the first that misses the floor ends it. Because the order
is fixed before any is seen and nothing is tested after a failure, the chance that a model is delivered which is below
the floor is at most 1 − confidence, however many were tested.

Source: fixed-sequence testing, Maurer, Hothorn and Lehmacher 1995; the bounds are those of `validation.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.limits import check_values
from fliqs_hf.selection import SearchProblem
from fliqs_hf.validation.statistics import broken_and_repaired, drop_bound, gate, proportion
from fliqs_hf.wording import level, percent, points

#: Allocations between the most precise one and the target, both included.
STEPS = 6


@dataclass(frozen=True)
class Floor:
    """What the accuracy on held-out images must be, with a one-sided confidence.

    Attributes:
        max_drop: most that may be lost against fp32, a fraction. min_accuracy: least top-1, a fraction.

    Raises: ConfigError: neither of them, or a value out of range.
    """

    max_drop: float | None
    min_accuracy: float | None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.max_drop is None and self.min_accuracy is None:
            raise ConfigError("a floor is max_drop or min_accuracy: give one")
        drop = None if self.max_drop is None else 100 * self.max_drop  # limits are those of arguments, in points
        check_values({"max_drop": drop, "min_accuracy": self.min_accuracy, "confidence": self.confidence})

    def __str__(self) -> str:
        said = [] if self.max_drop is None else [f"at most {points(self.max_drop)} points below fp32"]
        said += [] if self.min_accuracy is None else [f"at least {percent(self.min_accuracy)} right"]
        return f"{' and '.join(said)}, with {level(self.confidence)} confidence"


@dataclass(frozen=True)
class FloorTest:
    """One packed model on the held-out images; fractions.

    Attributes:
        low: one-sided lower bound of the accuracy. drop, highest_drop: against fp32, and its one-sided upper bound.
        more_images: in all, that would settle an undecided drop; None if decided.
    """

    allocation: Allocation
    met: bool
    images: int
    accuracy: float
    low: float
    drop: float
    highest_drop: float
    more_images: int | None

    @classmethod
    def of(
        cls, allocation: Allocation, original: NDArray[np.bool_], packed: NDArray[np.bool_], floor: Floor
    ) -> FloorTest:
        """
        Args:
            original, packed: bool [images], whether fp32 and the packed model got each image right.
        """
        images, correct = len(packed), int(packed.sum())
        broken, repaired = broken_and_repaired(original, packed)
        highest = drop_bound(broken, repaired, images, floor.confidence, "upper")
        # A two-sided interval of level 2c − 1 has one-sided bounds of level c.
        low = proportion(correct, images, 2 * floor.confidence - 1).low
        met = floor.max_drop is None or highest < floor.max_drop
        met = met and (floor.min_accuracy is None or low >= floor.min_accuracy)
        decided = None if floor.max_drop is None else gate(broken, repaired, images, floor.max_drop, floor.confidence)
        drop = (broken - repaired) / images
        return cls(
            allocation, met, images, correct / images, low, drop, highest, None if decided is None else decided.images
        )

    def __str__(self) -> str:
        return (
            f"{percent(self.accuracy)} of {self.images:,} images right (at least {percent(self.low)}), "
            f"{points(self.drop)} points below fp32 (at most {points(self.highest_drop)})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "allocation": self.allocation.to_dict()}


def candidates(problem: SearchProblem, scores: Tensor, steps: int = STEPS) -> list[Allocation]:
    """What to test, the most precise first and the one that is wanted last.

    Args:
        problem: a target that is a cap, or limits, leave one: more precision than that is not allowed. From a
            two-sided target precision may rise up to the dearest allocation; without one it starts at the cheapest.
        scores: [D, K], lower is better. steps: at most.
    Raises: TargetError: out of reach.
    """
    space, target = problem.space, problem.target
    if target is not None and (target.cap or problem.limits):
        return [space.allocation(problem.choice_at_target(-scores))]
    low, high = problem.reachable
    start = low if target is None else problem.target_cost
    fixed = problem.costs.fixed_cost
    budgets = np.geomspace(start - fixed, high - fixed, steps)[1:-1] + fixed if start < high else ()
    wanted = (
        problem.best_choice(-scores, low=-math.inf, high=low) if target is None else problem.choice_at_target(-scores)
    )
    choices = [wanted, *(problem.best_choice(-scores, low=-math.inf, high=float(budget)) for budget in budgets)]
    choices.append(problem.best_choice(-scores, low=-math.inf, high=high))
    distinct = dict.fromkeys(tuple(choice.tolist()) for choice in choices)
    return [space.allocation(choices[0].new_tensor(choice)) for choice in reversed(distinct)]


def descend(
    allocations: Sequence[Allocation],
    original: NDArray[np.bool_],
    judge: Callable[[Allocation], NDArray[np.bool_]],
    floor: Floor,
) -> list[FloorTest]:
    """Test in this order until one misses the floor.

    Args:
        judge: which of the held-out images the model packed in an allocation gets right.
    Returns: what was tested; the last that met the floor is the one to take, and the first missed it where none did.
    """
    trials: list[FloorTest] = []
    for allocation in allocations:
        trials.append(FloorTest.of(allocation, original, judge(allocation), floor))
        if not trials[-1].met:
            break
    return trials


def record(trials: Sequence[FloorTest], floor: Floor) -> dict[str, Any]:
    """For `results.json`."""
    return {
        "max_drop": floor.max_drop, "min_accuracy": floor.min_accuracy, "confidence": floor.confidence,
        "trials": [trial.to_dict() for trial in trials],
    }  # fmt: skip
