"""A floor of accuracy for a search: where its model misses it, precision is raised and the weights are trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError, FloorError
from fliqs_hf.nn import restore
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.oneshot import OneShotSearch
from fliqs_hf.pipeline.floor import Floor, FloorTest, candidates, record
from fliqs_hf.pipeline.job import Job
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.training.arguments import SearchArguments, TrainingArguments
from fliqs_hf.training.data import Loader

#: Folder of the records that packed models are loaded from to be tested.
_PACKED = "floor"


def floor_of(search_args: SearchArguments, args: TrainingArguments, targets: int) -> Floor | None:
    """Raises: ConfigError: one that could not be what it says."""
    if search_args.max_drop is None and search_args.min_accuracy is None:
        return None
    if targets > 1:
        raise ConfigError(f"a floor of accuracy goes with one target, not with {targets}: run them one by one")
    if args.load_best_model_at_end:
        raise ConfigError(
            "max_drop and min_accuracy are decided on the evaluation images, on which load_best_model_at_end chooses "
            "weights: leave one of them out"
        )
    drop = None if search_args.max_drop is None else search_args.max_drop / 100
    return Floor(drop, search_args.min_accuracy, search_args.confidence)


def more_precise(search: OneShotSearch, first: Allocation) -> list[Allocation]:
    """`first`, then those to go on with where it misses the floor: each the most probable by the policy at a higher
    cost, up to the dearest; none where a cap or a limit leaves no room."""
    cost = search.problem.costs.of
    found = candidates(search.problem, -search.policy.logits.detach().cpu())
    return [first, *sorted((one for one in found if cost(one) > cost(first)), key=cost)]


def climb(
    order: Sequence[Allocation],
    trained: Any,
    original: NDArray[np.bool_],
    right_of: Callable[[Any, Allocation], NDArray[np.bool_]],
    train_on: Callable[[Any, Allocation, int], Any],
    floor: Floor,
) -> tuple[Any, list[FloorTest]]:
    """Test in this order until one meets the floor.

    Each of them could be taken, so each is tested at the confidence at which the chance that any of all wrongly passes
    is at most 1 − confidence (Bonferroni).

    Args:
        trained: for the first of `order`. original: which images fp32 gets right.
        right_of: trained weights, allocation -> which images the packed model gets right.
        train_on: trained weights, allocation, its number in `order` -> weights trained for it from these.
    Returns: the weights that met it, None where none did; and the tests.
    """
    strict = replace(floor, confidence=1 - (1 - floor.confidence) / len(order))
    trials: list[FloorTest] = []
    for number, allocation in enumerate(order):
        if number:
            trained = train_on(trained, allocation, number)
        trials.append(FloorTest.of(allocation, original, right_of(trained, allocation), strict))
        if trials[-1].met:
            return trained, trials
    return None, trials


def meet(
    job: Job,
    run: RunFolder,
    search: OneShotSearch,
    floor: Floor,
    models: tuple[Any, Any],
    pack: Callable[[Any, Allocation, str], Any],
    train_on: Callable[[Any, Allocation, Path, str], Any],
) -> tuple[Any, list[FloorTest]]:
    """Weights whose packed model meets the floor, and the tests, of which the last is of its allocation.

    Args:
        models: fp32, and as the search has trained it for its own allocation.
        pack: searchable model, which it uses up, allocation, folder of the records -> packed and loaded from there.
        train_on: plain model, allocation, where the state of the training goes, its name -> searchable.
    Raises: FloorError: none of them did; the tests are on record.
    """
    states: list[str] = []

    def right_of(model: Any, allocation: Allocation) -> NDArray[np.bool_]:
        return right(job, pack(copy.deepcopy(model), allocation, _PACKED))

    def further(model: Any, allocation: Allocation, number: int) -> Any:
        states.append(f"floor-{number}-state")
        if job.accelerator.is_main_process:
            run.claim(f"{states[-1]}/")
        plain = copy.deepcopy(model)
        restore(plain)
        return train_on(plain, allocation, run.records / states[-1], f"floor, allocation {number + 1}")

    order = more_precise(search, search.finalize().allocation)
    found, trials = climb(order, models[1], right(job, models[0]), right_of, further, floor)
    if job.accelerator.is_main_process:
        for folder in (_PACKED, *states):
            run.discard(folder)
        run.write("floor.json", record(trials, floor))
    job.accelerator.wait_for_everyone()
    if found is None:
        raise FloorError(missed(trials, floor))
    return found, trials


def missed(trials: Sequence[FloorTest], floor: Floor) -> str:
    """Why there is no model, and what to do."""
    said = "the only allocation" if len(trials) == 1 else f"all {len(trials)} allocations up to the dearest"
    return (
        f"the floor is not met, and no model is delivered: trained was {said}, the last has {trials[-1]}, and asked "
        f"for is {floor}; train longer, add formats of more bits, raise the limits, or lower the floor (all tests are "
        "in fliqs/floor.json)"
    )


@torch.no_grad()
def right(job: Job, model: Any) -> NDArray[np.bool_]:
    """Which of the evaluation images `model` gets right, the same on every process."""
    found, device = [], job.accelerator.device
    with evaluation(model):
        for images, target in Loader(job.eval_data, job.args.per_device_eval_batch_size):
            with job.accelerator.autocast():
                prediction = job.task.prediction(model(images.to(device))).float()
            found.append(job.task.right(job.task.answers(prediction), target.to(device)).cpu())
    answers: NDArray[np.bool_] = torch.cat(found).numpy()
    return answers
