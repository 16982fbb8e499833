"""Imitating the outputs of a teacher's blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import make_searchable
from fliqs_hf.oneshot.hook import FixedFormats
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.tasks.classification import ImageClassification
from fliqs_hf.training import train
from fliqs_hf.training.imitation import Teacher
from tests.helpers.models import ARCHITECTURES, images, tiny
from tests.training.test_loop import Blobs, config, same, weights

CPU = torch.device("cpu")


def changed(model: Any) -> Any:
    """A student: the same architecture with other weights."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    return student


def missed(teacher: Any, student: Any, pixels: Tensor) -> Tensor:
    with Teacher(teacher, IMAGE_CLASSIFICATION, CPU, student) as imitated:
        imitated.prediction(pixels)
        with imitated.watching() as found:
            student(pixels)
        return found()


def test_what_blocks_miss_is_their_relative_squared_error() -> None:
    """Against the hidden states that the models themselves return."""
    teacher = tiny("vit").eval()
    student, pixels = changed(teacher), images(4)
    hidden = [model(pixels, output_hidden_states=True).hidden_states[1:] for model in (teacher, student)]
    parts = [(own - other).square().sum() / other.square().sum() for other, own in zip(*hidden, strict=True)]
    torch.testing.assert_close(missed(teacher, student, pixels), torch.stack(parts).mean(), rtol=1e-5, atol=0)
    assert len(parts) == teacher.config.num_hidden_layers > 1
    assert missed(teacher, copy.deepcopy(teacher), pixels) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_of_every_architecture_are_found(architecture: str) -> None:
    teacher = tiny(architecture).eval()
    student, pixels = changed(teacher), images(2)
    found = missed(teacher, student, pixels)
    assert found.isfinite() and found > 0
    found.backward()
    assert sum(bool(p.grad is not None and p.grad.any()) for p in student.parameters()) > 2
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_a_model_without_blocks_is_compared_layer_by_layer() -> None:
    torch.manual_seed(0)
    teacher, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)), torch.randn(6, 4)
    student = changed(teacher)
    parts, own, other = [], x, x
    for one, same_one in zip(student, teacher, strict=True):
        own, other = one(own), same_one(other)
        if isinstance(one, nn.Linear):
            parts.append((own - other).square().sum() / other.square().sum())
    torch.testing.assert_close(missed(teacher, student, x), torch.stack(parts).mean())


def test_models_of_two_depths_cannot_be_compared() -> None:
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    student.forward = lambda x: student[0](x)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"run 1 times, the teacher's 2 times.*set distill_features=0"):
        missed(teacher, student, torch.ones(2, 4))


def test_gradients_are_those_of_loss_and_weighted_errors() -> None:
    """By the norm of the gradients that a step reports."""
    teacher, data = tiny("vit").eval(), Blobs(8)
    student = changed(teacher)
    pixels, labels = data.images, torch.tensor(data.labels)
    by_hand = copy.deepcopy(student).train()
    logits, wanted = by_hand(pixels).logits, teacher(pixels).logits.softmax(-1)
    loss = 0.25 * functional.cross_entropy(logits, labels) + 0.75 * functional.cross_entropy(logits, wanted)
    (loss + 3 * missed(teacher, by_hand, pixels)).backward()
    expected = torch.stack([p.grad.norm() for p in by_hand.parameters() if p.grad is not None]).norm()
    logged: list[dict[str, Any]] = []
    settings = config(max_steps=1, logging_steps=1, distill_weight=0.75, feature_weight=3.0)
    train(student, data, settings, Accelerator(cpu=True), teacher=teacher, on_log=logged.append)
    assert logged[0]["grad_norm"] == pytest.approx(float(expected), rel=1e-5)  # float32, images in another order
    assert logged[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)  # without the blocks


def student_of(teacher: Any, **settings: Any) -> dict[str, Tensor]:
    """Weights after training in INT3, from the teacher's."""
    model = copy.deepcopy(teacher)
    if settings.pop("checkpointing", False):
        model.activation_checkpointing_enable()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    switch = make_searchable(model, ["int3"], names=names)
    train(
        model, Blobs(64), config(max_steps=6, **settings), Accelerator(cpu=True), teacher=copy.deepcopy(teacher),
        hook=FixedFormats(switch, Allocation.uniform(names, "int3")),
    )  # fmt: skip
    return weights(model)


def test_features_change_what_is_learnt_and_not_what_is_left_out() -> None:
    teacher = tiny("vit")
    without, none, some = (student_of(teacher, feature_weight=weight) for weight in (0.0, 0.0, 1.0))
    assert same(without, none) and not same(without, some)


def test_a_task_without_a_loss_for_predictions_imitates_blocks_alone() -> None:
    class Other(ImageClassification):
        imitation = Task.imitation

    teacher = tiny("vit")
    students = [changed(teacher) for _ in range(2)]
    for student, weight in zip(students, (0.0, 1.0), strict=True):
        settings = config(max_steps=2, feature_weight=weight)
        train(student, Blobs(16), settings, Accelerator(cpu=True), teacher=copy.deepcopy(teacher), task=Other())
    assert not same(*map(weights, students))
    settings = config(max_steps=1, distill_weight=0.5)
    with pytest.raises(ConfigError, match="no loss for imitating"):
        train(changed(teacher), Blobs(16), settings, Accelerator(cpu=True), teacher=teacher, task=Other())


def test_checkpointed_blocks_are_compared_once() -> None:
    teacher = tiny("vit")
    plain, checkpointed = (student_of(teacher, feature_weight=1.0, checkpointing=flag) for flag in (False, True))
    assert same(plain, checkpointed)


def test_compiled_steps_imitate_as_eager_ones_do() -> None:
    torch.compiler.reset()
    teacher = tiny("vit")
    eager, compiled = (student_of(teacher, feature_weight=1.0, compile_backend=name) for name in (None, "eager"))
    assert same(eager, compiled)
