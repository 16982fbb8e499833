"""Which files of a run folder are ours: those that its record lists. Nothing else is ever replaced or removed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from fliqs_hf.errors import ConfigError, FormatError
from fliqs_hf.files import disk_errors, remove, write_text
from fliqs_hf.formats import parse as parse_format
from fliqs_hf.training.state import states

#: The record: every file, as a path in the run folder, before it is written.
RECORD = "written.json"
VERSION = 1
FILES = (
    "config.json", "results.json", "allocation.json", "metrics.jsonl", "policy.jsonl", "sensitivity.json",
    "search_space.json", "layers.json", "validation.json", "validation.html", "report.html", "front.csv", "front.png",
)  # fmt: skip
RESULTS = ("results.json", "front.csv")
#: Written as a whole, each file in them listed.
FOLDERS = ("checkpoint", "fp32", "figures")
#: Training states: listed as a whole ("state/"), and what is in them known by its name.
STATES = ("state", "fp32-state")
_STATE = re.compile(r"\.?(tmp\.|old\.)?step-\d{8}(\.tmp)?|best")
#: The run of one target of several: a sub-folder with a record of its own, listed as "bits-3/".
_TARGET = re.compile(r"(bits|bops|size_mb|ratio)-\d[\d.e-]*")
_DRAFTS = (".tmp.", ".old.")
#: What versions before the record wrote into their model folders, and as figures.
_MODEL_FILE = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|checksums|model\.safetensors\.index)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors"
)
_FIGURES = ("allocation.png", "accuracy_against_cost.png", "search.png")
#: Of a record or a config: more is none of ours.
_MOST_BYTES = 16_000_000

Kind = Literal["file", "folder", "states", "draft"]


def kind_of(name: str) -> Kind | None:
    """What runs keep under this name; None for names that they do not use."""
    if name in FILES:
        return "file"
    if name in FOLDERS:
        return "folder"
    if name in STATES:
        return "states"
    if name.startswith(_DRAFTS):
        return "draft" if name[5:] == RECORD or kind_of(name[5:]) else None
    if name.startswith("uniform_"):  # of --compare_uniform
        endings: tuple[tuple[str, Kind], ...] = ((".json", "file"), ("-state", "states"), ("", "folder"))
        ending, kind = next(pair for pair in endings if name.endswith(pair[0]))
        try:
            parse_format(name.removeprefix("uniform_").removesuffix(ending))
        except FormatError:
            return None
        return kind
    return None


class RunFiles:
    """What is ours in one run folder. A folder without a record owns nothing, unless an earlier version ran in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claimed: set[str] = set()

    def listed(self) -> set[str]:
        """Entries of the record, such as "config.json", "checkpoint/model.safetensors", "state/", "bits-3/".

        Raises: ConfigError: `written.json` is there, but is no record of ours.
        """
        record = self.path / RECORD
        if not os.path.lexists(record):
            return set(_adopted(self.path))
        data = _read(record)
        version, entries = data.get("format_version"), data.get("written")
        known = type(version) is int and version == VERSION
        if not known or not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ConfigError(
                f"{record} is no record that this version of fliqs_hf wrote, so nothing in that folder is replaced: "
                "choose another output folder"
            )
        return set(entries)

    def runs(self) -> list[RunFiles]:
        """Those of a front's targets."""
        names = (entry[:-1] for entry in sorted(self.listed()) if _TARGET.fullmatch(entry[:-1]))
        return [RunFiles(path) for name in names if (path := self.path / name).is_dir() and not path.is_symlink()]

    @property
    def holds_work(self) -> bool:
        """Whether something is here that took training or choosing: finished, or to be resumed."""
        for entry in self.listed():
            name, _, rest = entry.partition("/")
            if kind_of(name) == "states":
                found = bool(states(self.path / name))
            else:
                found = (rest != "" and name != "figures") or name in RESULTS or name.startswith("uniform_")
                found = found and (self.path / entry).exists()
            if found:
                return True
        return any(run.holds_work for run in self.runs())

    def check(self, *entries: str) -> None:
        """
        Args:
            entries: what is to be written, as in `listed`, or a folder as a whole ("checkpoint"); default: any name
                that runs use.
        Raises: ConfigError: something that is not ours has that name; or see `listed`.
        """
        with disk_errors(self.path):
            if not os.path.lexists(self.path):
                return
            if not self.path.is_dir():
                raise ConfigError(f"{self.path} is no folder: choose another output folder")
            listed = self.listed()
            for entry in entries or sorted(os.listdir(self.path)):
                if (found := self._foreign(entry, listed)) is not None:
                    raise ConfigError(
                        f"{found} is in the way: fliqs_hf did not write it (it is not in {self.path / RECORD}), and "
                        "replaces nothing else. Move it away, or choose another output folder"
                    )

    def claim(self, *entries: str) -> None:
        """List what is about to be written; of a folder as a whole, only see that it can be replaced.

        Raises: ConfigError: see `check`. DiskError: the record cannot be written.
        """
        if new := [entry for entry in entries if entry not in self._claimed]:
            self.check(*new)
            self.add(entry for entry in new if _is_entry(entry))
            self._claimed.update(new)

    def add(self, entries: Iterable[str]) -> None:
        """List entries. Raises: DiskError."""
        listed, more = self.listed(), set(entries)
        if more - listed:
            self._write(listed | more)

    def write(self, name: str, text: str) -> None:
        """A file of text: complete, or as it was. Raises: ConfigError, DiskError: see `claim`."""
        self.claim(name)
        write_text(self.path / name, text)

    def discard(self, entry: str) -> None:
        """Remove what is ours of a file or folder ("state"), and the folder itself if nothing else is in it.

        Raises: DiskError: it cannot be removed.
        """
        listed = self.listed()
        gone = {each for each in listed if f"{each}/".startswith(f"{entry}/")}
        self._remove(gone)
        self._claimed -= gone
        if gone:
            self._write(listed - gone)

    def clear(self) -> None:
        """Remove all that is ours, the runs of targets and the record included. Links are never followed.

        Raises: ConfigError: see `check`; nothing was removed then. DiskError: something cannot be removed.
        """
        listed, runs = self.listed(), self.runs()
        for folder in (self, *runs):
            folder.check()
        if not listed:
            return
        self._write(listed)  # what an earlier version's run is known by is among the first to go
        for run in runs:
            run.clear()
        self._remove(listed)
        drafts = [self.path / name for name in os.listdir(self.path) if kind_of(name) == "draft"]
        with disk_errors(self.path):
            for path in (*drafts, self.path / RECORD):
                remove(path)
        self._claimed.clear()

    def _foreign(self, entry: str, listed: set[str]) -> Path | None:
        """What is not ours where `entry` would be written."""
        name, _, rest = entry.partition("/")
        path, kind = self.path / name, kind_of(name)
        if not os.path.lexists(path) or (kind is None and not _TARGET.fullmatch(name)):
            return None
        if kind == "draft":  # there was none when the record was begun
            return None if listed else path
        if path.is_symlink() or path.is_file() != (kind == "file") or path.is_dir() == (kind == "file"):
            return path  # links we make none
        if kind == "file":
            return None if name in listed else path
        if kind == "states":
            known = f"{name}/" in listed
            return next((p for p in sorted(path.iterdir()) if not known or not _STATE.fullmatch(p.name)), None)
        inside = [self.path / entry] if rest else sorted(path.rglob("*")) if kind == "folder" else []
        return next((p for p in inside if os.path.lexists(p) and not self._is_ours(p, listed)), None)

    def _is_ours(self, path: Path, listed: set[str]) -> bool:
        if path.is_symlink():
            return False
        return path.is_dir() or path.relative_to(self.path).as_posix() in listed

    def _remove(self, entries: Iterable[str]) -> None:
        for entry in sorted(entries):
            with disk_errors(self.path / entry):
                path = self.path / entry
                chain = [path, *path.parents][: len(path.relative_to(self.path).parts)]
                if any(part.is_symlink() for part in chain):
                    continue  # put there by somebody else
                if path.is_file():
                    path.unlink()
                elif entry.endswith("/") and kind_of(path.name) == "states" and path.is_dir():
                    for state in path.iterdir():
                        if _STATE.fullmatch(state.name) and not state.is_symlink():
                            remove(state)
                for folder in chain:
                    if folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()

    def _write(self, entries: Iterable[str]) -> None:
        text = json.dumps({"format_version": VERSION, "written": sorted(entries)}, indent=1) + "\n"
        write_text(self.path / RECORD, text)


