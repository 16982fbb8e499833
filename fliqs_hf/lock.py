"""One writer per folder: a second process is told at once who is there."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fliqs_hf.errors import BusyError, CheckpointError, ConfigError
from fliqs_hf.files import disk_errors
from fliqs_hf.json_file import read_object

#: In the folder, while somebody writes there.
NAME = ".lock"
#: A killed process may leave data loaders behind, which keep its lock until they notice: torch looks every 5 seconds.
_GRACE_S = 15.0
#: A lock's content is far below it.
_MOST_BYTES = 1 << 16


@contextmanager
def locked(path: str | Path, file: Path | None = None) -> Iterator[None]:
    """Keep other processes away from a folder, which is made if it does not exist, or from something else.

    The system lets go of the lock when the process ends, however it does. For the main process of several only.

    Args:
        file: the lock's own; default: `.lock` in the folder `path`.
    Raises: BusyError: another process is there; it says which. DiskError: the folder cannot be written.
    """
    file = Path(path) / NAME if file is None else file
    _refuse_foreign(file)
    made = [folder for folder in file.parents if not folder.exists()]
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        _acquire(lock, path, file)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with disk_errors(file):
            file.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # before it is let go, or it might be another's
            file.unlink()
        lock.release()
        with suppress(OSError):  # something is in it
            for folder in made:
                folder.rmdir()


def _refuse_foreign(file: Path) -> None:
    """Raises: ConfigError: the name of the lock is that of something else, which would be lost, or would never end."""
    try:
        status = file.lstat()
        foreign = not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES
        if not foreign:
            content = file.read_bytes()  # once: another process may take it away
            foreign = content != b"" and b'"pid"' not in content
    except OSError:  # there is none, or `locked` says why there cannot be one
        return
    if foreign:
        raise ConfigError(f"{file} is in the way: it is no lock of fliqs_hf. Move it away, or choose another folder")


def _acquire(lock: Any, path: str | Path, file: Path) -> None:
    deadline = time.monotonic() + _GRACE_S
    while True:
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            holder = _holder(file)
            if _alive(holder) or time.monotonic() > deadline:
                raise BusyError(
                    f"another process is writing to {path}: {_name(holder)}; wait until it has finished, stop it, or "
                    "choose another folder"
                ) from None
            time.sleep(0.1)


def _holder(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except CheckpointError:  # it has just come or gone
        return {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "which one is not known yet"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"


def _alive(holder: dict[str, Any]) -> bool:
    """Whether it is worth no waiting: it runs, or on another machine, where nobody here can tell."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, ValueError, TypeError, OverflowError):
        return True
    return True
