"""The alternatives to the one-shot search, at equal cost: each gives an allocation of the same search space."""

from fliqs_hf.baselines.allocations import manual, random_allocation, uniform
from fliqs_hf.baselines.front import FrontPoint, sensitivity_front
from fliqs_hf.baselines.sensitivity import elementwise_scores, hessian_trace_scores, hessian_traces, loss_delta_scores

__all__ = [
    "FrontPoint",
    "elementwise_scores",
    "hessian_trace_scores",
    "hessian_traces",
    "loss_delta_scores",
    "manual",
    "random_allocation",
    "sensitivity_front",
    "uniform",
]
