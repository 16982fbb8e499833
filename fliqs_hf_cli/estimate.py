"""The arguments of `fliqs-hf estimate`; what it does is in `fliqs_hf/cli/estimate.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "what a model costs in given formats, from its config alone"
EXAMPLES = """  fliqs-hf estimate facebook/deit-tiny-patch16-224
  fliqs-hf estimate runs/digits --layers
  fliqs-hf estimate MODEL --allocation allocation.json --formats int4 e2m1"""


def arguments(parser: Parser) -> None:
    parser.add_argument("model", help="Hub id or folder; only its config is read")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT",
                        help="uniform models to list, or a space such as mixed; default: what --hardware "
                        "runs")  # fmt: skip
    parser.add_argument("--hardware", metavar="NAME",
                        help="to say how it runs each model: a profile, auto (this machine; default), or a .yaml "
                        "file")  # fmt: skip
    parser.add_argument("--allocation", metavar="FILE", help="an allocation.json to list as well")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the config's")
    parser.add_argument("--modules_to_not_convert", nargs="+", metavar="PATTERN", help="layers that stay in fp32")
    parser.add_argument("--layers", action="store_true", help="list MACs and parameters of every layer too")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
