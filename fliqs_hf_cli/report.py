"""The arguments of `fliqs-hf report`; what it does is in `fliqs_hf/cli/report.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "write report.html and figures into a run folder"
EXAMPLES = """  fliqs-hf report runs/digits"""


def arguments(parser: Parser) -> None:
    parser.add_argument("run", help="run folder of quantize or search")
