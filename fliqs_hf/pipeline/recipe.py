"""How a search is trained where the user leaves it open: by what the target is worth in bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from fliqs_hf.cost.models import BOPS, FP32_BITS
from fliqs_hf.quant.scale import ActivationGranularity
from fliqs_hf.selection import SearchProblem
from fliqs_hf.tasks import Task
from fliqs_hf.training.arguments import SearchArguments, TrainingArguments


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, named as the arguments that override them; docs/recipe.md says what each is worth."""

    learning_rate: float = 1e-4
    distill: float = 0.0
    distill_features: float = 0.0
    activation_granularity: ActivationGranularity = "per_token"


#: The defaults of fp32 training, and of `--recipe none`.
PLAIN = Recipe()
#: Below so many bits -> what was best there, the fewest first.
BY_BITS = (
    (3.5, Recipe(learning_rate=6e-4, distill=1.0, distill_features=30.0, activation_granularity="per_token_clipped")),
)


def recipe_at(bits: float, args: TrainingArguments, task: Task, trained: bool = True) -> Recipe:
    """What was best at so many bits on what was measured, if the arguments want it.

    Args:
        task: without a loss for imitating predictions only blocks are imitated.
        trained: whether the fp32 model is, its head too; there is nothing to imitate otherwise.
    """
    if args.recipe == "none":
        return PLAIN
    found = next((recipe for below, recipe in BY_BITS if bits < below), PLAIN)
    imitates = trained and type(task).imitation is not Task.imitation
    return replace(
        found, distill=found.distill if imitates else 0.0, distill_features=found.distill_features if trained else 0.0
    )


def bits_of(problem: SearchProblem) -> float:
    """The bits of the uniform model that costs what the target costs: of BOPs exactly, of other costs interpolated
    between the formats of the space."""
    table = problem.costs
    if table.measure == BOPS:
        share = (problem.target_cost - table.fixed_cost) / (table.fp32 - table.fixed_cost)
        return float(FP32_BITS * np.sqrt(share))
    costs: dict[float, float] = {}
    for fmt in problem.space.formats:
        if not fmt.for_inputs_only:
            cost = table.uniform(fmt)
            costs[fmt.effective_bits] = min(cost, costs.get(fmt.effective_bits, cost))
    bits = sorted(costs)
    return float(np.interp(problem.target_cost, np.maximum.accumulate([costs[b] for b in bits]), bits))


def completed(
    args: TrainingArguments, search_args: SearchArguments, recipe: Recipe
) -> tuple[TrainingArguments, SearchArguments]:
    """Arguments in which the recipe stands where nothing was given."""
    values = asdict(recipe)
    parts: list[Any] = []
    for part in (args, search_args):
        missing = [field.name for field in fields(part) if field.name in values and getattr(part, field.name) is None]
        parts.append(replace(part, **{name: values[name] for name in missing}))
    return parts[0], parts[1]


def summary(settings: Mapping[str, Any]) -> str:
    """Of a job's settings those that a recipe is made of, in words."""
    return ", ".join(f"{field.name}={settings[field.name]}" for field in fields(Recipe))
