"""Threads that each work on a part of the data with operators that use one thread.

An operator on as little as fits a cache takes some microseconds: to split it over threads and wait for all of them
costs as much again, and far more where another program has one of the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as PyTorch uses for one operator; none for work on another device than the CPU."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def start(self, device: torch.device) -> None:
        count = torch.get_num_threads()
        if device.type != "cpu" or count == 1:
            return
        ready = Barrier(count)  # every thread takes one

        def begin(_: int) -> None:
            torch.get_num_threads()  # a thread's first use sets the default, which must not come after what is set
            torch.set_num_threads(1)
            ready.wait()

        self._pool = ThreadPoolExecutor(count)
        list(self._pool.map(begin, range(count)))
        torch.set_num_threads(count)  # for threads that others start: the last number set is their default

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`work` of every item, without gradients, in order; its first error."""

        @torch.no_grad()  # a setting of each thread
        def run(item: T) -> R:
            return work(item)

        return list((map if self._pool is None else self._pool.map)(run, items))
