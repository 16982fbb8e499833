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
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.errors import DataError
from fliqs_hf.formats import Format
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.quant import quantize_activation, quantize_weight
from fliqs_hf.search.space import SearchSpace

#: Up to so many bits a Linear's score has the product of the errors of weight and input. Beyond, it is left out: it is
#: quadratic in rounding errors and would take a matrix product per format. Scores of DeiT-Tiny without it, summed over
#: layers, are 1.64 of the exact ones at INT2, 0.96 to 1.00 at 3 bits, 0.99 to 1.02 at 4 bits and 1.00 at 6 and 8 bits
#: (48 images of ImageNet).
JOINT_BITS = 4

#: inputs of one batch -> logits [batch, classes]
Forward = Callable[[Any], Tensor]

#: What is squared: the sum of g·ΔY over an image, or each element of it.
Reduction = Literal["image", "element"]


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
    Raises: DataError: no batch, a gradient that is not finite, or a layer whose input is overwritten before backward.
        A layer that the forward pass does not reach scores 0.
    """
    settings = settings or QuantizerSettings()
    layers = {layer.name: model.get_submodule(layer.name) for layer in space.layers}
    same = space.activation == "same"
    roles: tuple[tuple[bool, bool], ...] = ((True, True),) if same else ((True, False), (False, True))
    total = torch.zeros((), dtype=torch.float64)  # becomes [roles, L, K] on the device of the labels
    count, start = 0, time.perf_counter()
    with frozen(model):
        for inputs, labels in batches:
            changes = torch.zeros(len(roles), len(layers), len(space.formats), len(labels), device=labels.device)
            with _Probes(layers, space.formats, roles, settings, reduction, changes):
                with torch.enable_grad():
                    loss = functional.cross_entropy(forward(inputs).float(), labels, reduction="sum")
                loss.backward()
            sums = changes.double()
            total = total + (sums.square() / 2 if reduction == "image" else sums).sum(-1)
            count += len(labels)
    if not count:
        raise DataError("the sensitivity pass got no images: give it a split that is not empty")
    scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    decisions = (space.weight_decision,) if same else (space.weight_decision, space.activation_decision)
    for role, index in enumerate(decisions):
        scores.index_add_(0, index, total[role].cpu())
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


class _Probes:
    """Hooks that add Σ g_i·ΔY_i of every layer and format to `changes` [roles, L, K, batch] during backward,
    Σ (g_i·ΔY_i)² with the reduction "element".

    Between forward and backward only the layers' inputs are held, and the formats are gone through one at a time.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        formats: tuple[Format, ...],
        roles: tuple[tuple[bool, bool], ...],
        settings: QuantizerSettings,
        reduction: Reduction,
        changes: Tensor,
    ) -> None:
        self.formats, self.roles = formats, roles
        self.settings, self.reduction, self.changes = settings, reduction, changes
        hooks = (self._hook(row, name) for row, name in enumerate(layers))
        self.handles = [layer.register_forward_hook(hook) for layer, hook in zip(layers.values(), hooks, strict=True)]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, row: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def forward_hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            version = x._version

            def measure(gradient: Tensor) -> None:
                if x._version != version:
                    raise DataError(f"the input of {name!r} was changed in place after the layer read it: no score")
                self._measure(row, layer, x, gradient)

            if not output.requires_grad:  # the first layers: nothing before them needs a gradient
                output = output.requires_grad_().clone()  # what follows may work in place, which a leaf forbids
            output.register_hook(measure)
            return output

        return forward_hook

    @torch.no_grad()
    def _measure(self, row: int, layer: Any, x: Tensor, gradient: Tensor) -> None:
        changes, batch = self.changes[:, row], self.changes.shape[-1]
        if isinstance(layer, nn.Conv2d) or self.reduction == "element":
            self._measure_outputs(changes, layer, x, gradient)
            return
        # g·(Wq xq − W x) = g·(Wq − W) x + (g Wq)·(xq − x). The first part is the inner product of Wq − W with the
        # gradient of the weight, which is the same for all formats: no matrix product per format.
        # The images are the slowest dimension of every input, also where windows or tokens join them.
        x, gradient = (value.reshape(batch, -1, value.shape[-1]) for value in (x, gradient))
        weight_gradient = torch.einsum("bto,bti->boi", gradient, x).reshape(batch, -1)
        unquantized = gradient @ layer.weight
        for k, fmt in enumerate(self.formats):
            weight, error = self._weight(layer, fmt), self._input(x, fmt, "linear").sub_(x)
            by_weight = weight_gradient @ (weight - layer.weight).flatten()
            for role, (with_weight, with_input) in enumerate(self.roles):
                if with_weight:
                    changes[role, k] += by_weight
                if with_input:
                    exact = with_weight and fmt.bits <= JOINT_BITS
                    back = gradient @ weight if exact else unquantized
                    changes[role, k] += error.mul_(back).reshape(batch, -1).sum(-1)

    def _measure_outputs(self, changes: Tensor, layer: Any, x: Tensor, gradient: Tensor) -> None:
        """By running the layer in every format."""
        conv = isinstance(layer, nn.Conv2d)
        kind, apply = ("conv2d", layer._conv_forward) if conv else ("linear", functional.linear)
        output = apply(x, layer.weight, None)  # without bias, which cancels
        for k, fmt in enumerate(self.formats):
            for role, (with_weight, with_input) in enumerate(self.roles):
                value = self._input(x, fmt, kind) if with_input else x
                weight = self._weight(layer, fmt) if with_weight else layer.weight
                change = apply(value, weight, None).sub_(output).mul_(gradient)
                change = change.square_() if self.reduction == "element" else change
                changes[role, k] += change.reshape(changes.shape[-1], -1).sum(-1)

    def _weight(self, layer: Any, fmt: Format) -> Tensor:
        settings = self.settings
        return quantize_weight(
            layer.weight, fmt, settings.weight_granularity, settings.weight_scale, integer=fmt.is_integer
        )

    def _input(self, x: Tensor, fmt: Format, kind: str) -> Tensor:
        return quantize_activation(x, fmt, kind, self.settings.activation_granularity, integer=fmt.is_integer)
