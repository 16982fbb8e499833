"""The exact step: the best allocation under a cost constraint, by integer programming (SciPy's HiGHS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack
from torch import Tensor

from fliqs_hf.cost import CostTable
from fliqs_hf.errors import TargetError
from fliqs_hf.search.space import SearchSpace


def reachable_range(space: SearchSpace, table: CostTable) -> tuple[float, float]:
    """Cheapest and dearest cost over the space. Costs grow with bits, so both ends take one format throughout where
    decisions are tied; otherwise each end is the exact optimum of the integer program without a constraint."""
    zero = torch.zeros(len(space.decisions), len(space.formats))
    problem = _Problem(space, table)
    return tuple(float(space.cost_of(table, problem.solve(zero, sign * problem.costs))) for sign in (1, -1))  # type: ignore[return-value]


def best_choice(
    space: SearchSpace, table: CostTable, scores: Tensor, *, low: float, high: float, seconds: float = 60.0
) -> Tensor:
    """The choice of highest total score whose cost is within [low, high].

    Args:
        scores: [D, K], such as log-probabilities or −sensitivities; the total is summed over decisions.
        low, high: in the unit of `table`.
    Returns: int64 [D], exactly optimal (HiGHS' relative gap is set to 0).
    Raises: TargetError: no choice has a cost in that range; it names the nearest costs that are reachable.
    """
    problem = _Problem(space, table)
    # HiGHS may exceed a bound by its feasibility tolerance, 1e-6 of the limit; a cap must hold exactly.
    for margin in (0.0, 2e-6):
        choice = problem.solve(scores, None, low * (1 + margin), high * (1 - margin), seconds)
        if choice is None or low <= float(space.cost_of(table, choice)) <= high:
            break
    if choice is None:
        cheapest, dearest = reachable_range(space, table)
        raise TargetError(
            f"no allocation costs between {low:.6g} and {high:.6g}; the space reaches from {cheapest:.6g} to "
            f"{dearest:.6g}" + (", with gaps: widen the range, tie fewer layers or add formats" if cheapest <= high else "")
        )
    return choice


def pareto_front(
    space: SearchSpace, table: CostTable, scores: Tensor, targets: Sequence[float], tolerance: float = 0.03
) -> list[Tensor]:
    """`best_choice` for several targets, each within [1 − tolerance, 1] of its target."""
    return [best_choice(space, table, scores, low=(1 - tolerance) * t, high=t) for t in targets]


class _Problem:
    """Variables: x[d, k] ∈ {0, 1}, one per decision and format; and where a layer's weight and input are decided
    apart, z[p, w, a] ≥ 0 per pair p of decisions with Σ_a z[p, w, a] = x[weight, w] and Σ_w z[p, w, a] = x[input, a],
    which makes z the product of the two exactly."""

    def __init__(self, space: SearchSpace, table: CostTable) -> None:
        self.decisions, self.formats = len(space.decisions), len(space.formats)
        self.fixed = table.fixed_cost
        costs = table.table.numpy()
        pairs: dict[tuple[int, int], np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
        own = np.zeros((self.decisions, self.formats))
        for row, (w, a) in enumerate(zip(space.weight_decision.tolist(), space.activation_decision.tolist(), strict=True)):
            if w == a:
                own[w] += costs[row].diagonal()
            elif table.kind == "weight_bytes":  # does not depend on the input's format
                own[w] += costs[row][:, 0]
            else:
                pairs[w, a] = pairs.get((w, a), 0.0) + costs[row]
        self.pairs = list(pairs)
        self.costs = np.concatenate([own.ravel(), *(matrix.ravel() for matrix in pairs.values())])

    def solve(
        self,
        scores: Tensor,
        price: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None,
        low: float = -np.inf,
        high: float = np.inf,
        seconds: float = 60.0,
    ) -> Tensor | None:
        """Maximise scores − price subject to low ≤ cost ≤ high; None where that is infeasible."""
        d, k = self.decisions, self.formats
        binary, total = d * k, len(self.costs)
        gain = np.zeros(total)
        gain[:binary] = scores.detach().double().cpu().numpy().ravel()
        if price is not None:
            gain -= price / max(np.abs(price).max(), 1e-300)
        one = coo_array((np.ones(binary), (np.repeat(np.arange(d), k), np.arange(binary))), shape=(d, total))
        blocks, right = [one], [np.ones(d)]
        if self.pairs:
            blocks.append(self._products(total))
            right.append(np.zeros(2 * k * len(self.pairs)))
        rows = vstack(blocks).tocsr()
        equal = np.concatenate(right)
        constraints = [LinearConstraint(rows, equal, equal)]
        if np.isfinite(low) or np.isfinite(high):
            unit = high if np.isfinite(high) else low
            bounds = (low - self.fixed) / unit, (high - self.fixed) / unit
            constraints.append(LinearConstraint((self.costs / unit)[None], *bounds))
        integrality = np.zeros(total)
        integrality[:binary] = 1
        result = milp(
            -gain,
            constraints=constraints,
            bounds=Bounds(0, 1),
            integrality=integrality,
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        return torch.from_numpy(result.x[:binary].reshape(d, k).argmax(1))

    def _products(self, total: int) -> coo_array:
        """Rows Σ_a z[p, w, a] − x[weight, w] = 0 and Σ_w z[p, w, a] − x[input, a] = 0."""
        k, binary = self.formats, self.decisions * self.formats
        values, rows, columns = [], [], []
        for p, (weight, activation) in enumerate(self.pairs):
            z = binary + p * k * k + np.arange(k * k).reshape(k, k)
            for index, (decision, parts) in enumerate(((weight, z), (activation, z.T))):
                row = (2 * p + index) * k + np.arange(k)
                rows += [np.repeat(row, k), row]
                columns += [parts.ravel(), decision * k + np.arange(k)]
                values += [np.ones(k * k), -np.ones(k)]
        shape = (2 * k * len(self.pairs), total)
        return coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
