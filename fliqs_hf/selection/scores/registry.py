"""The scores that are known by name."""

from __future__ import annotations

from fliqs_hf.errors import ConfigError, did_you_mean
from fliqs_hf.selection.scores.fisher import elementwise_scores, fisher_scores
from fliqs_hf.selection.scores.hessian import hessian_trace_scores
from fliqs_hf.selection.scores.lampq import lampq_scores
from fliqs_hf.selection.scores.loss_delta import loss_delta_scores
from fliqs_hf.selection.scores.score import FormatScore
from fliqs_hf.selection.scores.two_pass import TwoPass

_SCORES: dict[str, FormatScore] = {}


def register_score(score: FormatScore) -> None:
    """Make a score known by its name: to `allocate` and `quantize --score`, as the `prior` of a search, and to
    comparisons as the methods `<name>` and `ptq-<name>`.

    Raises: ConfigError: another one of this name, or what is no name.
    """
    name = score.name
    if not (isinstance(name, str) and name.replace("-", "_").isidentifier()) or name.startswith("ptq-"):
        raise ConfigError(f"the name of a score is a word such as 'loss-delta', not {name!r}")
    if name == "none" or _SCORES.setdefault(name, score) is not score:
        raise ConfigError(f"there is a score {name!r} already: choose another name, or unregister it")


def unregister_score(name: str) -> None:
    """Forget a score. Raises: ConfigError: it is none, or one of the package's own."""
    if name not in _SCORES or name in OWN:
        raise ConfigError(f"{name!r} is no score that was registered from outside")
    del _SCORES[name]


def scores() -> dict[str, FormatScore]:
    """All that are registered, by name."""
    return dict(_SCORES)


def find_score(name: str) -> FormatScore:
    """Raises: ConfigError: there is none."""
    if name not in _SCORES:
        hint = did_you_mean(name, _SCORES, f"use {', '.join(_SCORES)}")
        raise ConfigError(f"there is no score {name!r}{hint}")
    return _SCORES[name]


for _score in (loss_delta_scores, fisher_scores, elementwise_scores, hessian_trace_scores, lampq_scores, TwoPass()):
    register_score(_score)
OWN = tuple(_SCORES)
