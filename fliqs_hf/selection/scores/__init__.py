"""How much each format of each layer is expected to hurt: scores of one call and one record, by name."""

from fliqs_hf.selection.scores.fisher import elementwise_scores, fisher_scores
from fliqs_hf.selection.scores.hessian import HessianTrace, hessian_trace_scores, hessian_traces
from fliqs_hf.selection.scores.lampq import TypeAwareFisher, fisher_traces, lampq_scores
from fliqs_hf.selection.scores.loss_delta import loss_delta_scores
from fliqs_hf.selection.scores.registry import find_score, register_score, scores, unregister_score
from fliqs_hf.selection.scores.score import FormatScore, Repeatable, ScorePass, Sensitivity
from fliqs_hf.selection.scores.two_pass import TwoPass

__all__ = [
    "FormatScore",
    "HessianTrace",
    "Repeatable",
    "ScorePass",
    "Sensitivity",
    "TwoPass",
    "TypeAwareFisher",
    "elementwise_scores",
    "find_score",
    "fisher_scores",
    "fisher_traces",
    "hessian_trace_scores",
    "hessian_traces",
    "lampq_scores",
    "loss_delta_scores",
    "register_score",
    "scores",
    "unregister_score",
]
