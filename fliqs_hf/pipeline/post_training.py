"""Mixed precision without training: sensitivities from one pass over calibration images, then the integer program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo, Target, trace_layers
from fliqs_hf.cost.choices import choices
from fliqs_hf.formats import Format
from fliqs_hf.nn import QuantizerSettings, quantizable_layers
from fliqs_hf.nn.finite import check_finite
from fliqs_hf.pipeline.costs import search_problem
from fliqs_hf.ptq import Rounding, rounding_gain
from fliqs_hf.selection import Repeatable, SearchProblem, SearchSpace, Sensitivity, find_score
from fliqs_hf.selection.space import ActivationMode
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task

#: Images that the gain of GPTQ is measured on: a Hessian of 128 is what GPTQ itself is content with.
GAIN_IMAGES = 128


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
    rounding: Rounding = "nearest",
    settings: QuantizerSettings | None = None,
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
        rounding, settings: how the model will be quantized. For "gptq" the scores of weights that are chosen apart
            from inputs are lowered by what it leaves of their error on the first 128 images (`ptq.rounding_gain`).
    Returns: the allocation, which costs between 97 % and 100 % of a single target where the space has such a one.
    Raises: TargetError: out of reach, alone or together. DataError: no images, or labels or scores without a meaning.
        ConfigError, FormatError: a bad space, a model that is not for the task, or one with NaN or
        infinity in it.
    """
    measure = find_score(score)
    settings = settings or QuantizerSettings()
    check_finite(model)
    task.check(model.config)
    names = quantizable_layers(model, modules_to_not_convert)
    layers = trace_layers(model)
    searched = [layer for layer in layers if layer.name in names]
    chosen = choices(search_space, hardware, activation)
    space = SearchSpace(searched, chosen.formats, chosen.activation, tie, require=require, min_bits=min_bits)
    problem = search_problem(model, layers, space, target)
    _ = problem.reachable if problem.target is None else problem.target_cost  # refused before the images are run
    sensitivity = measure(
        model, Repeatable(batches), lambda images: task.prediction(model(images)), problem, settings, task=task
    )
    if rounding == "gptq" and space.activation == "separate":
        sensitivity = _rounded_well(model, names, batches(), space, sensitivity, settings)
    return _solved(problem, layers, sensitivity)


def _solved(problem: SearchProblem, layers: tuple[LayerInfo, ...], sensitivity: Sensitivity) -> AllocationResult:
    space, scores = problem.space, sensitivity.decision_scores
    if problem.target is None:
        wanted = problem.reachable[0]
        choice = problem.best_choice(-scores, low=0.0, high=wanted)
    else:
        wanted = problem.target_cost
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


def _rounded_well(
    model: Any,
    layers: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Any]],
    space: SearchSpace,
    sensitivity: Sensitivity,
    settings: QuantizerSettings,
) -> Sensitivity:
    """`sensitivity` of a model whose weights GPTQ will round. Layers that share a decision share the mean of gains."""
    images: list[Tensor] = []
    for batch, _ in batches:
        images.append(batch)
        if sum(map(len, images)) >= GAIN_IMAGES:
            break
    found = rounding_gain(model, layers, torch.cat(images)[:GAIN_IMAGES], quantizer=settings.weights)
    gains = torch.tensor([found[layer.name] for layer in space.layers])
    scores, decisions = sensitivity.decision_scores.clone(), space.weight_decision
    factors = torch.zeros(len(scores)).index_add_(0, decisions, gains)
    counts = torch.zeros(len(scores)).index_add_(0, decisions, torch.ones_like(gains))
    chosen = counts > 0
    scores[chosen] *= (factors / counts)[chosen, None]
    return replace(sensitivity, decision_scores=scores)
