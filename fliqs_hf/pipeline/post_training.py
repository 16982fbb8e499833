"""Mixed precision without training: sensitivities from one pass over calibration images, then the integer program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo, Target, trace_layers
from fliqs_hf.cost.choices import choices
from fliqs_hf.formats import Format
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.nn.finite import check_finite
from fliqs_hf.pipeline.costs import search_problem
from fliqs_hf.selection import Repeatable, SearchProblem, SearchSpace, Sensitivity, find_score
from fliqs_hf.selection.space import ActivationMode
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task


@dataclass(frozen=True)
class AllocationResult:
    """An allocation and what it follows from.

    Attributes:
        layers: all that were traced, those that stay in fp32 included.
        cost, target_cost: of the first target, in the unit of its costs (BOPs, or bytes of the whole checkpoint).
        used: the share of each target, by its kind.
        loss_increase: expected by the sensitivities, summed over decisions.
        problem: that was solved.
    """

    allocation: Allocation
    layers: tuple[LayerInfo, ...]
    space: SearchSpace
    sensitivity: Sensitivity
    cost: float
    target_cost: float
    used: Mapping[str, float]
    loss_increase: float
    problem: SearchProblem

    def at(self, allocation: Allocation) -> AllocationResult:
        """With another allocation of the space."""
        choice = self.space.choice(allocation)
        return replace(
            self,
            allocation=allocation,
            cost=float(self.problem.cost(choice)),
            used={} if self.problem.target is None else self.problem.used(choice),
            loss_increase=float(self.sensitivity.decision_scores.gather(1, choice[:, None]).sum()),
        )


def allocate(
    model: Any,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    target: Target | Sequence[Target] | str,
    *,
    search_space: str | Sequence[str | Format] | None = None,
    hardware: str | None = None,
    activation: ActivationMode | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    tie: Sequence[str] = (),
    require: Mapping[str, Sequence[str | Format]] | None = None,
    min_bits: Mapping[str, float] | None = None,
    score: str = "fisher",
    task: Task = IMAGE_CLASSIFICATION,
) -> AllocationResult:
    """The allocation of least expected loss that meets `target`, for an fp32 model that is not trained further.

    Args:
        model: of Transformers, on its device.
        batches: gives (pixel values [batch, 3, height, width], targets of the task, such as labels int64 [batch]) on
            that device; called for each pass of the score, after the target has been checked. 1500 images or more make
            the scores reliable (docs/search.md).
        target: several are to be met together, each as a limit that is never exceeded; the name of a cost instead asks
            for the cheapest allocation by it.
        search_space, hardware, activation: see `cost.choices`; by default formats that this machine runs.
        tie, require, min_bits: see `SearchSpace`.
        score: the name of a registered one, see `selection.scores`.
    Returns: the allocation, which costs between 97 % and 100 % of a single target where the space has such a one.
    Raises: TargetError: out of reach, alone or together. DataError: no images, or labels or scores without a meaning.
        ConfigError, FormatError: a bad space, a model that is not for the task, or one with NaN or
        infinity in it.
    """
    measure = find_score(score)
    check_finite(model)
    task.check(model.config)
    names = quantizable_layers(model, list(modules_to_not_convert) if modules_to_not_convert else None)
    layers = trace_layers(model)
    searched = [layer for layer in layers if layer.name in names]
    chosen = choices(search_space, hardware, activation)
    space = SearchSpace(searched, chosen.formats, chosen.activation, tie, require=require, min_bits=min_bits)
    problem = search_problem(model, layers, space, target)
    wanted = problem.reachable[0] if problem.target is None else problem.target_cost  # before the images are run
    sensitivity = measure(model, Repeatable(batches), lambda x: task.prediction(model(x)), problem, task=task)
    scores = sensitivity.decision_scores
    if problem.target is None:
        choice = problem.best_choice(-scores, low=0.0, high=wanted)
    else:
        choice = problem.choice_at_target(-scores)
    return AllocationResult(
        allocation=space.allocation(choice),
        layers=layers,
        space=space,
        sensitivity=sensitivity,
        cost=float(problem.cost(choice)),
        target_cost=wanted,
        used={} if problem.target is None else problem.used(choice),
        loss_increase=float(scores.gather(1, choice[:, None]).sum()),
        problem=problem,
    )
