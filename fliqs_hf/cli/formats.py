"""`fliqs-hf formats`."""

from __future__ import annotations

import argparse
from typing import Any

from fliqs_hf.cli.output import answer, table
from fliqs_hf.formats import COMMON, Format, code_values, parse
from fliqs_hf.formats.spec import ALIASES


def formats(args: argparse.Namespace) -> int:
    rows = [_row(fmt) for fmt in ([parse(name) for name in args.names] or COMMON)]
    text = table(
        ("format", "bits", "largest", "smallest", "values", "also called"),
        [
            (r["name"], r["bits"], f"{r['largest']:g}", f"{r['smallest']:g}", r["values"], ", ".join(r["aliases"]))
            for r in rows
        ],
    )
    note = "Before scaling, which maps the maximum of a tensor, channel or token to the largest value (not for BF16)."
    answer(args.json, rows, f"{text}\n\n{note}")
    return 0


def _row(fmt: Format) -> dict[str, Any]:
    values = code_values(fmt)
    return {
        "name": fmt.name,
        "bits": fmt.bits,
        "kind": "integer" if fmt.is_integer else "floating point",
        "largest": fmt.max_value,
        "smallest": fmt.smallest,
        "values": len(values[values.isfinite()].unique()),
        "scaled": fmt.is_scaled,
        "aliases": [name for name, other in ALIASES.items() if other == fmt and name != fmt.name],
    }
