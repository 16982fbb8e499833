"""Ctrl-C, SIGTERM (a scheduler, `docker stop`) and SIGHUP (a closed terminal) end a job in one way, and say so.

While weights are trained the step is finished and a state saved; elsewhere the job stops where it is. A second signal
stops at once. A signal that is ignored, as under `nohup`, stays so.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal arrived.

    Attributes:
        status: the exit status, 128 + the number of the signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def stopping(advice: str) -> Iterator[None]:
    """Around a whole job: SIGTERM and SIGHUP end it as Ctrl-C does; the same signal again kills.

    Args:
        advice: how to go on.
    Raises: Interrupted: for any of them, with what happened and the advice as its message.
    """

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _interrupted(f"stopped by {signal.Signals(number).name}", number)

    try:
        with _handled(handle, tuple(number for number in _SIGNALS if number != signal.SIGINT)):
            yield
    except KeyboardInterrupt as stop:
        status = stop.status if isinstance(stop, Interrupted) else 128 + signal.SIGINT
        raise Interrupted(f"{str(stop) or 'stopped'}; {advice}", status) from stop


class Flag:
    """Says whether a signal has arrived since `finishing` began, and which."""

    number: int | None = None

    @property
    def is_set(self) -> bool:
        return self.number is not None

    def interrupted(self, message: str) -> Interrupted:
        """To raise. In a process that got no signal itself, as another one of the same job did, it is as Ctrl-C."""
        return _interrupted(message, self.number or signal.SIGINT)


@contextmanager
def finishing(alone: bool) -> Iterator[Flag]:
    """All signals set the flag that this yields, so that what is begun can be finished.

    A second one stops at once where the process is `alone`; launchers of several may send every signal twice.
    """
    flag = Flag()

    def handle(number: int, _: object) -> None:
        if flag.is_set and alone:
            raise _interrupted("stopped at once", number)
        flag.number = number

    with _handled(handle, _SIGNALS):
        yield flag


@contextmanager
def _handled(handler: Callable[[int, Any], None], numbers: tuple[int, ...]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there can Python handle signals
        yield
        return
    numbers = tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _interrupted(message: str, number: int) -> Interrupted:
    return Interrupted(message, 128 + number)
