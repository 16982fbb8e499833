"""Threads that work on parts: all parts, no gradients, errors, and settings of other threads left alone."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
import torch

from fliqs_hf.selection.scores.workers import Workers


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_part_is_worked_on(device: str) -> None:
    workers, seen = Workers(), torch.zeros(20)
    weight = torch.ones(1, requires_grad=True)

    def work(part: slice) -> None:
        seen[part] += weight  # would make `seen` need a gradient
        if device == "cpu":
            assert torch.get_num_threads() == 1

    workers.start(torch.device(device))
    try:
        workers.each(work, (slice(i, i + 3) for i in range(0, 20, 3)))
    finally:
        workers.stop()
    assert bool((seen == 1).all()) and not seen.requires_grad
    assert torch.is_grad_enabled()
    counts = [torch.get_num_threads()]
    other = Thread(target=lambda: counts.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert counts == [2, 2]


@pytest.mark.usefixtures("two_threads")
def test_an_error_reaches_the_caller() -> None:
    def work(part: slice) -> None:
        raise ValueError(part.start)

    workers = Workers()
    workers.start(torch.device("cpu"))
    try:
        with pytest.raises(ValueError, match="5"):
            workers.each(work, [slice(5, 6)])
    finally:
        workers.stop()
