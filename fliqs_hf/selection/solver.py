"""The exact step: the best allocation under constraints on costs, by integer programming (SciPy's HiGHS)."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack
from torch import Tensor

from fliqs_hf.cost import CostTable
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.selection.space import SearchSpace

Array = npt.NDArray[np.float64]
Bound = tuple[float, float]

#: Branch-and-bound nodes after which the solver gives up. A limit on nodes, unlike one on time, stops all processes
#: of a distributed run at the same point.
NODE_LIMIT = 100_000
#: HiGHS may exceed a bound by 1e-6 of it. A choice that does is cut off, which is exact; after so many (identical
#: layers make many such choices) bounds are narrowed by the margin, which may miss a choice within that of a bound.
_CUT_LIMIT = 30
_MARGIN = 2e-6
#: Range of the scores as HiGHS sees them. Its absolute gap and tolerances are 1e-6 or less, so choices whose total
#: scores differ by more than about 1e-10 of the range are told apart.
_SCORE_RANGE = 1e4


class IntegerProgram:
    """Variables: x[d, k] ∈ {0, 1}, one per decision and format; and where a layer's weight and input are decided
    apart, z[p, w, a] ≥ 0 per pair p of decisions with Σ_a z[p, w, a] = x[weight, w] and Σ_w z[p, w, a] = x[input, a],
    which makes z the product of the two exactly: the bilinear cost becomes linear. For each table with peaks one more,
    m ≥ the peak of every layer, in units of the largest: where less cost is better it is the largest of them."""

    def __init__(self, space: SearchSpace, *tables: CostTable) -> None:
        """
        Args:
            tables: of costs, at least one; each may be bounded, and one made least.
        """
        self.space, self.tables = space, tables
        self.decisions, self.formats = len(space.decisions), len(space.formats)
        parts = [self._parts(table) for table in tables]
        self.pairs = list(dict.fromkeys(pair for _, pairs in parts for pair in pairs))
        nothing = np.zeros((self.formats, self.formats))
        peaks = [self._layer_parts(table.peaks.numpy()) if table.peaks is not None else [] for table in tables]
        self.pairs = list(dict.fromkeys([*self.pairs, *(pair for rows in peaks for _, more in rows for pair in more)]))
        self.units = [max(1.0, table.fixed_peak, *table.peaks.flatten().tolist()) if table.peaks is not None else 0.0
                      for table in tables]  # fmt: skip

        def row(own: Array, pairs: dict[tuple[int, int], Array]) -> Array:
            parts = [own.ravel(), *(pairs.get(pair, nothing).ravel() for pair in self.pairs)]
            return np.concatenate([*parts, np.zeros(len(tables))])

        self.costs: list[Array] = [row(own, pairs) for own, pairs in parts]
        self.peaks = [np.stack([row(*one) for one in rows]) if rows else None for rows in peaks]
        for number, unit in enumerate(self.units):
            self.costs[number][number - len(tables)] = unit
        self.structure, self.right = self._structure()
        self.allowed: npt.NDArray[np.bool_] = space.allowed.numpy()
        self.alike = self._alike([*parts, *(one for rows in peaks for one in rows)])

    def _parts(self, table: CostTable) -> tuple[Array, dict[tuple[int, int], Array]]:
        """Costs of single decisions [D, K], and of pairs of them [K, K] where a cost depends on both."""
        pairs: dict[tuple[int, int], Array] = {}
        own = np.zeros((self.decisions, self.formats))
        for single, both in self._layer_parts(table.table.numpy()):
            own += single
            for pair, costs in both.items():
                pairs[pair] = pairs.get(pair, 0.0) + costs
        return own, pairs

    def _layer_parts(self, table: Array) -> list[tuple[Array, dict[tuple[int, int], Array]]]:
        """As `_parts`, of each layer: [L, K, K]."""
        found: list[tuple[Array, dict[tuple[int, int], Array]]] = []
        decisions = zip(self.space.weight_decision.tolist(), self.space.activation_decision.tolist(), strict=True)
        for costs, (w, a) in zip(table, decisions, strict=True):
            own = np.zeros((self.decisions, self.formats))
            found.append((own, {}))
            if w == a:
                own[w] += costs.diagonal()
            elif (costs == costs[:, :1]).all():  # as bytes, which do not depend on the input's format
                own[w] += costs[:, 0]
            elif (costs == costs[:1]).all():  # as inputs and outputs, which do not depend on the weight's
                own[a] += costs[0]
            else:
                found[-1][1][w, a] = costs
        return found

    def extreme(self, sign: float, table: int = 0) -> Tensor:
        """The choice that costs most for sign +1, least for −1, by one of the tables."""
        peaks = self.peaks[table]
        if sign < 0 or peaks is None:
            return self._found(sign * self._normal(table))
        most = [self._found((self.costs[table] + peak) / self.units[table]) for peak in peaks]  # with each in turn
        return max(most, key=lambda choice: float(self.tables[table].cost(*self.space.indices(choice))))

    def _found(self, gain: Array) -> Tensor:
        choice = self._milp(gain, [], self.allowed)
        assert choice is not None, "every decision has a format"
        return choice

    def least(self, table: int, bounds: Sequence[Bound]) -> Tensor | None:
        """The choice of least cost by one table within bounds; None where there is none."""
        return self._within(-self._normal(table), bounds, self.allowed)

    def solve(self, scores: Tensor, bounds: Sequence[Bound]) -> Tensor | None:
        """The choice of highest total score whose costs are within bounds: int64 [D]; None where there is none.

        Args:
            bounds: lowest and highest cost by each table, which may be infinite.
        Raises: ConfigError: scores [D, K] of another shape or not finite. TargetError: the solver gave up.
        """
        values = self._scaled(scores)
        gain = np.zeros(len(self.costs[0]))
        gain[: self.decisions * self.formats] = values.ravel()
        return self._within(gain, bounds, self._undominated(values))

    def _within(self, gain: Array, bounds: Sequence[Bound], allowed: npt.NDArray[np.bool_]) -> Tensor | None:
        """The choice of highest Σ gain·(x, z) within bounds, which hold exactly."""
        for margin in (0.0, _MARGIN):
            constraints = [
                _row(costs, low - table.fixed_cost, high - table.fixed_cost, margin)
                for costs, table, (low, high) in zip(self.costs, self.tables, bounds, strict=True)
                if math.isfinite(low) or math.isfinite(high)
            ]
            for _ in range(_CUT_LIMIT):
                choice = self._milp(gain, constraints, allowed)
                if choice is None:
                    break
                index = self.space.indices(choice)
                found = (float(table.cost(*index)) for table in self.tables)
                if all(low <= cost <= high for cost, (low, high) in zip(found, bounds, strict=True)):
                    return choice
                constraints.append(self._other_than(choice))
        return None

    def _normal(self, table: int) -> Array:
        costs = self.costs[table]
        return costs / (np.abs(costs).max() or 1.0)

    def _milp(self, gain: Array, constraints: list[LinearConstraint], allowed: npt.NDArray[np.bool_]) -> Tensor | None:
        """The choice of highest Σ gain·(x, z) among the `allowed`; None where the constraints leave none."""
        binary = self.decisions * self.formats
        upper, lower = np.ones(len(gain)), np.zeros(len(gain))
        upper[:binary] = allowed.ravel()
        for number, (peaks, unit) in enumerate(zip(self.peaks, self.units, strict=True)):
            if peaks is None:
                continue
            largest = number - len(self.tables)
            lower[largest] = self.tables[number].fixed_peak / unit
            rows = peaks / unit
            rows[:, largest] = -1
            constraints = [*constraints, LinearConstraint(rows, -np.inf, 0)]
        integrality = np.zeros(len(gain))
        integrality[:binary] = 1
        with _printing_to_stderr():
            result = milp(
                -gain,
                constraints=[LinearConstraint(self.structure, self.right, self.right), *constraints],
                bounds=Bounds(lower, upper),
                integrality=integrality,
                options={"mip_rel_gap": 0.0, "node_limit": NODE_LIMIT},
            )
        infeasible = 2
        if result.status == infeasible:
            return None
        if not result.success:
            raise TargetError(
                f"the integer program over {self.decisions} decisions was not solved to the end ({result.message}); "
                f"tie layers or use fewer formats"
            )
        return torch.from_numpy(result.x[:binary].reshape(self.decisions, self.formats).argmax(1))

    @staticmethod
    def _alike(parts: Sequence[tuple[Array, dict[tuple[int, int], Array]]]) -> Array:
        """Number of the first format that costs the same by every table, whatever else is chosen, [D, K]."""
        costs: list[list[Array]] = [[] for _ in parts[0][0]]
        for own, pairs in parts:
            for decision, row in enumerate(own):
                costs[decision].append(row[:, None])
            for (weight, activation), matrix in pairs.items():
                costs[weight].append(matrix)
                costs[activation].append(matrix.T)
        every = (np.concatenate(columns, axis=1) for columns in costs)
        return np.stack([(matrix[:, None] == matrix[None]).all(-1).argmax(1) for matrix in every])

    def _undominated(self, values: Array) -> npt.NDArray[np.bool_]:
        """Of allowed formats of one cost, only that of the highest score: int4 or e2m1, never both. Exact, and it
        makes the products of two decisions a third as many."""
        kept = np.zeros_like(self.allowed)
        for d, alike in enumerate(self.alike):
            scores = np.where(self.allowed[d], values[d], -np.inf)
            for first in np.unique(alike[self.allowed[d]]):
                kept[d, np.where(alike == first, scores, -np.inf).argmax()] = True
        return kept

    def _scaled(self, scores: Tensor) -> Array:
        """Scores with 0 for the best of each decision, in a range that suits the solver."""
        wanted = (self.decisions, self.formats)
        if scores.shape != wanted or not bool(scores.isfinite().all()):
            raise ConfigError(
                f"scores {list(scores.shape)} with {int((~scores.isfinite()).sum())} that are not finite: give a "
                f"finite one for each choice of each decision, {list(wanted)}; leave formats that must not be chosen "
                "out by `exclude` of the search space"
            )
        values: Array = scores.detach().double().cpu().numpy()
        values = values - values.max(1, keepdims=True)
        return values * (_SCORE_RANGE / max(float(-values.min()), 1e-300))

    def _other_than(self, choice: Tensor) -> LinearConstraint:
        """Not exactly this choice: Σ x[d, choice[d]] ≤ D − 1."""
        row = np.zeros(len(self.costs[0]))
        row[np.arange(self.decisions) * self.formats + choice.numpy()] = 1
        return LinearConstraint(row[None], -np.inf, self.decisions - 1)

    def _structure(self) -> tuple[csr_array, Array]:
        """Rows Σ_k x[d, k] = 1, then Σ_a z[p, w, a] − x[weight, w] = 0 and Σ_w z[p, w, a] − x[input, a] = 0."""
        d, k = self.decisions, self.formats
        binary, total = d * k, len(self.costs[0])
        blocks = [coo_array((np.ones(binary), (np.repeat(np.arange(d), k), np.arange(binary))), shape=(d, total))]
        if self.pairs:
            blocks.append(self._products(total))
        return vstack(blocks).tocsr(), np.concatenate([np.ones(d), np.zeros(2 * k * len(self.pairs))])

    def _products(self, total: int) -> coo_array:
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


def _row(costs: Array, low: float, high: float, margin: float) -> LinearConstraint:
    """low ≤ Σ costs·(x, z) ≤ high, in units of the upper bound."""
    unit = abs(high if math.isfinite(high) else low) or 1.0
    return LinearConstraint((costs / unit)[None], low / unit + margin, high / unit - margin)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """What native code prints within this context goes to stderr: HiGHS writes some warnings to stdout whatever it is
    told, and a command's answer is there."""
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(answers, 1)
        os.close(answers)
