"""The arguments of `fliqs-hf push`; what it does is in `fliqs_hf/cli/push.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser

HELP = "publish a run on the Hub: weights, card, report, history"
EXAMPLES = """  fliqs-hf push runs/digits user/digits-3bit --private
  fliqs-hf push runs/pilot user/deit-4bit --base_model facebook/deit-tiny-patch16-224 --license apache-2.0
The access token comes from `hf auth login` or HF_TOKEN."""


def arguments(parser: Parser) -> None:
    parser.add_argument("run", help="run folder, or that of a model alone")
    parser.add_argument("repo_id", help="namespace/name, or name in your own namespace")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--base_model", metavar="ID", help="the model on the Hub that was quantized")
    parser.add_argument("--license", metavar="ID", help="as the Hub names it, such as apache-2.0; default: that in "
                        "the README of a local original")  # fmt: skip
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--commit_message")
    parser.add_argument("--create_pr", action="store_true", help="propose it as a pull request")
