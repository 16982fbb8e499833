"""The arguments of `fliqs-hf hardware`; what it does is in `fliqs_hf/cli/hardware.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "which formats devices run, and what a checkpoint gains"
EXAMPLES = """  fliqs-hf hardware list
  fliqs-hf hardware show h100
  fliqs-hf hardware check runs/digits --hardware x86-vnni"""


def arguments(parser: Parser) -> None:
    parser.add_argument("what", choices=("list", "show", "check"))
    parser.add_argument("name", nargs="?", help="of a profile to show, or of a quantized checkpoint to check")
    parser.add_argument("--hardware", metavar="NAME",
                        help="to check for: a profile, auto (this machine; default), or a .yaml file")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
