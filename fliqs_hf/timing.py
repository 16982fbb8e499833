"""Times of models and steps: a clock that waits for the device, and rounds in which every case is run once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

#: Seconds from any point on.
Clock = Callable[[], float]


def device_clock(device: torch.device) -> Clock:
    """Seconds, once all work that was given to `device` is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def timed(run: Callable[[], object], clock: Clock) -> float:
    """Seconds that `run` takes."""
    start = clock()
    run()
    return clock() - start


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Clock = time.perf_counter,
    warm_up: int = 1,
    within: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Seconds of every case in every round. A round runs each case once, so that whatever else the machine does meets
    all of them, and times of one round can be divided by each other.

    Args:
        warm_up: rounds before those that count: weights are prepared, caches and clocks settle.
        within: the name of a case -> a context around it, outside of its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        for name, run in cases.items():
            with within(name):
                spent = timed(run, clock)
            if number >= warm_up:
                seconds[name].append(spent)
    return seconds


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of each round: `times` over `others`."""
    return [own / other for own, other in zip(times, others, strict=True)]
