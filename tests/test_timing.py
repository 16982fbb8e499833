"""Rounds of cases, on a clock that the test moves: nothing depends on the machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fliqs_hf.timing import device_clock, interleaved, ratios, timed


class Machine:
    """Work takes as long as it says, and the more the later it is run."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, ""

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> None:
        self.ran += name
        self.now += seconds * len(self.ran)


def test_every_round_runs_every_case_once_and_the_first_do_not_count() -> None:
    machine = Machine()
    cases = {"a": lambda: machine.work("a", 1.0), "b": lambda: machine.work("b", 2.0)}
    found = interleaved(cases, 3, clock=machine.clock, warm_up=2)
    assert machine.ran == "ab" * 5
    assert found == {"a": [5, 7, 9], "b": [12, 16, 20]}
    assert ratios(found["b"], found["a"]) == [12 / 5, 16 / 7, 20 / 9]


def test_what_is_around_a_case_is_outside_of_its_time() -> None:
    machine, inside = Machine(), []

    @contextmanager
    def within(name: str) -> Iterator[None]:
        machine.now += 100
        inside.append(name)
        yield
        machine.now += 100

    found = interleaved({"a": lambda: machine.work("a", 1.0)}, 2, clock=machine.clock, warm_up=0, within=within)
    assert found == {"a": [1, 2]} and inside == ["a", "a"]
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, 1)


def test_rounds_of_different_numbers_are_not_divided() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_the_clock_of_a_cpu_waits_for_nothing() -> None:
    assert device_clock(torch.device("cpu")) is time.perf_counter
    ticks = iter([3.0, 5.5])
    assert timed(lambda: None, lambda: next(ticks)) == 2.5
