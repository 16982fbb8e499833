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
from torch.nn import functional

from fliqs_hf.errors import DataError
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.search.probes import Probes, Reduction
from fliqs_hf.search.space import SearchSpace

#: inputs of one batch -> logits [batch, classes]
Forward = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """Scores of one pass over calibration images.

    Attributes:
        decision_scores: expected increase of the loss for each choice of each decision, float32 [D, K]. Layers of a
            decision add up; where weights and inputs are decided apart, each is scored with the other in fp32.
        images: how many images were used.
        seconds: what the pass took.
    """

    decision_scores: Tensor
    images: int
    seconds: float


def fisher_scores(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    settings: QuantizerSettings | None = None,
    reduction: Reduction = "image",
) -> Sensitivity:
    """Per-sample Fisher scores of every choice of every decision.

    Args:
        model: plain, or searchable with its switch disabled. It runs in evaluation mode and is left as it was.
        batches: (inputs, labels); labels int64 [batch]. A progress bar, if any, is the caller's.
        forward: inputs -> logits.
        reduction: "image" for ½·(Σ g·ΔY)², "element" for Σ (g·ΔY)², which takes a product of matrices per layer and
            format (mean over the images of both).
    Cost: with 14 formats 2.7 times the forward and backward pass in all (DeiT-Tiny, one CPU thread). The arithmetic is
        that of the gradients of the weights (half a forward and backward pass), of a product as large as a forward
        pass for each format of up to `probes.JOINT_BITS` bits, and three to six passes over each layer's input per
        format.
    Raises: DataError: no batch, a gradient that is not finite, or a layer whose input is overwritten before backward.
        A layer that the forward pass does not reach scores 0.
    """
    settings = settings or QuantizerSettings()
    layers = {layer.name: model.get_submodule(layer.name) for layer in space.layers}
    same = space.activation == "same"
    roles: tuple[tuple[bool, bool], ...] = ((True, True),) if same else ((True, False), (False, True))
    total = torch.zeros((), dtype=torch.float64)  # becomes [roles, L, K] on the device of the labels
    count, start = 0, time.perf_counter()
    with frozen(model), Probes(layers, space.formats, roles, settings, reduction) as probes:
        for inputs, labels in batches:
            with probes.watching(), torch.enable_grad():
                loss = functional.cross_entropy(forward(inputs).float(), labels, reduction="sum")
            sums = probes.backward(loss, len(labels)).double()
            total = total + (sums.square() / 2 if reduction == "image" else sums).sum(-1)
            count += len(labels)
    if not count:
        raise DataError("the sensitivity pass got no images: give it a split that is not empty")
    total = total.cpu()
    scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    decisions = (space.weight_decision,) if same else (space.weight_decision, space.activation_decision)
    for role, index in enumerate(decisions):
        scores.index_add_(0, index, total[role])
    if not scores.isfinite().all():
        raise DataError("the sensitivity pass met a loss or gradient that is not finite: check images and model")
    return Sensitivity((scores / count).float(), count, time.perf_counter() - start)


@contextmanager
def frozen(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode, and gradients for the parameters in `but` only; both as before afterwards."""
    training = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {id(parameter) for parameter in but}
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in kept)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in training.items():
            module.training = mode
