"""Where results go: checked before any work, so that nothing of the user's is replaced and no work is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fliqs_hf.errors import ConfigError
from fliqs_hf.files import disk_errors
from fliqs_hf.runs.files import RunFiles
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.training.splits import is_digits

#: So much of a file says whose it is.
_HEAD_BYTES = 1 << 16


def data_source(name: str | None) -> str | None:
    """What a data set's name may stand for on this machine."""
    return None if name is not None and is_digits(name) else name


def check_apart(output: str | Path, sources: Mapping[str, str | None]) -> None:
    """
    Args:
        sources: by the argument's name, as the user gave them: folder, file, or a name that is neither.
    Raises: ConfigError: `output` is one of the sources, is in it, or contains it. Links are followed.
    """
    target = Path(os.path.realpath(output))
    for name, value in sources.items():
        if not value or not (source := Path(os.path.realpath(value))).exists():
            continue
        for how, inner, outer in (("is in", target, source), ("contains", source, target)):
            if any(_same(folder, outer) for folder in (inner, *inner.parents)):
                how = "is" if _same(inner, outer) else how
                raise ConfigError(
                    f"the output {str(output)!r} {how} {name}={value!r}, which is only read: choose another output"
                )


def check_places(runs: Iterable[RunFolder], sources: Mapping[str, str | None]) -> None:
    """Where runs would go, before anything is made there, a lock included.

    Raises: ConfigError: see `check_apart`. DiskError: a folder cannot be made or written.
    """
    for run in runs:
        check_apart(run.path, sources)
        check_writable(run.path)


def check_run_folders(runs: Iterable[RunFolder], replace: bool, remedy: str) -> None:
    """What is there. Nothing is changed.

    Args:
        replace: whether finished or resumable work may go. remedy: what to do otherwise.
    Raises: ConfigError: foreign files are in the way, or work that may not go.
    """
    for run in runs:
        run.files.check()
        if run.files.holds_work and not replace:
            raise ConfigError(f"{run.path} holds a run already: {remedy}, or choose another folder")


def check_writable(folder: Path) -> None:
    """See whether files can be made in a folder that exists, or can be made. Leaves nothing behind.

    Raises: DiskError: they cannot; it says why.
    """
    with disk_errors(folder):
        _try(folder)


def check_result_file(path: Path, is_ours: Callable[[str], object], argument: str = "--output") -> None:
    """
    Args:
        is_ours: whether an existing file that begins with this text is an earlier result of the same kind.
    Raises: ConfigError: the path names no file, one that is not ours, or one that a run folder has for its own use.
        DiskError: it cannot be written there.
    """
    if not path.name:
        raise ConfigError(f"{argument} {str(path)!r} names no file")
    with disk_errors(path):
        if path.is_dir():
            raise ConfigError(f"{argument} {path} is a folder: give the name of a file")
        if os.path.lexists(path) and not (path.is_file() and is_ours(_head(path))):
            raise ConfigError(
                f"{argument} {path} exists, and is no such result that fliqs_hf wrote: choose another name, or move it"
            )
    if any(RunFiles(run).uses(path) for run in (path.parent, path.parent.parent)):
        raise ConfigError(f"{argument} {path}: the run in that folder uses the name for its own; choose another")
    with disk_errors(path):
        _try(path.parent)


def _try(folder: Path) -> None:
    while True:
        try:
            os.lstat(folder)
            break
        except FileNotFoundError:
            folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _same(path: Path, other: Path) -> bool:
    """Whether they are one folder or file, also under two names (mounts, file systems that ignore case)."""
    return path == other or (path.exists() and other.exists() and path.samefile(other))


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES).decode("utf-8", errors="replace")
