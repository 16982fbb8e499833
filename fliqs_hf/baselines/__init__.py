"""The alternatives to the one-shot search, at equal cost: each gives an allocation of the same search space."""

from fliqs_hf.baselines.allocations import manual, random_allocation, uniform
from fliqs_hf.baselines.differentiable import DifferentiableConfig, differentiable_search
from fliqs_hf.baselines.sensitivity import loss_delta_scores

__all__ = [
    "DifferentiableConfig",
    "differentiable_search",
    "loss_delta_scores",
    "manual",
    "random_allocation",
    "uniform",
]
