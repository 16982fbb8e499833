"""No loss without a meaning: models that choose no class, and labels that are none, are refused everywhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from fliqs_hf.cost import Target, trace_layers
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.pipeline.post_training import allocate
from fliqs_hf.selection import SearchSpace, fisher_scores
from fliqs_hf.selection.scores import elementwise_scores, hessian_trace_scores, loss_delta_scores
from fliqs_hf.tasks import IMAGE_CLASSIFICATION
from fliqs_hf.training import TrainConfig, evaluate, train

MEASURES = [fisher_scores, elementwise_scores, hessian_trace_scores, loss_delta_scores]


class Head(nn.Module):
    """A flattened image [batch, 3, 4, 4] through two layers; its output has `logits`."""

    def __init__(self, classes: int, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 8), nn.Linear(8, classes)
        self.config = SimpleNamespace(num_labels=classes, num_channels=3, image_size=4, **config)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.second(self.first(pixel_values.flatten(1)).tanh()))


def scores(measure: Callable[..., Any], model: Head, labels: torch.Tensor, images: torch.Tensor | None = None) -> Any:
    x = torch.randn(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(1)) if images is None else images
    space = SearchSpace(trace_layers(model, x[:1]), ["int2", "int8"])
    return measure(model, [(x, labels)], lambda pixels: model(pixels).logits, space)


@pytest.mark.parametrize("measure", MEASURES)
def test_no_score_from_a_single_logit(measure: Callable[..., Any]) -> None:
    """Its cross-entropy is 0 whatever it is."""
    with pytest.raises(ConfigError, match=r"logits of shape \(4, 1\).*not those of a classifier"):
        scores(measure, Head(1), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("label", [-100, -1, 3])
@pytest.mark.parametrize("measure", MEASURES)
def test_no_score_from_labels_that_are_no_class(measure: Callable[..., Any], label: int) -> None:
    for labels in ([label] * 4, [0, 1, label, 2]):
        with pytest.raises(DataError, match=rf"{labels.count(label)} of 4 images have a label that is not one of.*3"):
            scores(measure, Head(3), torch.tensor(labels))


def test_no_score_from_labels_of_another_kind() -> None:
    for labels in (torch.zeros(4), torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="not those of a classifier"):
            scores(fisher_scores, Head(3), labels)


@pytest.mark.parametrize("measure", MEASURES)
def test_scores_that_are_all_zero_are_refused(measure: Callable[..., Any]) -> None:
    model = Head(3)
    nn.init.zeros_(model.second.weight)
    nn.init.zeros_(model.first.weight)
    with pytest.raises(DataError, match="every sensitivity score is 0"):
        scores(measure, model, torch.tensor([0, 1, 2, 0]), torch.zeros(4, 3, 4, 4))


def test_scores_that_are_all_equal_are_refused() -> None:
    from fliqs_hf.selection.scores.score import meaningful

    with pytest.raises(DataError, match="equal in every layer"):
        meaningful(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert meaningful(torch.tensor([[1.0], [2.0]])).shape == (2, 1)  # nothing to choose
    meaningful(torch.tensor([[1.0, 1.0], [2.0, 3.0]]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_labels": 1}, "num_labels=1, a regression"),
        ({"num_labels": 3, "problem_type": "regression"}, "problem_type='regression'"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "problem_type='multi_label"),
    ],
)
def test_models_that_choose_no_class_are_refused(config: dict[str, Any], message: str) -> None:
    model = Head(config.pop("num_labels"), **config)
    unused: Any = None
    calls: list[Callable[[], Any]] = [
        lambda: IMAGE_CLASSIFICATION.check(model.config),
        lambda: allocate(model, lambda: pytest.fail("images were read"), Target.of(target_bits=4)),
        lambda: train(model, unused, TrainConfig(max_steps=1), Accelerator(cpu=True)),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=message):
            call()


def test_evaluation_refuses_them() -> None:
    class Data(list[Any]):
        pass

    images = torch.zeros(3, 4, 4)
    with pytest.raises(DataError, match="1 of 2 images have a label"):
        evaluate(Head(3), Data([(images, 0), (images, -100)]), Accelerator(cpu=True))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not those of a classifier"):
        evaluate(Head(1), Data([(images, 0)]), Accelerator(cpu=True))  # type: ignore[arg-type]


def test_a_model_without_logits() -> None:
    with pytest.raises(ConfigError, match="SimpleNamespace without logits"):
        IMAGE_CLASSIFICATION.prediction(SimpleNamespace(last_hidden_state=torch.zeros(1)))


def test_the_loss_is_cross_entropy_of_all_images() -> None:
    losses, logits, labels = IMAGE_CLASSIFICATION.losses(), torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert torch.equal(losses(logits, labels), expected) and (losses.images, int(losses.invalid)) == (5, 0)
    losses.check(0, 5)
