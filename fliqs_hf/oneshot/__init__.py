"""The one-shot search: a policy learns which formats do well while the weights are trained in those it samples."""

from fliqs_hf.oneshot.config import PRESETS, SearchConfig
from fliqs_hf.oneshot.policy import Policy
from fliqs_hf.oneshot.policy_search import FinalChoice
from fliqs_hf.oneshot.search import OneShotSearch

__all__ = ["PRESETS", "FinalChoice", "OneShotSearch", "Policy", "SearchConfig"]
