"""What every budget buys: the integer program for many budgets at once, from the scores of one pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from fliqs_hf.allocation import Allocation
from fliqs_hf.checks import is_whole
from fliqs_hf.errors import ConfigError
from fliqs_hf.selection import SearchProblem


class FrontPoint(NamedTuple):
    """The best allocation at its cost.

    Attributes:
        cost: in the unit of the cost table.
        increase: sum of the scores, the expected increase of the loss where the scores are that.
    """

    allocation: Allocation
    cost: float
    increase: float


def sensitivity_front(problem: SearchProblem, scores: Tensor, points: int = 20) -> list[FrontPoint]:
    """The lowest total score under each of `points` budgets, from the cheapest allocation of the space to the dearest.

    Budgets are spaced by equal factors, or by equal steps where the cheapest layers cost nothing. Points that another
    one matches at no more cost are left out, so there may be fewer than `points`, cost rises and the expected increase
    falls strictly.

    Args:
        problem: its target, if it has one, plays no part.
        scores: [D, K], lower is better, such as `fisher_scores(...).decision_scores`.
    Raises: ConfigError: fewer than 2 points. TargetError: the solver gave up.
    """
    if not is_whole(points, 2):
        raise ConfigError(f"points={points!r} must be a whole number, at least 2: the cheapest and the dearest budget")
    low, high = problem.reachable
    fixed = problem.costs.fixed_cost
    # Factors have no meaning from 0 on; and rounded, a budget must not be below what the cheapest costs.
    spaced = np.geomspace if low > fixed else np.linspace
    between = (spaced(low - fixed, high - fixed, points)[1:-1] + fixed).clip(low, high)
    budgets = [low, *between.tolist(), high]
    choices = [problem.best_choice(-scores, low=0.0, high=budget) for budget in budgets]
    values = scores.detach().double().cpu()
    found = [
        FrontPoint(
            problem.space.allocation(choice),
            float(problem.cost(choice)),
            float(values.gather(1, choice[:, None]).sum()),
        )
        for choice in choices
    ]
    front: list[FrontPoint] = []
    for point in sorted(found, key=lambda point: (point.cost, point.increase)):
        if not front or point.increase < front[-1].increase:
            front.append(point)
    return front
