"""A run that takes the place of another: whenever the process ends, there is one of them or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.errors import ConfigError, DiskError
from fliqs_hf.runs.files import RunFiles
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.runs.replacement import replacing_run
from tests.helpers.outputs import contents

MODEL = ("config.json", "model.safetensors")


class Killed(BaseException):
    pass


def write(run: Path, *records: str, text: str = "new") -> None:
    """As `quantize` does."""
    folder = RunFolder(run)
    with replacing_run(folder.files) as draft:
        assert draft.name == run.name
        inside = RunFolder(draft)
        inside.write("settings.json", text)
        with inside.files.model() as model:
            for name in MODEL:
                (model / name).write_text(text)
        for name in records:
            inside.write(name, text)


def dying(patch: pytest.MonkeyPatch, count: int) -> Callable[[], bool]:
    """The process is killed at its file operation of this number: nothing is done from there on. Returns: whether."""
    left = [count]

    def stopping(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments, **more)

        return call

    changes = [(os, "replace"), (shutil, "rmtree"), *((Path, n) for n in ("unlink", "mkdir", "rmdir", "write_text"))]
    for where, name in changes:
        patch.setattr(where, name, stopping(getattr(where, name)))
    return lambda: left[0] < 0


def without_record(run: Path) -> dict[str, bytes]:
    """And without drafts, which nothing reads."""
    found = contents(run).items()
    return {name: text for name, text in found if name != "fliqs/written.json" and not name.startswith("fliqs/.")}


@pytest.mark.parametrize("before", [(), ("results.json", "floor.json")])
def test_a_process_that_is_killed_leaves_one_run_or_none(
    tmp_path: Path, before: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, killed, moments = tmp_path / "run", True, 0

    def begin() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / "notes.txt").write_text("mine")

    begin()
    write(run, "results.json", "allocation.json")
    new = without_record(run)
    while killed:
        begin()
        if before:
            write(run, *before, text="old")
        old = without_record(run)
        with monkeypatch.context() as patch:
            is_dead = dying(patch, moments)
            with suppress(Killed):
                write(run, "results.json", "allocation.json")
            killed = is_dead()
        there = without_record(run)
        assert there["notes.txt"] == b"mine"
        if "config.json" in there:
            assert there in (old, new) and RunFiles(run).holds_work
        else:
            assert not RunFiles(run).holds_work  # the same command is not refused
        write(run, "results.json", "allocation.json")
        assert without_record(run) == new and RunFiles(run).listed() == {*new} - {"notes.txt"}
        assert not list((run / "fliqs").glob(".*"))
        moments += 1
    assert moments > 20


def test_an_error_leaves_nothing_or_what_was_there(tmp_path: Path) -> None:
    def fails(error: BaseException) -> None:
        with replacing_run(RunFiles(tmp_path / "run")) as draft:
            RunFolder(draft).write("settings.json", "new")
            raise error

    (tmp_path / "run").mkdir()
    with pytest.raises(DiskError, match="No space left"):
        fails(OSError(28, "No space left on device"))
    assert contents(tmp_path) == {} and not list((tmp_path / "run").iterdir())
    write(tmp_path / "run", "results.json", text="old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fails(KeyboardInterrupt())
    assert contents(tmp_path) == before


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, text="old")

    def meanwhile() -> None:
        with replacing_run(RunFiles(run)) as draft:
            RunFolder(draft).write("results.json", "new")
            (run / "fliqs" / "results.json").write_text("mine")

    with pytest.raises(ConfigError, match=r"results\.json is in the way"):
        meanwhile()
    assert (run / "fliqs/results.json").read_text() == "mine" and (run / "config.json").read_text() == "old"


def test_everything_of_the_old_run_goes(tmp_path: Path) -> None:
    """States of training and runs of other targets as well."""
    run = tmp_path / "run"
    old = RunFolder(run)
    old.claim("state/", "figures/search.png")
    old.files.add({"bits-3/"})
    for name in ("fliqs/state/step-00000005/meta.json", "fliqs/figures/search.png"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    RunFolder(run / "bits-3").write("results.json", "x")
    assert old.files.holds_work
    write(run)
    assert sorted(contents(run)) == ["config.json", "fliqs/settings.json", "fliqs/written.json", "model.safetensors"]
