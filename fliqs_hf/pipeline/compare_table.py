"""The CSV of a comparison, to which an interrupted one adds what is missing."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fliqs_hf.errors import CheckpointError
from fliqs_hf.files import append_text, replacing
from fliqs_hf.json_file import parse_object, read_bytes
from fliqs_hf.runs.folder import versions
from fliqs_hf.validation.validate import processor_name

#: The fourth is called after what the task measures: "top1" of classifiers.
COLUMNS = ("method", "target_bits", "seed", "value", "loss", "cost_ratio", "steps", "seconds", "peak_mb", "allocation")
_SETTINGS = "# settings: "


class Table:
    """Rows of one comparison. Lines that begin with # are notes.

    Attributes:
        new: whether nothing is in it yet.
        done: (method, target_bits, seed) of its rows, as text.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read what is there; a last line that broke off is dropped.

        Raises: CheckpointError: it is damaged, or of a comparison with other settings.
        """
        self.path, self.settings = path, json.loads(json.dumps(settings, default=str))
        lines = self._lines()
        self.done = {(row["method"], row["target_bits"], row["seed"]) for row in rows_of(path, lines)}
        self.new = not any(line and not line.startswith("#") for line in lines)
        for line in lines:
            if line.startswith(_SETTINGS):
                self._check(line)

    def begin(self, notes: list[str], key: str) -> None:
        """Note what follows and, where nothing is there yet, the settings and the head of the table.

        Args: key: of what is measured, see `Score`; only the head needs it.
        """
        lines = [f"# {note}\n" for note in notes]
        if self.new:
            lines += [f"{_SETTINGS}{json.dumps(self.settings)}\n", _line(_head(key))]
        append_text(self.path, "".join(lines))

    def add(self, row: dict[str, Any]) -> None:
        append_text(self.path, _line([row[column] for column in COLUMNS]))

    def _lines(self) -> list[str]:
        try:
            data = read_bytes(self.path) if self.path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            text = whole.decode()
        except (CheckpointError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}; name another --output") from error
        if whole != data:
            if not data.startswith(b"#"):  # as every table begins
                raise CheckpointError(f"{self.path} is no table of a comparison; name another --output")
            with replacing(self.path) as draft:
                draft.write_bytes(whole)
        return text.splitlines()

    def _check(self, line: str) -> None:
        try:
            stored = parse_object(line.removeprefix(_SETTINGS), "the line of its settings")
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} is damaged in the line {line[:60]!r}: {error}") from error
        for key in {**stored, **self.settings}:
            if stored.get(key) != self.settings.get(key):
                raise CheckpointError(
                    f"{self.path} is of a comparison with {key}={stored.get(key)!r}, not {self.settings.get(key)!r}: "
                    "go on with the same settings, or name another --output"
                )


def is_table(head: str) -> bool:
    """Whether a file that begins like this is one; it may end after the notes, where it was killed."""
    rows = [line.split(",") for line in head.splitlines()]
    return any(_is_head(row) for row in rows) or re.match(r"# .*\bcompare(\.py)? .*--output ", head) is not None


def rows_of(path: Path, lines: list[str]) -> list[dict[str, str]]:
    """Rows below the head, checked. Raises: CheckpointError: it names the one that is no row of results."""
    try:
        head, *rest = list(csv.reader(line for line in lines if line and not line.startswith("#"))) or [[]]
    except csv.Error as error:
        raise CheckpointError(f"{path} is no table of a comparison: {error}") from error
    if head and not _is_head(head):
        raise CheckpointError(f"{path} is no table of a comparison: its first row is {','.join(head)[:60]!r}")
    rows = []
    for cells in rest:
        try:
            row = dict(zip(COLUMNS, cells, strict=True))
            for column in ("target_bits", "seed", "value", "loss", "cost_ratio", "steps", "seconds"):
                float(row[column])
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged: {','.join(cells)[:60]!r} is no row of results ({error}); remove it to go on"
            ) from error
        rows.append(row)
    return rows


def _head(key: str) -> list[str]:
    return [key if column == "value" else column for column in COLUMNS]


def _is_head(row: list[str]) -> bool:
    return len(row) == len(COLUMNS) and row == _head(row[COLUMNS.index("value")])


def key_of(lines: list[str]) -> str:
    """What the values of a table are, of its head."""
    heads = (line.split(",") for line in lines)
    return next((head[COLUMNS.index("value")] for head in heads if _is_head(head)), "top1")


def _line(cells: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def provenance() -> dict[str, Any]:
    """Versions, commit and hardware of a result."""
    found: dict[str, Any] = dict(versions())
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    if commit:
        found["commit"] = commit
    return found | {"hardware": processor_name(), "threads": torch.get_num_threads()}
