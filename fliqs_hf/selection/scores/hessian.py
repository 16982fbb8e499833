"""Hessian traces of weights times their squared rounding errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fliqs_hf.checks import is_whole
from fliqs_hf.errors import ConfigError
from fliqs_hf.selection.scores.score import FormatScore, ScorePass, frozen


class HessianTrace(FormatScore):
    """Tr(H)/n · ‖Q(W) − W‖² summed over a decision's layers, H the Hessian of the mean loss for the n weights of one
    layer. A trace that comes out negative counts as 0.

    A second backward pass through the attention needs its plain form, which is selected here.

    Source: HAWQ-V2 (Dong et al. 2019, arXiv 1911.03852), section 3.1.
    """

    name, weights_only, most_images = "hessian", True, 512

    def __init__(self, probes: int = 1, seed: int = 0) -> None:
        """
        Args: see `hessian_traces`.
        Raises: ConfigError: `probes` is not positive.
        """
        if not is_whole(probes, 1):
            raise ConfigError(f"probes={probes!r} must be a whole number of at least 1")
        self.probes, self.seed = probes, seed

    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        space = on.space
        traces, images = hessian_traces(on, self.probes, self.seed)
        numbers = torch.tensor([layer.get_parameter("weight").numel() for layer in on.layers().values()])
        scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
        found = (traces.clamp(min=0) / numbers)[:, None] * on.weight_errors()
        return scores.index_add_(0, space.weight_decision, found).float(), images


def hessian_traces(on: ScorePass, probes: int = 1, seed: int = 0) -> tuple[Tensor, int]:
    """Trace of the Hessian of the mean loss for each layer's weight, by Hutchinson's estimator.

    E[vᵀHv] with entries of v drawn from ±1. All layers share one Hessian-vector product: the terms between layers have
    mean 0, so the estimate is unbiased, at more variance and an L-th of the time.

    Args:
        probes: vectors per batch. seed: of the vectors; drawn on the CPU, so the same on every device.
    Returns: float64 [L], and the number of images.
    Raises: as `FormatScore`.
    """
    weights = [layer.get_parameter("weight") for layer in on.layers().values()]
    generator = torch.Generator().manual_seed(seed)

    def of_batch(losses: Any, inputs: Any, targets: Tensor) -> Tensor:
        """[L]"""
        loss = losses(on.forward(inputs), targets)
        gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
        total = torch.zeros(len(weights), dtype=torch.float64)
        for _ in range(probes):
            vectors = [_signs(weight, generator) for weight in weights]
            products = torch.autograd.grad(
                gradients, weights, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            parts = [(v * product).sum().double() for v, product in zip(vectors, products, strict=True)]
            total += torch.stack(parts).detach().cpu() / probes
        return total

    # fused attention has no second derivative
    with frozen(on.model, but=weights), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        sums, images = on.summed(of_batch)
    return sums / images, images


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 with equal probability, in the shape of `like`."""
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


hessian_trace_scores = HessianTrace()
