"""Regression: one number per image, here the digit that is written in it, in tenths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.tasks import Score, Task, register_task
from fliqs_hf.training import ImageData


class ImageRegression(Task):
    name = "image-regression"
    model = "AutoModelForImageClassification"
    models = "a model with one output"
    measure = "explained variance"
    share = "share of digits read right"

    def prediction(self, output: Any) -> Tensor:
        return output.logits[:, 0]  # type: ignore[no-any-return]

    def loss(self, prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return functional.mse_loss(prediction, target / 10)

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.right(self.answers(prediction), target).float().mean()

    def answers(self, prediction: Tensor) -> Tensor:
        return (prediction * 10).round().long()

    def counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        y, error = target.double() / 10, prediction.double() - target.double() / 10
        return torch.stack([error.square().sum(), y.sum(), y.square().sum(), torch.ones_like(y).sum()])

    def score(self, counts: Sequence[float], n: int, loss: float, metrics: dict[str, Any]) -> Score:
        errors, total, squares, images = counts
        explained = 1 - errors / max(squares - total**2 / images, 1e-9)
        return Score(max(0.0, explained), self.measure, n, loss, metrics)

    def classes(self, train: Any, validation: Any, column: str, processor: Any) -> tuple[Any, Any, list[str]]:
        return train, validation, ["digit"]

    def data(self, split: Any, processor: Any, num_labels: int, **options: Any) -> Any:
        return ImageData(split, processor, 10, **options)


register_task(ImageRegression())
