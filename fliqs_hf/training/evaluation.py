"""Accuracy of a model on a split: exact counts, independent of batch size and number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from fliqs_hf.errors import ConfigError
from fliqs_hf.training.data import ImageData, Loader
from fliqs_hf.training.losses import ClassLoss, logits_of


@dataclass(frozen=True)
class Accuracy:
    """Counts over `n` images, the mean cross-entropy, and what metrics of the `evaluate` library say."""

    correct: int
    correct5: int
    n: int
    loss: float
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def top1(self) -> float:
        return self.correct / self.n

    @property
    def top5(self) -> float:
        return self.correct5 / self.n

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"top1": self.top1, "top5": self.top5}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageData,
    accelerator: Any,
    *,
    batch_size: int = 64,
    workers: int = 0,
    name: str = "evaluation",
    metrics: Sequence[str] = (),
) -> Accuracy:
    """Evaluate in evaluation mode; every rank takes its share of the images and all get the same result.

    Args:
        metrics: of the `evaluate` library, by Hub name or local path, given predicted and true labels; where a metric
            averages over classes (F1, precision, recall), it takes the macro average.
    Raises: ConfigError: a metric that cannot be loaded, or does not take labels, or a model that chooses no class.
        DataError: a label that is no class.
    """
    losses = ClassLoss()
    loaded = {metric: load_metric(metric) for metric in metrics}
    predictions: list[int] = []
    references: list[int] = []
    training = model.training
    model.eval()
    mine = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))
    loader = Loader(mine, batch_size, num_workers=workers)
    totals = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for images, labels in tqdm(loader, desc=name, leave=False, disable=not accelerator.is_local_main_process):
        with accelerator.autocast():
            logits = logits_of(model(images.to(accelerator.device))).float()
        totals[:3] += _counts(logits, labels.to(accelerator.device), losses)
        if loaded:
            predictions += logits.argmax(-1).tolist()
            references += labels.tolist()
    totals[3], totals[4] = losses.images, losses.invalid
    correct, correct5, loss, n, invalid = accelerator.reduce(totals, reduction="sum").tolist()
    model.train(training)
    losses.check(round(invalid), round(n))
    if loaded:
        from accelerate.utils import gather_object  # a server that only loads models does without

        predictions, references = gather_object(predictions), gather_object(references)
    values = {metric: _compute(module, metric, predictions, references) for metric, module in loaded.items()}
    return Accuracy(round(correct), round(correct5), round(n), loss / n, values)


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


def _counts(logits: Tensor, labels: Tensor, losses: ClassLoss) -> Tensor:
    """[correct, correct among the first five, sum of losses], float64."""
    loss = losses(logits, labels)
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    return torch.stack([top[:, 0].sum(), top.sum(), loss]).double()
