"""How the learning rate goes on from step to step: a function of the step alone, so a resumed run repeats it."""

from __future__ import annotations

import math
from typing import Literal, get_args

from fliqs_hf.checks import is_whole
from fliqs_hf.errors import ConfigError

#: By Transformers' names.
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]


def check_schedule(schedule: str, warmup_steps: int | None, max_steps: int) -> None:
    """Raises: ConfigError: no such schedule, or a warm-up that is longer than the training or that it has not."""
    if schedule not in get_args(Schedule):
        raise ConfigError(f"schedule={schedule!r} does not exist; choose from {', '.join(get_args(Schedule))}")
    if warmup_steps is not None and not (is_whole(warmup_steps, 0) and warmup_steps <= max_steps):
        raise ConfigError(f"warmup_steps={warmup_steps!r} must be between 0 and the {max_steps} steps of the training")
    if schedule == "constant" and warmup_steps:
        raise ConfigError(f"a constant learning rate has no warmup_steps={warmup_steps}: use constant_with_warmup")


def learning_rate_at(step: int, peak: float, schedule: Schedule, warmup: int, max_steps: int) -> float:
    """Linear warm-up, then one cosine or a straight line to zero, or no change; `constant` has no warm-up."""
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant_with_warmup":
        return peak
    done, rest = step - warmup, max(1, max_steps - warmup)
    if schedule == "linear":
        return peak * (1 - done / rest)
    return peak * (1 + math.cos(math.pi * done / rest)) / 2
