"""Traces of the Fisher information, levelled between types of layers, times squared rounding errors of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fliqs_hf.checks import is_whole
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.selection.problem import SearchProblem
from fliqs_hf.selection.scores.score import FormatScore, ScorePass, frozen


class TypeAwareFisher(FormatScore):
    """α_t · Tr(F)/n · ‖Q(W) − W‖² summed over a decision's layers, F the empirical Fisher information of the n weights
    of one layer, of type t; then again, in the model as the integer program quantizes it.

    Tr(F) = mean_i ‖∂loss_i/∂W‖². Layers whose names differ in the numbers of modules only are of one type, and α_t is
    what makes the mean of α_t · Tr(F)/n over a type 1, as traces of attention and MLP differ by orders of magnitude. A
    type of one layer, such as the classifier, thereby weighs as much as an average layer.

    Images are gone through one at a time, as many times as there are rounds.

    Source: LampQ (Kim et al., AAAI 2026, arXiv 2511.10004): Ω_i = α_t·tr(F_i), an integer program, and updates of its
        bits with what quantization has changed. How its α_t and updates are defined in detail is ours.
    """

    name, weights_only, most_images, at_target = "lampq", True, 512, True

    def __init__(self, updates: int = 2) -> None:
        """
        Args: updates: at most so many, fewer where the allocation stays.
        Raises: ConfigError: `updates` is negative.
        """
        if not is_whole(updates, 0):
            raise ConfigError(f"updates={updates!r} must be a whole number of at least 0")
        self.updates = updates

    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        problem, space = on.choices, on.space
        if not isinstance(problem, SearchProblem) or problem.target is None:
            raise ConfigError(f"the score {self.name!r} is measured at a target: give a SearchProblem that has one")
        errors = on.weight_errors()
        groups = {layer.name: layer.input_group for layer in space.layers}
        scores, images = self._scores(on, errors)
        choice = problem.choice_at_target(-scores)
        for _ in range(self.updates):
            switch = make_searchable(
                on.model, space.formats, names=list(groups), input_groups=groups, settings=on.settings
            )
            try:
                switch.set_allocation(space.allocation(choice))
                scores, images = self._scores(on, errors)
            finally:
                restore(on.model)
            before, choice = choice, problem.choice_at_target(-scores)
            if torch.equal(before, choice):
                break
        return scores, images

    def _scores(self, on: ScorePass, errors: Tensor) -> tuple[Tensor, int]:
        """[D, K]. Args: errors: float64 [L, K]."""
        traces, images = fisher_traces(on)
        weight = levelled(traces, [layer.name for layer in on.space.layers])
        scores = torch.zeros(len(on.space.decisions), errors.shape[1], dtype=torch.float64)
        return scores.index_add_(0, on.space.weight_decision, weight[:, None] * errors).float(), images


def levelled(traces: Tensor, names: Iterable[str]) -> Tensor:
    """`traces` [L], each over the mean of its type; 0 in a type that is all 0."""
    types = [tuple(part for part in name.split(".") if not part.isdigit()) for name in names]
    result = torch.zeros_like(traces)
    for one in dict.fromkeys(types):
        rows = torch.tensor([other == one for other in types])
        result[rows] = traces[rows] / traces[rows].mean().clamp(min=torch.finfo(traces.dtype).tiny)
    return result


def fisher_traces(on: ScorePass) -> tuple[Tensor, int]:
    """Tr(F)/n for the n weights of each layer: the squared gradient of an image's loss, mean over images and weights.

    Returns: float64 [L], and the number of images.
    Raises: as `FormatScore`.
    """
    weights = [layer.get_parameter("weight") for layer in on.layers().values()]
    numbers = torch.tensor([weight.numel() for weight in weights], dtype=torch.float64)

    def of_batch(losses: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """[L]"""
        total = torch.zeros(len(weights), dtype=torch.float64)
        for image, target in zip(inputs.split(1), targets.split(1), strict=True):
            loss = losses(on.forward(image), target)
            parts = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            total += torch.stack([part.double().square().sum() for part in parts]).cpu()
        return total

    with frozen(on.model, but=weights), torch.enable_grad():
        sums, images = on.summed(of_batch)
    return sums / images / numbers, images


lampq_scores = TypeAwareFisher()
