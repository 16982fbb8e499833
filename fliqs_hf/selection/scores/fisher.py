"""How much each format of each layer is expected to hurt, from one backward pass per batch.

The per-sample Fisher score of layer l in formats f is ½·mean_i (Σ g_i·ΔY_i)², where g_i is the gradient of image i's
true-label loss at the layer's fp32 output and ΔY_i the change of that output when the layer's input and weight are
quantized. It is the second-order estimate of the increase of the loss with the Fisher information for the Hessian;
the sum over positions and channels is taken before the square, so changes that cancel within an image count as
cancelled. Of the cheap predictors of the loss after quantization-aware training it ranked best here (docs/search.md).
Squared element by element instead, it is the score of `baselines.elementwise_scores`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.errors import AllocationError, DataError
from fliqs_hf.nn import QuantizerSettings, make_searchable, restore
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.selection.problem import SearchProblem
from fliqs_hf.selection.scores.probes import Probes, Reduction
from fliqs_hf.selection.space import SearchSpace
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task

#: A second look takes no score for less than this share of the first.
LEAST_SHARE = 1e-3
#: inputs of one batch -> logits [batch, classes]
Forward = Callable[[Any], Tensor]
#: a tensor on the CPU -> its sum over all processes, the same on each
Combine = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """Scores of one pass over calibration images, or of two.

    Attributes:
        decision_scores: expected increase of the loss for each choice of each decision, float32 [D, K]. Layers of a
            decision add up; where weights and inputs are decided apart, each is scored with the other in fp32.
        images: how many images were used.
        seconds: what it took.
        passes: 1: scores of the model as it was. 2: of `two_pass_scores`.
    """

    decision_scores: Tensor
    images: int
    seconds: float
    passes: int = 1


def fisher_scores(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    settings: QuantizerSettings | None = None,
    reduction: Reduction = "image",
    combine: Combine | None = None,
    task: Task = IMAGE_CLASSIFICATION,
) -> Sensitivity:
    """Per-sample Fisher scores of every choice of every decision.

    Args:
        model: plain, or searchable with its switch disabled. It runs in evaluation mode and is left as it was.
        batches: (inputs, targets of the task), such as labels, int64 [batch]. A progress bar, if any, is the caller's.
        forward: inputs -> predictions of the task, such as logits.
        reduction: "image" for ½·(Σ g·ΔY)², "element" for Σ (g·ΔY)², which takes a product of matrices per layer and
            format (mean over the images of both).
        combine: where processes measure different images; all then get the scores of all images.
    Cost: with 14 formats 2.7 times the forward and backward pass in all (DeiT-Tiny, one CPU thread). The arithmetic is
        that of the gradients of the weights (half a forward and backward pass), of a product as large as a forward
        pass for each format of up to `probes.JOINT_BITS` bits, and three to six passes over each layer's input per
        format.
    Raises: DataError: no batch, a label that is no class, a gradient that is not finite, scores that tell no formats
        apart, or a layer whose input is overwritten before backward. A layer that the forward pass does not reach
        scores 0. ConfigError: logits that are not those of a classifier. AllocationError: a space of another model.
    """
    found = _measured(model, batches, forward, space, settings or QuantizerSettings(), reduction, combine, task)
    meaningful(found.decision_scores)
    return found


def _measured(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    settings: QuantizerSettings,
    reduction: Reduction,
    combine: Combine | None,
    task: Task,
) -> Sensitivity:
    layers = layers_of(model, space)
    same = space.activation == "same"
    roles: tuple[tuple[bool, bool], ...] = ((True, True),) if same else ((True, False), (False, True))
    total = torch.zeros((), dtype=torch.float64)  # becomes [roles, L, K] on the device of the labels
    losses, start = task.losses(), time.perf_counter()
    with frozen(model), Probes(layers, space.formats, roles, settings, reduction) as probes:
        for inputs, labels in batches:
            with probes.watching(), torch.enable_grad():
                loss = losses(forward(inputs), labels)
            sums = probes.backward(loss, len(labels)).double()
            total = total + (sums.square() / 2 if reduction == "image" else sums).sum(-1)
    count, invalid = losses.images, int(losses.invalid)
    if not count:
        raise DataError("the sensitivity pass got no images: give it a split that is not empty")
    total = total.cpu()
    scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    decisions = (space.weight_decision,) if same else (space.weight_decision, space.activation_decision)
    for role, index in enumerate(decisions):
        scores.index_add_(0, index, total[role])
    if combine is not None:
        sums = combine(torch.cat([scores.flatten(), scores.new_tensor([count, invalid])]))
        scores, count, invalid = sums[:-2].view_as(scores), int(sums[-2]), int(sums[-1])
    losses.check(invalid, count)
    if not scores.isfinite().all():
        raise DataError("the sensitivity pass met a loss or gradient that is not finite: check images and model")
    return Sensitivity((scores / count).float(), count, time.perf_counter() - start)


def meaningful(scores: Tensor) -> Tensor:
    """`scores` [D, K]. Raises: DataError: they tell no formats apart, so formats would be chosen from nothing."""
    if not scores.any():
        raise DataError(
            "every sensitivity score is 0: no gradient of the loss reaches the layers. Either the answers are too "
            "sure (a saturated softmax: measure on other images or labels), or the layers don't decide them"
        )
    if scores.shape[1] > 1 and bool((scores == scores[:, :1]).all()):
        raise DataError(
            "the sensitivity scores of all formats are equal in every layer, so they choose nothing: check that the "
            "images differ, and that the layers are not all 0"
        )
    return scores


def two_pass_scores(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    problem: SearchProblem,
    first: Sensitivity,
    band: float = 0.03,
    combine: Combine | None = None,
    settings: QuantizerSettings | None = None,
    task: Task = IMAGE_CLASSIFICATION,
) -> Sensitivity:
    """Scores of the fp32 model and of the model near the target, as their geometric mean.

    A model that fits its training images well has gradients on few of them, and every layer is scored as if the others
    were exact. So the scores are measured once more in the model as quantized by the allocation that `first` gives,
    before any training. A decision whose gradient is gone there (a dead unit, a saturated softmax) is taken to be a
    thousandth as sensitive as at first, not free.

    Args:
        model: plain; quantized meanwhile and left as it was. batches, forward, combine, settings, task: as for
            `fisher_scores`.
        first: scores of the plain model. band: as for `SearchProblem.choice_at_target`.
    Returns: the mean, with the images of one pass and the seconds of both.
    Raises: DataError: as `fisher_scores`. TargetError: the target is out of reach.
    """
    space = problem.space
    allocation = space.allocation(problem.choice_at_target(-first.decision_scores, band))
    groups, settings = {layer.name: layer.input_group for layer in space.layers}, settings or QuantizerSettings()
    switch = make_searchable(model, space.formats, names=list(groups), input_groups=groups, settings=settings)
    try:
        switch.set_allocation(allocation)
        second = _measured(model, batches, forward, space, settings, "image", combine, task)  # all may be 0 here
    finally:
        restore(model)
    before = first.decision_scores.double()  # products of float32 scores would underflow
    after = second.decision_scores.double().maximum(LEAST_SHARE * before)
    return Sensitivity((before * after).sqrt().float(), second.images, first.seconds + second.seconds, passes=2)


def layers_of(model: nn.Module, space: SearchSpace) -> dict[str, nn.Module]:
    """The layers of the space, by name. Raises: AllocationError: the model lacks one."""
    modules = dict(model.named_modules())
    if missing := [layer.name for layer in space.layers if layer.name not in modules]:
        raise AllocationError(
            f"{missing[0]!r} of the search space is no layer of {type(model).__name__}: make the space from "
            "trace_layers(model) of this model"
        )
    return {layer.name: modules[layer.name] for layer in space.layers}


@contextmanager
def frozen(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode, and gradients for the parameters in `but` only; both as before afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {id(parameter) for parameter in but}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in kept)
        with evaluation(model):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
