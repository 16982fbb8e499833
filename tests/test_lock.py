"""One writer per folder, across processes; a dead one is no hindrance."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fliqs_hf.errors import BusyError, DiskError
from fliqs_hf.lock import locked
from fliqs_hf.runs import locked_run


def process(work: Callable[[], None]) -> int:
    """In a child. Returns: its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def holder(folder: Path, then: Callable[[], None] = signal.pause) -> int:
    """A process that has the lock of `folder`, when this returns."""

    def hold() -> None:
        with locked(folder):
            then()

    pid = process(hold)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if json.loads((folder / ".lock").read_text())["pid"] == pid:
                return pid
        except (OSError, ValueError):
            time.sleep(0.01)
    raise AssertionError("no lock")


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_second_one_is_told_who_the_first_is(tmp_path: Path) -> None:
    pid = holder(tmp_path / "run")
    try:
        with pytest.raises(BusyError, match=rf"run: process {pid} on \S+, started 20\d\d-.*choose another folder"):
            locked(tmp_path / "run").__enter__()
        with locked(tmp_path / "another"):
            pass
    finally:
        end(pid)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    end(holder(tmp_path / "run"))
    assert (tmp_path / "run" / ".lock").exists()
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_what_a_killed_process_leaves_running_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Such as its data loaders, which notice after seconds: they are waited for, where they have the lock at all."""
    read, write = os.pipe()

    def with_child() -> None:
        child = os.fork()
        if child == 0:
            time.sleep(2)
            os._exit(0)
        os.write(write, str(child).encode())
        signal.pause()

    parent = holder(tmp_path, with_child)
    assert int(os.read(read, 20)) > 0
    end(parent)
    with locked(tmp_path):
        pass


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()
    with locked(tmp_path / "b"):
        (tmp_path / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["file"]


def test_only_one_of_many_gets_in(tmp_path: Path) -> None:
    """Each adds one to a number, which none may do while another does."""
    number = tmp_path / "number"
    number.write_text("0")

    def add() -> None:
        for _ in range(20):
            while True:
                try:
                    with locked(tmp_path):
                        number.write_text(str(int(number.read_text()) + 1))
                    break
                except BusyError:
                    time.sleep(0.001)

    pids = [process(add) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert number.read_text() == "80"


def test_where_nobody_can_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="a file stands where a folder should be"):
        locked(tmp_path / "file" / "run").__enter__()
    with locked_run("namespace/name"):  # on the Hub
        pass
    assert not Path("namespace").exists()
    (tmp_path / "run" / "fliqs").mkdir(parents=True)
    with locked_run(tmp_path / "run"), pytest.raises(BusyError):
        locked_run(tmp_path / "run").__enter__()
