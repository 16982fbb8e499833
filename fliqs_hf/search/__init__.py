"""One-shot mixed-precision search: space, policy, objective, exact derivation, sensitivity prior."""

from fliqs_hf.search.config import PRESETS, SearchConfig
from fliqs_hf.search.oneshot import FinalChoice, OneShotSearch
from fliqs_hf.search.policy import Policy
from fliqs_hf.search.problem import SearchProblem
from fliqs_hf.search.sensitivity import Sensitivity, fisher_scores, second_look
from fliqs_hf.search.space import Decision, SearchSpace

__all__ = [
    "PRESETS",
    "Decision",
    "FinalChoice",
    "OneShotSearch",
    "Policy",
    "SearchConfig",
    "SearchProblem",
    "SearchSpace",
    "Sensitivity",
    "fisher_scores",
    "second_look",
]
