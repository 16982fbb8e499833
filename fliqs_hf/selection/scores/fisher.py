"""The per-sample Fisher score of formats, from one backward pass per batch.

The score of layer l in format f is ½·mean_i (Σ g_i·ΔY_i)², where g_i is the gradient of image i's true-label loss at
the layer's fp32 output and ΔY_i the change of that output when the layer's input and weight are quantized. It is the
second-order estimate of the increase of the loss with the Fisher information for the Hessian; the sum over positions
and channels is taken before the square, so changes that cancel within an image count as cancelled. Of the cheap
predictors of the loss after quantization-aware training it ranked best here (docs/search.md).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fliqs_hf.selection.scores.probes import Probes, Reduction
from fliqs_hf.selection.scores.score import FormatScore, ScorePass, frozen


class Fisher(FormatScore):
    """½·mean_i (Σ g_i·ΔY_i)².

    A layer that the forward pass does not reach scores 0, and one whose input is overwritten before backward is a
    DataError.

    Cost: with 14 formats 2.7 times the forward and backward pass in all (DeiT-Tiny, one CPU thread). The arithmetic is
        that of the gradients of the weights (half a forward and backward pass), of a product as large as a forward
        pass for each format of up to `probes.JOINT_BITS` bits, and three to six passes over each layer's input per
        format.
    """

    name, again = "fisher", True
    reduction: ClassVar[Reduction] = "image"

    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        space, whole = on.space, self.reduction == "image"
        same = space.activation == "same"
        roles: tuple[tuple[bool, bool], ...] = ((True, True),) if same else ((True, False), (False, True))
        decisions = (space.weight_decision,) if same else (space.weight_decision, space.activation_decision)

        def by_decision(total: Tensor) -> Tensor:
            scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
            for role, index in enumerate(decisions):
                scores.index_add_(0, index, total[role])
            return scores

        with frozen(on.model), Probes(on.layers(), space.formats, roles, on.settings, self.reduction) as probes:

            def of_batch(losses: Any, inputs: Any, targets: Tensor) -> Tensor:
                """[roles, L, K]"""
                with probes.watching(), torch.enable_grad():
                    loss = losses(on.forward(inputs), targets)
                sums = probes.backward(loss, len(targets)).double()
                return (sums.square() / 2 if whole else sums).sum(-1)

            sums, images = on.summed(of_batch, by_decision)
        return (sums / images).float(), images


class Elementwise(Fisher):
    """mean_i Σ (g_i·ΔY_i)², the sum over positions and channels of a layer's output.

    The Fisher score with the square inside the sum: errors of different elements of one output never cancel. One
    forward and backward pass, and one run of each layer per format.

    Source: the gradient method of NVIDIA ModelOpt's `auto_quantize`, from its documentation; summed over images there.
    """

    name = "elementwise"
    reduction = "element"


fisher_scores = Fisher()
elementwise_scores = Elementwise()
