"""Writing: complete or as it was, on the disk before it has its name, and errors that say what happened."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fliqs_hf.errors import DiskError
from fliqs_hf.files import append_text, disk_errors, replacing, write_text


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(draft: Path, text: str) -> None:
    (draft / "sub").mkdir(parents=True)
    (draft / "sub" / "a").write_text(text)


def test_files_and_folders_are_made_and_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "new" / "file.txt", text)
        with replacing(tmp_path / "new" / "folder") as draft:
            make(draft, text)
        assert listing(tmp_path) == {"new/file.txt": text, "new/folder/sub/a": text}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, ""), KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
def test_what_fails_in_the_middle_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "file", "old")
    with replacing(tmp_path / "folder") as draft:
        make(draft, "old")
    before = listing(tmp_path)

    def fail(name: str) -> None:
        with replacing(tmp_path / name) as draft:
            draft.write_text("ne") if name == "file" else make(draft, "ne")
            raise error

    for name in ("file", "folder"):
        with pytest.raises((DiskError, KeyboardInterrupt)):
            fail(name)
    assert listing(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing(tmp_path / "folder") as draft:
        make(draft, "old")
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == ".tmp.folder":
            raise OSError(errno.EIO, "")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DiskError, match="check it"), replacing(tmp_path / "folder") as draft:
        make(draft, "new")
    assert listing(tmp_path) == {"folder/sub/a": "old"}


def test_what_was_left_between_two_renames_is_put_back(tmp_path: Path) -> None:
    make(tmp_path / ".old.folder", "old")  # where a process was killed

    def fail() -> None:
        with replacing(tmp_path / "folder"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert listing(tmp_path) == {"folder/sub/a": "old"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_moment_it_is_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    """Dies before its n-th system call of those that change or flush anything, for every n."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fliqs_hf.files import replacing\n"
        "left = int(sys.argv[2])\n"
        "def counted(call):\n"
        "    def f(*a, **k):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*a, **k)\n"
        "    return f\n"
        "for name in ('mkdir', 'replace', 'fsync', 'unlink', 'rmdir'): setattr(os, name, counted(getattr(os, name)))\n"
        "path = Path(sys.argv[1])\n"
        "for text in ('old' * 9, 'new' * 9):\n"
        "    with replacing(path) as draft:\n"
        "        if 'folder' in path.name:\n"
        "            draft.mkdir(); (draft / 'a').write_text(text); (draft / 'b').write_text(text)\n"
        "        else:\n"
        "            draft.write_text(text)\n"
    )
    found, number = set(), 0
    fork = _forks(code)
    while True:
        path = tmp_path / str(number) / kind
        status = fork(str(path), str(number))
        inside = path.iterdir() if path.is_dir() else [path] if path.exists() else []
        state = tuple(sorted(p.read_text()[:3] for p in inside))
        found.add(state)
        assert len(set(state)) <= 1, state
        assert len(state) in (0, 2 if kind == "folder" else 1), state
        with replacing(path) as draft:  # whatever was left is no hindrance
            make(draft, "again") if kind == "folder" else draft.write_text("again")
        assert os.listdir(path.parent) == [kind]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        number += 1
    assert number > 4 and {state[:1] for state in found} == {(), ("old",), ("new",)}


def _forks(code: str):  # type: ignore[no-untyped-def]
    """Runs `code` with arguments in a child of this process, which has imported everything. Returns: its status."""

    def run(*arguments: str) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                sys.argv = ["-c", *arguments]
                exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    return run


def test_everything_is_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    rename, flush = os.replace, os.fsync

    def fsync(descriptor: int) -> None:
        seen.append("flush " + str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)))
        flush(descriptor)

    def replace(source: Path, target: Path) -> None:
        seen.append(f"rename {Path(source).name} {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "f", "x")
    assert seen == ["flush .tmp.f", "rename .tmp.f f", "flush ."]
    seen.clear()
    with replacing(tmp_path / "d") as draft:
        make(draft, "x")
    *flushed, renamed, last = seen
    assert sorted(flushed) == ["flush .tmp.d", "flush .tmp.d/sub", "flush .tmp.d/sub/a"]
    assert (renamed, last) == ("rename .tmp.d d", "flush .")
    seen.clear()
    append_text(tmp_path / "f", "y")
    assert seen == ["flush f"] and (tmp_path / "f").read_text() == "xy"


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big" / "target")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "big" / "target").read_text() == "x"


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DiskError, match="device or a pipe"):
        write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EROFS", "ENOENT", "EISDIR", "ENOTDIR", "EIO", "EMFILE", "EBUSY"])
def test_only_a_full_disk_wants_space(name: str) -> None:
    number = getattr(errno, name)
    for error in (OSError(number, "whatever"), _serializing(number)):
        with pytest.raises(DiskError) as caught, disk_errors("the/file"):
            raise error
        assert "the/file" in str(caught.value) and os.strerror(number) in str(caught.value)
        assert "space" not in str(caught.value)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_does(name: str) -> None:
    number = getattr(errno, name)
    for error in (OSError(number, "whatever"), _serializing(number)):
        with pytest.raises(DiskError, match="free some space"), disk_errors("the/file"):
            raise error


def _serializing(number: int) -> Exception:
    """As safetensors raises it, which has the number in its text only."""
    try:
        save_file({"a": torch.ones(1)}, "/nowhere/at/all")
    except Exception as error:
        text = str(error)
        assert re.search(r"os error 2\)", text), text
        return type(error)(text.replace("os error 2)", f"os error {number})"))
    raise AssertionError


def test_real_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="a file stands where a folder should be"):
        write_text(tmp_path / "file" / "below", "x")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(DiskError, match="a folder stands where a file should be"):
        write_text(tmp_path / "folder", "x")
    assert (tmp_path / "folder" / "x").is_dir()
    with pytest.raises(DiskError, match="does not exist, or was removed"):
        append_text(tmp_path / "gone" / "f", "x")
    with pytest.raises(DiskError, match="shorter name"):
        write_text(tmp_path / ("x" * 300), "x")
    with pytest.raises(DiskError, match="free some space"):
        append_text("/dev/full", "x")
