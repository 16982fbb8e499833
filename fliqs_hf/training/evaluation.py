"""What a task measures of a model on a split: exact counts, independent of batch size and number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from fliqs_hf.errors import CheckpointError, ConfigError, DataError
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training.data import Loader


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    accelerator: Any,
    *,
    batch_size: int = 64,
    workers: int = 0,
    name: str = "evaluation",
    metrics: Sequence[str] = (),
    task: Task = IMAGE_CLASSIFICATION,
) -> Any:
    """Evaluate in evaluation mode; every rank takes its share of the images and all get the same result.

    Args:
        metrics: of the `evaluate` library, by Hub name or local path, given predicted and true labels; where a metric
            averages over classes (F1, precision, recall), it takes the macro average.
        task: says what the model's output means and what is measured of it.
    Returns: `task.score(…)`, such as `Accuracy`.
    Raises: ConfigError: a metric that cannot be loaded, or does not take labels, or a model that is not for the task.
        DataError: no images, or a target without a meaning. CheckpointError: see `check_finite`.
    """
    if not len(data):
        raise DataError("the split is empty: it holds no image to evaluate on")
    losses = task.losses()
    loaded = {metric: load_metric(metric) for metric in metrics}
    predictions: list[int] = []
    references: list[int] = []
    rows = range(accelerator.process_index, len(data), accelerator.num_processes)
    loader = Loader(Subset(data, rows or [0]), batch_size, num_workers=workers)
    sums: list[Tensor] = []
    finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
    with evaluation(model):
        for images, target in tqdm(loader, desc=name, leave=False, disable=not accelerator.is_local_main_process):
            with accelerator.autocast():
                prediction = task.prediction(model(images.to(accelerator.device))).float()
            finite &= prediction.isfinite().all()
            target = target.to(accelerator.device)
            loss = losses(prediction, target).double()
            sums.append(torch.cat([task.counts(prediction, target), loss.view(1)]))
            if loaded and rows:
                predictions += task.answers(prediction).flatten().tolist()
                references += target.flatten().tolist()
    totals = torch.cat([sum(sums), sums[0].new_tensor([losses.images, int(losses.invalid), int(~finite)])])  # type: ignore[list-item]
    if not rows:  # fewer images than processes: the one above told how many sums there are
        totals.zero_()
    *counts, loss, n, invalid, spoiled = accelerator.reduce(totals, reduction="sum").tolist()
    losses.check(round(invalid), round(n))
    check_finite(not spoiled, name)
    if loaded:
        from accelerate.utils import gather_object  # a server that only loads models does without

        predictions, references = gather_object(predictions), gather_object(references)
    values = {metric: _compute(module, metric, predictions, references) for metric, module in loaded.items()}
    return task.score(counts, round(n), loss / n, values)


def check_finite(finite: bool, name: str) -> None:
    """Raises: CheckpointError: predictions that are not `finite`, of which the first NaN would pass for the answer."""
    if not finite:
        raise CheckpointError(
            f"{name}: the model returns NaN or infinity: damaged weights, a dtype too narrow, or a training that "
            "diverged (lower the learning rate)"
        )


def load_metric(metric: str) -> Any:
    """Of the `evaluate` library. Raises: ConfigError: it cannot be loaded."""
    import evaluate as library

    try:
        return library.load(metric)
    except Exception as error:  # the library lets through whatever the network, the file system or the script raise
        raise ConfigError(f"cannot load the metric {metric!r} of the evaluate library: {error}") from error


def _compute(module: Any, metric: str, predictions: list[int], references: list[int]) -> Any:
    average = {"average": "macro"} if "average" in module.inputs_description else {}
    try:
        result = module.compute(predictions=predictions, references=references, **average)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the metric {metric!r} does not take predicted and true labels: {error}") from error
    return next(iter(result.values())) if len(result) == 1 else result
