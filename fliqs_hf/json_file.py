"""Reading JSON that somebody else may have written: of a bounded size and depth, of the expected type, or an error."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from fliqs_hf.errors import CheckpointError

#: Far above what this package writes (a policy of 2,000 steps and 100 decisions: 20 MB), far below what hurts.
MAX_BYTES = 256 * 2**20
MAX_DEPTH = 64
_NESTED = (dict, list)


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises: CheckpointError: it does not exist, is no regular file (a device or a pipe would never end), or is larger
        than `MAX_BYTES`.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"cannot read {path}: it is no regular file")
        if status.st_size > MAX_BYTES:
            raise CheckpointError(f"cannot read {path}: {status.st_size:,} bytes are more than {MAX_BYTES:,}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_text(path: str | Path) -> str:
    """The text of a regular file. Raises: CheckpointError: see `read_bytes`, or it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """Raises: CheckpointError: no JSON in UTF-8, or nested deeper than `MAX_DEPTH`; it names `source`."""
    try:
        data = json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise CheckpointError(f"cannot read {source}: nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read {source}: {error}") from error
    level = [data]
    for _ in range(MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, _NESTED))
        level = [child for values in children for child in values if isinstance(child, _NESTED)]
        if not level:
            return data
    raise CheckpointError(f"cannot read {source}: nested deeper than {MAX_DEPTH} levels")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises: CheckpointError: see `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def parse_object(text: str | bytes, source: str | Path) -> dict[str, Any]:
    """Raises: CheckpointError: see `parse_json`, or it is something else than an object."""
    data = parse_json(text, source)
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} holds a {type(data).__name__}, not an object")
    return data


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: CheckpointError: see `read_text` and `parse_object`."""
    return parse_object(read_text(path), path)


def read_objects(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line. Raises: CheckpointError: another line; see `read_text`."""
    return [parse_object(line, path) for line in read_text(path).splitlines() if line]
