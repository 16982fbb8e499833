"""How commands answer: aligned text for people, one JSON object for machines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

_answers: TextIO | None = None


@contextmanager
def alone_on_stdout() -> Iterator[None]:
    """What `answer` prints within this context is alone on stdout; what anything else prints goes to stderr."""
    global _answers
    _answers = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _answers = None


def answer(as_json: bool, data: Any, text: str) -> None:
    """Print `data` as JSON, or `text`."""
    print(json.dumps(data, indent=2, default=str) if as_json else text, file=_answers)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned to the left where the first row has a text, else to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *cells]) for column in range(len(head))]
    left = [
        bool(rows) and isinstance(rows[0][column], str) and not _number(rows[0][column]) for column in range(len(head))
    ]
    lines = [
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, widths, left, strict=True)
        )
        for row in [list(head), *cells]
    ]
    return "\n".join([lines[0].rstrip(), "-" * max(map(len, lines)), *(line.rstrip() for line in lines[1:])])


def _number(cell: str) -> bool:
    return bool(cell) and cell[0].isdigit()


def pass_through(args: argparse.Namespace, job: Callable[[list[str]], Any]) -> int:
    """Run a job that has a parser of its own. With --json among its arguments, the answer is what it returns."""
    rest = [argument for argument in args.rest if argument != "--json"]
    args.json = len(rest) < len(args.rest)
    if not args.json:
        job(rest)
        return 0
    answer(True, job(rest), "")
    return 0
