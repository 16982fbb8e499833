"""What to choose, however it is scored: decisions, their costs, scores of formats, the exact choice at a target."""

from fliqs_hf.selection.problem import CostLimit, SearchProblem
from fliqs_hf.selection.scores.fisher import Sensitivity, fisher_scores, two_pass_scores
from fliqs_hf.selection.space import Decision, SearchSpace

__all__ = ["CostLimit", "Decision", "SearchProblem", "SearchSpace", "Sensitivity", "fisher_scores", "two_pass_scores"]
