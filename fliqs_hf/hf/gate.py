"""The decision on a quantized model, and how it is said: in a terminal, on a page, in the model card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fliqs_hf.wording import count, level, points

POWER = 0.8
"""Chance of a decision that `Gate.images` is planned for."""

Verdict = Literal["pass", "fail", "undecided"]

ACCURACY = "top-1 accuracy"
"""What is measured where nothing else is said."""

NOT_ASKED = "No decision was asked for: max_drop was not set."


@dataclass(frozen=True)
class Gate:
    """Decision whether the drop is below `max_drop` (a fraction).

    Attributes:
        lower, upper: one-sided bounds of the drop.
        verdict: "pass" if `upper` < `max_drop`, "fail" if `lower` > `max_drop`, else "undecided".
        images: in all, to settle an undecided case with a chance of `POWER`; None if decided, or if no number would
            settle it because the observed drop is `max_drop`.
        measure: what drops, in words.
    """

    max_drop: float
    confidence: float
    lower: float
    upper: float
    verdict: Verdict
    images: int | None
    measure: str = ACCURACY

    @property
    def passing_limit(self) -> float:
        """The smallest limit, in hundredths of a point, that the images at hand would have passed; a fraction."""
        hundredths = math.floor(1e4 * max(self.upper, 0.0)) + 1  # the bound must be below the limit, not at it
        return min(hundredths, 10_000) / 1e4

    @property
    def word(self) -> str:
        return {"pass": "Pass", "fail": "Fail", "undecided": "Undecided, so not passed"}[self.verdict]

    def explanation(self, drop: float, images: int) -> str:
        """What the decision rests on, in plain words.

        Args: drop: as observed, a fraction. images: that were compared.
        """
        limit, sure = f"the limit of {points(self.max_drop)} points", f"with {level(self.confidence)} confidence"
        if self.verdict == "pass":
            most = f"at most {points(self.upper)}" if self.upper > 0 else f"it gains {points(-self.upper)} or more"
            return (
                f"The quantized model may take the original's place: {sure} it loses less than {limit} of "
                f"{self.measure} ({most})."
            )
        if self.verdict == "fail":
            return (
                f"The quantized model may not take the original's place: {sure} it loses more than {limit} of "
                f"{self.measure} (at least {points(self.lower)})."
            )
        return (
            f"{count(images)} images cannot tell whether the quantized model loses less than {limit} of "
            f"{self.measure}. They do show, {sure}, a loss of at most {points(self.upper)} points: a limit of "
            f"{points(self.passing_limit)} or more would have passed."
        )

    def advice(self, drop: float, images: int) -> str:
        """What it takes to decide an undecided limit; empty for a decided one."""
        if self.verdict != "undecided":
            return ""
        limit = f"{points(self.max_drop)} points"
        if self.images is None:
            return f"The observed loss is the limit of {limit} itself: more images would not help."
        text = (
            f"To decide a limit of {limit} when the observed loss is {points(drop)} takes about "
            f"{count(self.images - images)} more images ({count(self.images)} in all) for a chance of "
            f"{level(POWER)}, if the models go on differing on the same share of images as here."
        )
        if self.images > 10 * images:
            text += " If so many are out of reach, quantize less, or ask whether the application needs this limit."
        return text

    def sentence(self, drop: float, images: int) -> str:
        """The verdict, its explanation and the advice."""
        text, advice = self.explanation(drop, images), self.advice(drop, images)
        return f"{self.word}: {text[:1].lower()}{text[1:]}{' ' if advice else ''}{advice}"
