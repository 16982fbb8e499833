"""Post-training sensitivity in other ways than the Fisher score, each for every choice of every decision.

`loss_delta_scores` measures what `search.fisher_scores` estimates. `elementwise_scores` and `hessian_trace_scores` are
the scores of two published methods, to put into the same integer program. Scores of different functions have different
units: compare the allocations that they give, not the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.checks import is_whole
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.selection import SearchSpace, fisher_scores
from fliqs_hf.selection.scores.fisher import Forward, frozen, layers_of, meaningful
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task


@torch.no_grad()
def loss_delta_scores(
    model: nn.Module,
    batches: Sequence[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    task: Task = IMAGE_CLASSIFICATION,
) -> Tensor:
    """Increase of the mean loss for each choice of each decision, all else in fp32: float32 [D, K].

    One evaluation of all `batches` per decision and format: D·K + 1 passes, where the Fisher score needs one. Where
    weights and inputs are decided apart, each is scored with the other in fp32.

    Raises: as `fisher_scores`.
    """
    if not any(len(y) for _, y in batches):
        raise DataError("the loss deltas got no images: give them a split that is not empty")

    def loss() -> float:
        losses = task.losses()
        with evaluation(model):
            total = float(sum(losses(forward(x), y) for x, y in batches))
        if not losses.images:
            raise DataError("the loss deltas got no images: give them a split that is not empty")
        losses.check(int(losses.invalid), losses.images)
        return total / losses.images

    switch = make_searchable(model, space.formats, names=[layer.name for layer in space.layers])
    try:
        with switch.disabled():
            clean = loss()
        scores = torch.zeros(len(space.decisions), len(space.formats))
        for row, decision in enumerate(tqdm(space.decisions, desc="loss deltas")):
            for column, fmt in enumerate(space.formats):
                formats = LayerFormats(fmt, None if decision.kind == "weight" else fmt)
                switch.set_allocation(Allocation(dict.fromkeys(decision.layers, formats)))
                if decision.kind == "activation":
                    switch.leave_weights()
                scores[row, column] = loss() - clean
        if not scores.isfinite().all():
            raise DataError("the loss deltas met a loss that is not finite: check images and model")
        return meaningful(scores)
    finally:
        restore(model)


def elementwise_scores(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    settings: QuantizerSettings | None = None,
    task: Task = IMAGE_CLASSIFICATION,
) -> Tensor:
    """mean_i Σ (g_i·ΔY_i)², the sum over positions and channels of a layer's output: float32 [D, K].

    The Fisher score with the square inside the sum: errors of different elements of one output never cancel. One
    forward and backward pass, and one run of each layer per format.

    Arguments and errors are those of `fisher_scores`; the loss is cross-entropy with the true labels.
    Source: the gradient method of NVIDIA ModelOpt's `auto_quantize`, from its documentation; summed over images there.
    """
    return fisher_scores(model, batches, forward, space, settings, "element").decision_scores


def hessian_trace_scores(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    settings: QuantizerSettings | None = None,
    *,
    probes: int = 1,
    seed: int = 0,
    task: Task = IMAGE_CLASSIFICATION,
) -> Tensor:
    """Tr(H)/n · ‖Q(W) − W‖² summed over a decision's layers, H the Hessian of the mean loss for the n weights of one
    layer: float32 [D, K].

    Only weights are scored, as in the source. Where weight and input share a format, the weight's score decides for
    both. A trace that comes out negative counts as 0.

    Args:
        model, batches, forward, settings: as for `fisher_scores`; a second backward pass through the attention needs
            its plain form, which is selected here.
        probes, seed: see `hessian_traces`.
    Raises: ConfigError: inputs have decisions of their own, or `probes` is not positive. DataError: no batch, or a
        loss or derivative that is not finite.
    Source: HAWQ-V2 (Dong et al. 2019, arXiv 1911.03852), section 3.1.
    """
    if space.activation != "same":
        raise ConfigError(
            "Hessian traces score weights only, and nothing would choose the formats of inputs: use a space with "
            "activation='same', or another score"
        )
    settings = settings or QuantizerSettings()
    traces = hessian_traces(model, batches, forward, space, probes=probes, seed=seed).clamp(min=0)
    scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    for row, (info, index) in enumerate(zip(space.layers, space.weight_decision.tolist(), strict=True)):
        weight = model.get_parameter(f"{info.name}.weight").detach()
        for k, fmt in enumerate(space.formats):
            rounded = settings.weights(weight, fmt)
            scores[index, k] += traces[row] / weight.numel() * float((rounded - weight).double().square().sum())
    return meaningful(scores.float())


def hessian_traces(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    forward: Forward,
    space: SearchSpace,
    *,
    probes: int = 1,
    seed: int = 0,
    task: Task = IMAGE_CLASSIFICATION,
) -> Tensor:
    """Trace of the Hessian of the mean loss for each layer's weight, by Hutchinson's estimator: float64 [L].

    E[vᵀHv] with entries of v drawn from ±1. All layers share one Hessian-vector product: the terms between layers have
    mean 0, so the estimate is unbiased, at more variance and an L-th of the time.

    Args:
        probes: vectors per batch. seed: of the vectors; drawn on the CPU, so the same on every device.
    Raises: as `hessian_trace_scores`.
    """
    if not is_whole(probes, 1):
        raise ConfigError(f"probes={probes!r} must be a whole number of at least 1")
    weights = [layer.get_parameter("weight") for layer in layers_of(model, space).values()]
    total = torch.zeros(len(weights), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    losses = task.losses()
    # fused attention has no second derivative
    with frozen(model, but=weights), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for inputs, labels in batches:
            loss = losses(forward(inputs), labels)
            gradients = torch.autograd.grad(
                loss, weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            for _ in range(probes):
                vectors = [_signs(weight, generator) for weight in weights]
                products = torch.autograd.grad(
                    gradients, weights, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                parts = [(v * product).sum().double() for v, product in zip(vectors, products, strict=True)]
                total += torch.stack(parts).detach().cpu() / probes
    count = losses.images
    if not count:
        raise DataError("the Hessian traces got no images: give them a split that is not empty")
    losses.check(int(losses.invalid), count)
    if not total.isfinite().all():
        raise DataError("the Hessian traces met a loss or derivative that is not finite: check images and model")
    return total / count


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 with equal probability, in the shape of `like`."""
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
