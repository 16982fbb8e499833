"""`fliqs-hf formats`."""

from __future__ import annotations

import argparse
from typing import Any

from fliqs_hf.cli.output import answer, table
from fliqs_hf.formats import COMMON, Format, code_values, parse
from fliqs_hf.formats.block import NAMED
from fliqs_hf.formats.spec import ALIASES

#: What stands for any other number of bits and size of groups.
INTEGER_BLOCKS = ("int4_g32", "int4_g128", "int4_zp", "int4_g32_zp")


def formats(args: argparse.Namespace) -> int:
    rows = [
        _row(fmt)
        for fmt in ([parse(name) for name in args.names] or (*COMMON, *NAMED.values(), *map(parse, INTEGER_BLOCKS)))
    ]
    text = table(
        ("format", "bits", "with scales", "largest", "smallest", "values", "also called"),
        [
            (
                r["name"],
                r["bits"],
                f"{r['bits_with_scales']:g}",
                f"{r['largest']:g}",
                f"{r['smallest']:g}",
                r["values"],
                ", ".join(r["aliases"]),
            )
            for r in rows
        ],
    )
    note = (
        "Before scaling, which maps the maximum of a tensor, channel, token or block to the largest value (not for\n"
        "BF16, and to its binade in MX formats). Formats that end in _zp have a zero point and are for inputs."
    )
    answer(args.json, rows, f"{text}\n\n{note}")
    return 0


def _row(fmt: Format) -> dict[str, Any]:
    values = code_values(fmt)
    return {
        "name": fmt.name,
        "bits": fmt.bits,
        "bits_with_scales": fmt.effective_bits,
        "kind": "integer" if fmt.is_integer else "floating point",
        "largest": fmt.max_value,
        "smallest": fmt.smallest,
        "values": 2**fmt.bits if fmt.for_inputs_only else len(values[values.isfinite()].unique()),
        "scaled": fmt.is_scaled,
        "aliases": [name for name, other in ALIASES.items() if other == fmt and name != fmt.name],
    }
