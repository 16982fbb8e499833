"""Signals: one word and one status for each, outside of training and within."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from fliqs_hf.interrupt import Interrupted, finishing, stopping

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_a_job_stops_with_a_word_and_the_status_that_shells_give(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in ALL]
    with pytest.raises(Interrupted) as caught, stopping("do this"):
        send(number)
    how = "stopped" if number == signal.SIGINT else f"stopped by {number.name}"
    assert str(caught.value) == f"{how}; do this"
    assert caught.value.status == 128 + number
    assert [signal.getsignal(each) for each in ALL] == before


def test_the_second_signal_kills() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            with stopping("do this"):
                try:
                    send(signal.SIGTERM)
                finally:
                    send(signal.SIGTERM)
                    os._exit(7)
        except BaseException:
            os._exit(8)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


@pytest.mark.parametrize("number", ALL)
def test_what_is_begun_is_finished(number: signal.Signals) -> None:
    def work() -> None:
        with stopping("go on"), finishing(alone=True) as flag:
            assert not flag.is_set
            send(number)
            if flag.is_set:
                raise flag.interrupted("stopped after step 3")

    with pytest.raises(Interrupted) as caught:
        work()
    assert (str(caught.value), caught.value.status) == ("stopped after step 3; go on", 128 + number)


@pytest.mark.parametrize("number", ALL)
def test_while_something_is_finished_the_second_signal_stops_at_once(number: signal.Signals) -> None:
    def twice(alone: bool) -> None:
        with finishing(alone):
            send(number)
            send(signal.SIGTERM)

    twice(alone=False)  # a launcher may send it twice
    with pytest.raises(Interrupted, match="at once") as caught:
        twice(alone=True)
    assert caught.value.status == 143


@pytest.mark.parametrize("context", [lambda: stopping("x"), lambda: finishing(True)], ids=["stopping", "finishing"])
def test_what_is_ignored_stays_so(context: Any) -> None:
    """`nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with context():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stopping("x"), finishing(True):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
