"""The arguments of `fliqs-hf inspect`; what it does is in `fliqs_hf/cli/inspect.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "what is in a quantized checkpoint, and whether it is intact"
EXAMPLES = """  fliqs-hf inspect runs/digits
  fliqs-hf inspect user/digits-3bit --layers"""


def arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("--layers", action="store_true", help="list every layer")
    parser.add_argument("--hardware", metavar="NAME", default="auto",
                        help="whose share of the bit operations to name: a profile, auto (this machine), or a .yaml "
                        "file")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
