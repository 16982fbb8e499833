"""Allocations that need no data: uniform, by hand, and random at a given cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import LayerInfo
from fliqs_hf.formats import Format
from fliqs_hf.selection import SearchProblem, SearchSpace


def uniform(layers: Sequence[LayerInfo], fmt: str | Format) -> Allocation:
    """Every layer's weight and input in one format."""
    return Allocation.uniform([layer.name for layer in layers if layer.quantizable], fmt)


def manual(layers: Sequence[LayerInfo], inner: str | Format = "int4", outer: str | Format = "int8") -> Allocation:
    """First and last layer in `outer`, the rest in `inner`: mixed precision as people do it by hand."""
    layers = [layer for layer in layers if layer.quantizable]
    ends = {layer.name for layer in (*layers[:1], *layers[-1:])}
    return Allocation(
        {layer.name: LayerFormats.of(*([outer if layer.name in ends else inner] * 2)) for layer in layers}
    )


def random_allocation(problem: SearchProblem, seed: int, band: float = 0.03) -> Allocation:
    """A random allocation within [1 − band, 1] of the target: the best one for random scores.

    Raises: TargetError: the target is out of reach.
    """
    cost = problem.target_cost
    choice = problem.best_choice(random_scores(problem.space, seed), low=(1 - band) * cost, high=cost)
    return problem.space.allocation(choice)


def random_scores(space: SearchSpace, seed: int) -> Tensor:
    """Uniform in [0, 1): float32 [D, K]."""
    return torch.rand(len(space.decisions), len(space.formats), generator=torch.Generator().manual_seed(seed))
