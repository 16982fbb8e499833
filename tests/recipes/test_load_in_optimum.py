"""The environment that an exported file is loaded in by optimum; what is installed there is not tested here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes import load_in_optimum


@pytest.mark.parametrize(("imports", "installs"), [(False, True), (False, False), (True, True)])
def test_an_environment_that_was_left_half_made_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imports: bool, installs: bool
) -> None:
    """As by a connection that broke: there is a Python then, and not what it should import."""
    ran: list[str] = []

    def run(command: list[Any], **_: Any) -> SimpleNamespace:
        ran.append(str(command[1]))
        return SimpleNamespace(returncode=int(not (imports if command[1] == "-c" else installs)))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(load_in_optimum.venv, "create", lambda *_, **__: None)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / "pyvenv.cfg").touch()
    if imports or installs:
        assert load_in_optimum.make(tmp_path, "2.13.0") == python
    else:
        with pytest.raises(SystemExit, match=r"pip cannot install torch 2\.13\.0"):
            load_in_optimum.make(tmp_path, "2.13.0")
    assert ran == (["-c"] if imports else ["-c", "-m"])


def test_a_folder_that_is_no_environment_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no virtual environment"):
        load_in_optimum.make(tmp_path, "2.13.0")
    assert not any(tmp_path.iterdir())
