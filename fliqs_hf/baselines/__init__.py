"""The alternatives to the one-shot search, at equal cost: each gives an allocation of the same search space."""

from fliqs_hf.baselines.allocations import manual, random_allocation, uniform
from fliqs_hf.baselines.differentiable import DifferentiableConfig, differentiable_search
from fliqs_hf.baselines.front import FrontPoint, sensitivity_front
from fliqs_hf.baselines.multi_trial import MultiTrialResult, Trial, multi_trial
from fliqs_hf.baselines.registry import Baseline, baselines, register_baseline, unregister_baseline
from fliqs_hf.baselines.short_training import ShortTraining

__all__ = [
    "Baseline",
    "DifferentiableConfig",
    "FrontPoint",
    "MultiTrialResult",
    "ShortTraining",
    "Trial",
    "baselines",
    "differentiable_search",
    "manual",
    "multi_trial",
    "random_allocation",
    "register_baseline",
    "sensitivity_front",
    "uniform",
    "unregister_baseline",
]
