"""Which files of a run folder are ours: those that its record lists. Nothing else is ever replaced or removed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

from fliqs_hf.errors import CheckpointError, ConfigError, FormatError
from fliqs_hf.files import disk_errors, flush_all, move_into, remove, write_text
from fliqs_hf.formats import parse as parse_format
from fliqs_hf.json_file import read_object
from fliqs_hf.lock import locked
from fliqs_hf.training.state import states

#: The sub-folder of everything but the model itself, which stands at the top where `from_pretrained` reads it.
RUN = "fliqs"
#: In it, the record: every file, as a path in the run folder, before it is written.
RECORD = "written.json"
#: While a run is made that will replace the one that is there.
DRAFT = f"{RUN}/.tmp.run"
VERSION = 2
#: The model card.
CARD = "README.md"
MODEL_CONFIG = "config.json"
FILES = (
    "settings.json", "results.json", "allocation.json", "metrics.jsonl", "policy.jsonl", "sensitivity.json",
    "alternatives.json", "search_space.json", "layers.json", "validation.json", "validation.html", "report.html",
    "front.csv", "front.png", "floor.json", "recommendation.json",
)  # fmt: skip
RESULTS = ("results.json", "front.csv")
#: Written as a whole, each file in them listed.
FOLDERS = ("fp32", "figures", "floor")
#: Training states: listed as a whole ("fliqs/state/"), and what is in them known by its name.
STATES = ("state", "fp32-state", "latent")
#: Of trainings that go on in a more precise allocation, see `--max_drop`.
_FLOOR_STATE = re.compile(r"floor-\d+-state")
_STATE = re.compile(r"\.?(tmp\.|old\.)?step-\d{8}(\.tmp)?|best")
#: At the top: what `save_pretrained` of a model and of its image processor write, and the card.
_MODEL_FILE = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|model\.safetensors\.index)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|README\.md"
)
#: The run of one target of several: a run folder of its own at the top, listed as "bits-3/".
_TARGET = re.compile(r"(\w+)-\d[\d.e-]*")
_DRAFTS = (".tmp.", ".old.")
#: Of a record: more is none of ours.
_MOST_BYTES = 16_000_000

Kind = Literal["file", "folder", "states", "draft"]


def kind_of(root: str) -> Kind | None:
    """What runs keep under this name in their folder, such as "config.json" or "fliqs/state"; None for other names."""
    name = root.removeprefix(f"{RUN}/")
    inside = name != root
    if name.startswith(_DRAFTS):
        known = inside and name[5:] in (RECORD, "model", "run")
        return "draft" if known or kind_of(root.replace(name, name[5:])) else None
    if not inside:
        return "file" if _MODEL_FILE.fullmatch(name) else None
    if name in FILES:
        return "file"
    if name in FOLDERS:
        return "folder"
    if name in STATES or _FLOOR_STATE.fullmatch(name):
        return "states"
    if name.startswith("uniform_"):  # of --compare_uniform
        endings: tuple[tuple[str, Kind], ...] = ((".json", "file"), ("-state", "states"), ("", "folder"))
        ending, kind = next(pair for pair in endings if name.endswith(pair[0]))
        try:
            parse_format(name.removeprefix("uniform_").removesuffix(ending))
        except FormatError:
            return None
        return kind
    return None


def is_run(path: str | Path) -> bool:
    """Whether this is a run folder, finished or not, that later commands may write into."""
    inside = Path(path) / RUN
    return inside.is_dir() and not inside.is_symlink() and not (inside / RECORD).is_symlink()


def is_earlier_run(path: Path) -> bool:
    """Whether versions before 0.1 ran here: they kept the model in `checkpoint/` and the record at the top."""
    if is_run(path):
        return False
    settings = _read(path / "config.json")
    return "written" in _read(path / RECORD) or ("command" in settings and isinstance(settings.get("versions"), dict))


def locked_run(name: str | Path) -> AbstractContextManager[None]:
    """`locked` for a run folder that is there. Nothing is locked where it is none, or where nobody can write."""
    return locked(name) if is_run(name) and os.access(name, os.W_OK) else nullcontext()


class RunFiles:
    """What is ours in one run folder. A folder without a record owns nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claimed: set[str] = set()

    @property
    def record(self) -> Path:
        return self.path / RUN / RECORD

    def listed(self) -> set[str]:
        """Entries of the record, such as "config.json", "fliqs/fp32/model.safetensors", "fliqs/state/", "bits-3/".

        Raises: ConfigError: `written.json` is there, but is no record of ours.
        """
        if not os.path.lexists(self.record):
            return set()
        data = _read(self.record)
        version, entries = data.get("format_version"), data.get("written")
        known = type(version) is int and version == VERSION
        if not known or not isinstance(entries, list) or not all(map(is_entry, entries)):
            raise ConfigError(
                f"{self.record} is no record that this version of fliqs_hf wrote, so nothing in that folder is "
                "replaced: choose another output folder"
            )
        return set(entries)

    def runs(self) -> list[RunFiles]:
        """Those of a front's targets."""
        names = (entry[:-1] for entry in sorted(self.listed()) if _TARGET.fullmatch(entry[:-1]))
        return [RunFiles(path) for name in names if (path := self.path / name).is_dir() and not path.is_symlink()]

    @property
    def holds_work(self) -> bool:
        """Whether something is here that took training or choosing: finished, or to be resumed."""
        # By a `runs.replacement`, between two runs: what came before the configuration is no model.
        broken_off = (self.path / DRAFT).exists() and not (self.path / MODEL_CONFIG).is_file()
        for entry in self.listed():
            root, rest = _parts(entry)
            name = root.removeprefix(f"{RUN}/")
            if kind_of(root) == "states":
                found = bool(states(self.path / root))
            else:
                found = name == root or (rest != "" and name != "figures")
                found = found or name in RESULTS or name.startswith("uniform_")
                found = found and (self.path / entry).is_file()
                found = found and not (broken_off and (name == root or name in RESULTS))
            if found:
                return True
        return any(run.holds_work for run in self.runs())

    def check(self, *entries: str) -> None:
        """
        Args:
            entries: what is to be written, as in `listed`, or a folder as a whole ("fliqs/fp32"); default: any name
                that runs use.
        Raises: ConfigError: something that is not ours has that name; or see `listed`.
        """
        with disk_errors(self.path):
            if not os.path.lexists(self.path):
                return
            if not self.path.is_dir():
                raise ConfigError(f"{self.path} is no folder: choose another output folder")
            if is_earlier_run(self.path):
                raise ConfigError(
                    f"{self.path} holds a run of an earlier version of fliqs_hf, which is neither replaced nor "
                    "resumed: choose another output folder, or move it away"
                )
            listed = self.listed()
            for entry in entries or self._names():
                if (found := self._foreign(entry, listed)) is not None:
                    raise ConfigError(
                        f"{found} is in the way: fliqs_hf did not write it (it is not in {self.record}), and "
                        "replaces nothing else. Move it away, or choose another output folder"
                    )

    def uses(self, path: Path) -> bool:
        """Whether there is a run here that has this file's name for a file of its own."""
        name = path.relative_to(self.path).as_posix()
        return bool(name == f"{RUN}/{RECORD}" or kind_of(name)) and bool(self.listed())

    def claim(self, *entries: str) -> None:
        """List what is about to be written; of a folder as a whole, only see that it can be replaced.

        Raises: ConfigError: see `check`. DiskError: the record cannot be written.
        """
        if new := [entry for entry in entries if entry not in self._claimed]:
            self.check(*new)
            self.add(entry for entry in new if is_entry(entry))
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

    @contextmanager
    def model(self) -> Iterator[Path]:
        """A folder to save the model and its image processor in, which come to stand at the top when the block ends.

        The configuration, without which nothing loads, goes first and comes last: at any moment there is the old
        model, the new one, or none.

        Raises: DiskError: the old model is there, or none. ConfigError: something in the way is not ours, or has no
            name of a model's.
        """
        draft = self.path / RUN / ".tmp.model"
        with disk_errors(self.path):
            remove(draft)
            draft.mkdir(parents=True)
            try:
                yield draft
                flush_all(draft)
                self._give_way(draft)
                move_into(self.path, draft, last=MODEL_CONFIG)
            finally:
                with suppress(OSError):  # the next model that is written removes it
                    remove(draft)

    def _give_way(self, draft: Path) -> None:
        """Remove the configuration of the model that is there, then what the new one does not replace, and list it."""
        names = {file.name for file in draft.iterdir()}
        if strange := sorted(name for name in names if kind_of(name) != "file"):
            raise ConfigError(f"the model comes with {strange[0]!r}, for which a run folder has no place")
        self.check(*names)
        self._remove({MODEL_CONFIG})
        for name in sorted(self.listed() - names):
            if "/" not in name and name != CARD:
                self.discard(name)
        self.add(names)

    def discard(self, entry: str) -> None:
        """Remove what is ours of a file or folder ("fliqs/state"), and the folder itself if nothing else is in it.

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
        for run in runs:
            run.clear()
        self._remove(listed)
        drafts = [self.path / name for name in self._names() if kind_of(name) == "draft"]
        with disk_errors(self.path):
            for path in (*drafts, self.record):
                remove(path)
            if not any(self.record.parent.iterdir()):
                self.record.parent.rmdir()
        self._claimed.clear()

    def _names(self) -> list[str]:
        """All that is there, at the top and in the sub-folder."""
        inside = self.path / RUN
        own = sorted(os.listdir(inside)) if inside.is_dir() and not inside.is_symlink() else []
        return [*sorted(os.listdir(self.path)), *(f"{RUN}/{name}" for name in own)]

    def _foreign(self, entry: str, listed: set[str]) -> Path | None:
        """What is not ours where `entry` would be written."""
        inside = self.path / RUN
        if os.path.lexists(inside) and (inside.is_symlink() or not inside.is_dir()):
            return inside
        name, rest = _parts(entry)
        path, kind = self.path / name, kind_of(name)
        if not os.path.lexists(path) or (kind is None and not _TARGET.fullmatch(name)):
            return None
        if kind == "draft":  # there was none when the record was begun, but its own
            return None if listed or (name == f"{RUN}/.tmp.{RECORD}" and _is_begun(path)) else path
        if path.is_symlink() or path.is_file() != (kind == "file") or path.is_dir() == (kind == "file"):
            return path  # links we make none
        if kind == "file":
            return None if name in listed else path
        if kind == "states":
            known = f"{name}/" in listed
            return next((p for p in sorted(path.iterdir()) if not known or not _STATE.fullmatch(p.name)), None)
        below = [self.path / entry] if rest else sorted(path.rglob("*")) if kind == "folder" else []
        return next((p for p in below if os.path.lexists(p) and not self._is_ours(p, listed)), None)

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
                elif entry.endswith("/") and kind_of(entry[:-1]) == "states" and path.is_dir():
                    for state in path.iterdir():
                        if _STATE.fullmatch(state.name) and not state.is_symlink():
                            remove(state)
                for folder in chain:
                    if folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()

    def _write(self, entries: Iterable[str]) -> None:
        write_text(self.record, record_text(entries))


def record_text(entries: Iterable[str]) -> str:
    """What `written.json` says of these entries."""
    return json.dumps({"format_version": VERSION, "written": sorted(entries)}, indent=1) + "\n"


def _parts(entry: str) -> tuple[str, str]:
    """The name that `kind_of` knows, and what is below it."""
    head, _, rest = entry.partition("/")
    if head != RUN:
        return head, rest
    name, _, rest = rest.partition("/")
    return f"{RUN}/{name}", rest


def _is_begun(path: Path) -> bool:
    """Whether a file is a record of which the first part, or nothing, has been written."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return False
    start, found = record_text(())[:20].encode(), path.read_bytes()[:20]
    return start.startswith(found)


def is_entry(entry: Any) -> bool:
    """Whether a run can have written it: nothing outside its folder, no name that runs do not use."""
    if not isinstance(entry, str) or "\\" in entry or "\0" in entry:
        return False
    root, _ = _parts(entry)
    inside = entry.removeprefix(root).split("/")[1:]
    if inside == [""]:
        return kind_of(root) == "states" or _TARGET.fullmatch(root) is not None
    if not inside:
        return kind_of(root) == "file"
    return kind_of(root) == "folder" and not {"", ".", ".."} & set(inside)


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no small regular file that holds one."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return {}
        return read_object(file)
    except (OSError, CheckpointError):
        return {}
