"""The arguments of `fliqs-hf formats`; what it does is in `fliqs_hf/cli/formats.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "the table of number formats: bits, range, smallest step"
EXAMPLES = """  fliqs-hf formats
  fliqs-hf formats int4 e2m1 float8_e4m3fn --json"""


def arguments(parser: Parser) -> None:
    parser.add_argument("names", nargs="*", metavar="FORMAT", help="default: the common ones")
