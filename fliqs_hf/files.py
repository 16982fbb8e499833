"""The one place for writing files: complete or as they were, on the disk when said to be, with errors that say why."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fliqs_hf.errors import DiskError

_SPACE = "free some space"
_FILE = "a file stands where a folder should be: move it away, or choose another name"
_ACCESS = "give this user the right to write there, or choose another folder"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"{_SPACE}, or have the quota raised",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EROFS: "the file system is mounted read-only: choose another folder",
    errno.ENOENT: "its folder does not exist, or was removed or unmounted meanwhile: make it, or choose another",
    errno.ENOTDIR: _FILE,
    errno.EEXIST: _FILE,
    errno.EISDIR: "a folder stands where a file should be: move it away, or choose another name",
    errno.ENOTEMPTY: "another process writes there: wait until it is done, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file system or a limit of the shell (ulimit -f) allows no file of that size",
    errno.EMFILE: "this process has too many files open: raise the limit (ulimit -n)",
    errno.EIO: "the disk or its connection failed: check it, or choose a folder on another",
}
#: What file systems answer that cannot flush a folder.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Say what really happened where `path` cannot be written. Raises: DiskError, for OSError and SafetensorError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"os error (\d+)", str(error))):  # safetensors keeps it in the text
            number = int(found[1])
        what = os.strerror(number) if number is not None else str(error)
        raise DiskError(
            f"cannot write {path}: {what}; {_REMEDIES.get(number or 0, 'check the disk, or choose another folder')}"
        ) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path`, to make a file or a folder there, which becomes `path` when the block ends.

    Everything is on the disk before it is renamed. A file is replaced at once; a folder is away for the moment between
    two renames. A link stays a link: what it points at is replaced. Folders above are made.

    Raises: DiskError: what was there is untouched. It is also raised for a device or pipe, which a file would replace.
    """
    final = Path(os.path.realpath(path))
    draft, old = (final.with_name(f".{word}.{final.name}") for word in ("tmp", "old"))  # the ending says the format
    with disk_errors(path):
        if final.exists() and not (final.is_file() or final.is_dir()):
            raise DiskError(f"cannot write {path}: it is a device or a pipe; give the name of a file")
        final.parent.mkdir(parents=True, exist_ok=True)
        _put_back(old, final)
        for left in (draft, old):  # by a process that was killed
            remove(left)
        try:
            yield draft
            flush_all(draft)
            if final.is_dir() and draft.is_dir():
                os.replace(final, old)
            os.replace(draft, final)
        except BaseException:
            _put_back(old, final)
            _try_to_remove(draft)
            raise
        _flush_folder(final.parent)
        _try_to_remove(old)


def move_into(folder: Path, draft: Path, last: str) -> None:
    """Move the files of `draft`, on the same file system, into `folder`, that named `last` after all others.

    Files of the same names are replaced, others stay. Raises: DiskError: some may have been moved.
    """
    with disk_errors(folder):
        for file in sorted(draft.iterdir(), key=lambda file: (file.name == last, file.name)):
            if file.name == last:
                _flush_folder(folder)
            os.replace(file, folder / file.name)
        _flush_folder(folder)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8, complete or as it was. Raises: DiskError."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def append_text(path: str | Path, text: str) -> None:
    """Add to the end of a file, and wait until it is on the disk. Raises: DiskError."""
    with disk_errors(path), Path(path).open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def flush_all(path: Path) -> None:
    """A file, or every file and folder in a folder: have it on the disk. Raises: OSError."""
    if not path.is_dir():
        _flush(path, os.O_RDWR)
        return
    for folder, _, files in os.walk(path):
        for name in files:
            _flush(Path(folder) / name, os.O_RDWR)
        _flush_folder(Path(folder))


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it; nothing where there is none. Raises: OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_back(old: Path, final: Path) -> None:
    """Of a replacement that ended between its two renames."""
    if old.exists() and not final.exists():
        os.replace(old, final)


def _try_to_remove(path: Path) -> None:
    """What is left of it does no harm: the next writer removes it, or says why it cannot."""
    with suppress(OSError):
        remove(path)


def _flush_folder(path: Path) -> None:
    """So that the names in it survive a power cut, too."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which cannot
        return
    try:
        _flush(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