def _is_entry(entry: Any) -> bool:
    """Whether a run can have written it: nothing outside its folder, no name that runs do not use."""
    if not isinstance(entry, str) or "\\" in entry or "\0" in entry:
        return False
    name, *inside = entry.split("/")
    if inside == [""]:
        return kind_of(name) == "states" or _TARGET.fullmatch(name) is not None
    if not inside:
        return kind_of(name) == "file"
    return kind_of(name) == "folder" and not {"", ".", ".."} & set(inside)


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no small regular file that holds one."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return {}
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _adopted(path: Path) -> Iterator[str]:
    """What a run of a version without a record left: known by the config that it wrote, then by its names."""
    config = _read(path / "config.json")
    versions = config.get("versions")
    if "command" not in config or not isinstance(versions, dict) or not {"fliqs-hf", "fliqs_hf"} & set(versions):
        return
    for entry in path.iterdir():
        kind = None if entry.is_symlink() else kind_of(entry.name)
        if kind == "file":
            yield entry.name
        elif kind == "states":
            yield f"{entry.name}/"
        elif kind == "folder" and entry.is_dir():
            known = _FIGURES.__contains__ if entry.name == "figures" else _MODEL_FILE.fullmatch
            yield from (f"{entry.name}/{file.name}" for file in entry.iterdir() if known(file.name))
        elif _TARGET.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink() and RunFiles(entry).listed():
            yield f"{entry.name}/"
