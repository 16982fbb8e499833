"""The arguments of `fliqs-hf profile`; what it does is in `fliqs_hf/cli/profile.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "measure how long each layer takes in each format on this device"
GO_ON = "the same command goes on where it was"
EXAMPLES = """  fliqs-hf profile facebook/deit-small-patch16-224 small.json --search_space int4 int8 e2m1
  fliqs-hf profile MODEL table.csv --activation separate --search_space int4 int8 --batch_size 8
  fliqs-hf profile MODEL estimate.json --estimate h100 --search_space int8 e4m3
The table is what --latency_table takes. For each pair of formats the whole model is packed and timed, layer by layer,
in rounds; nothing else should run meanwhile. --estimate measures nothing: it is a roofline, and says so."""


def arguments(parser: Parser) -> None:
    parser.add_argument("model", help="fp32 checkpoint: Hub id or folder")
    parser.add_argument("output", help="table to write: a .json or .csv file")
    parser.add_argument("--search_space", nargs="+", metavar="FORMAT",
                        help="formats, or the name of a space; default: what this machine, or that of --estimate, "
                        "runs")  # fmt: skip
    parser.add_argument("--activation", choices=("same", "separate"),
                        help="each format for weights and inputs (default with formats that are named), or every pair "
                        "of two (default where the hardware runs them all)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="images in a pass (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="at least 3 (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--estimate", metavar="NAME",
                        help="from the figures of a hardware profile instead: a name, or a .yaml file")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the table that is in OUTPUT")
