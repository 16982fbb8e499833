"""Accuracy of a model on a split: exact counts, independent of batch size and number of processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from fliqs_hf.training.data import ImageData


@dataclass(frozen=True)
class Accuracy:
    """Counts over `n` images, and the mean cross-entropy."""

    correct: int
    correct5: int
    n: int
    loss: float

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
) -> Accuracy:
    """Evaluate in evaluation mode; every rank takes its share of the images and all get the same result."""
    training = model.training
    model.eval()
    mine = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))
    loader = DataLoader(mine, batch_size, num_workers=workers)
    totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for images, labels in tqdm(loader, desc=name, leave=False, disable=not accelerator.is_local_main_process):
        with accelerator.autocast():
            logits = model(images.to(accelerator.device)).logits.float()
        totals += _counts(logits, labels.to(accelerator.device))
    correct, correct5, loss, n = accelerator.reduce(totals, reduction="sum").tolist()
    model.train(training)
    return Accuracy(round(correct), round(correct5), round(n), loss / n)


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """[correct, correct among the first five, sum of losses, images], float64."""
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([top[:, 0].sum(), top.sum(), loss, torch.tensor(len(labels), device=logits.device)]).double()
