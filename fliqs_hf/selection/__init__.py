"""What to choose, however it is scored: decisions, their costs, scores of formats, the exact choice at a target."""

from fliqs_hf.selection.problem import CostLimit, SearchProblem
from fliqs_hf.selection.scores import (
    FormatScore,
    Repeatable,
    ScorePass,
    Sensitivity,
    TwoPass,
    find_score,
    fisher_scores,
    register_score,
    scores,
    unregister_score,
)
from fliqs_hf.selection.space import Decision, SearchSpace

__all__ = [
    "CostLimit",
    "Decision",
    "FormatScore",
    "Repeatable",
    "ScorePass",
    "SearchProblem",
    "SearchSpace",
    "Sensitivity",
    "TwoPass",
    "find_score",
    "fisher_scores",
    "register_score",
    "scores",
    "unregister_score",
]
