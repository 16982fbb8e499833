"""Compiling the quantizer: what is loaded is the user's own, and without it everything works."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fliqs_hf.formats import parse
from fliqs_hf.nn.native import compiled

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiled.ENVIRONMENT, raising=False)
    return tmp_path / "fliqs_hf"


def load() -> compiled.Library | None:
    return compiled.library.__wrapped__()


def works(library: compiled.Library | None) -> bool:
    assert library is not None
    codes, scales = library.codes(torch.tensor([[1.0, -127.0]]), parse("int8"), 0, compiled.Scaling())
    return codes.tolist() == [[129, 1]] and scales.tolist() == [[1.0]]


def test_it_is_built_once_and_only_the_user_can_write_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(load())
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o022 == 0
    monkeypatch.setenv("PATH", "")
    assert works(load())  # needs no compiler any more


def test_what_others_can_write_is_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(load())
    (file,) = cache.iterdir()
    file.unlink()  # not written to: it is mapped into this process
    file.write_bytes(b"of somebody else")
    file.chmod(0o777)
    assert works(load())  # built again
    assert file.stat().st_mode & 0o022 == 0
    cache.chmod(0o777)
    file.unlink()
    file.write_bytes(b"of somebody else")
    assert works(load())  # built elsewhere
    assert file.read_bytes() == b"of somebody else"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert works(load())


def test_without_a_compiler_it_says_so_and_goes_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="fliqs_hf")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert load() is None
    assert "no C++ compiler" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setenv("CXX", "false")  # a compiler that fails
    assert load() is None
    assert "false" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv(compiled.ENVIRONMENT, "0")
    assert load() is None
    assert not list(cache.iterdir())  # nothing half-made is left


def test_processes_that_build_at_the_same_time_do_not_meet(cache: Path) -> None:
    code = "from fliqs_hf.nn.native import compiled; assert compiled.library() is not None"
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ)) for _ in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert len(list(cache.iterdir())) == 1
    assert works(load())
