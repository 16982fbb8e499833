"""A score of the fp32 model and of the model near the target, as their geometric mean."""

from __future__ import annotations

from torch import Tensor

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.selection.problem import SearchProblem
from fliqs_hf.selection.scores.fisher import fisher_scores
from fliqs_hf.selection.scores.score import FormatScore, ScorePass, Sensitivity

#: A second look takes no score for less than this share of the first.
LEAST_SHARE = 1e-3


class TwoPass(FormatScore):
    """A model that fits its training images well has gradients on few of them, and every layer is scored as if the
    others were exact. So the scores are measured once more in the model as quantized by the allocation that the first
    ones give at the problem's target, before any training. A decision whose gradient is gone there (a dead unit, a
    saturated softmax) is taken to be a thousandth as sensitive as at first, not free.

    Images are those of one pass, seconds of both.

    Raises: also TargetError: the target is out of reach.
    """

    name, at_target = "two-pass", True

    def __init__(self, first: Sensitivity | None = None, band: float = 0.03, of: FormatScore = fisher_scores) -> None:
        """
        Args:
            first: scores of the plain model, where they are known; otherwise the images are gone through twice.
            band: as for `SearchProblem.choice_at_target`.
            of: the score that is measured twice.
        Raises: ConfigError: it cannot be measured in a quantized model.
        """
        if not of.again:
            raise ConfigError(f"the score {of.name!r} is measured once: it is not defined in a quantized model")
        self.first, self.band, self.of = first, band, of

    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        problem, space = on.choices, on.space
        if not isinstance(problem, SearchProblem) or problem.target is None:
            raise ConfigError(
                "the second of two passes is measured at a target: give a SearchProblem that has one, or use the "
                f"score {self.of.name!r}"
            )
        first = self.first
        if first is None:
            first = self.of(on.model, on.batches, on.forward, space, on.settings, combine=on.combine, task=on.task)
        allocation = space.allocation(problem.choice_at_target(-first.decision_scores, self.band))
        groups = {layer.name: layer.input_group for layer in space.layers}
        switch = make_searchable(
            on.model, space.formats, names=list(groups), input_groups=groups, settings=on.settings
        )
        try:
            switch.set_allocation(allocation)
            second, images = self.of.measure(on)  # all may be 0 here
        finally:
            restore(on.model)
        before = first.decision_scores.double()  # products of float32 scores would underflow
        after = second.double().maximum(LEAST_SHARE * before)
        return (before * after).sqrt().float(), images

    def record(self, scores: Tensor, images: int, seconds: float) -> Sensitivity:
        before = 0.0 if self.first is None else self.first.seconds
        return Sensitivity(scores, images, before + seconds, passes=2, method=self.of.name)
