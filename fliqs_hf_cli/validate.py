"""The arguments of `fliqs-hf validate`; what it does is in `fliqs_hf/cli/validate.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser, columns, match_labels, task

HELP = "compare a quantized model with its original on your images"
EXAMPLES = """  fliqs-hf validate MODEL runs/pilot --dataset_name photos/ --split test --max_drop 0.5
  fliqs-hf validate MODEL user/quantized --dataset_name cifar10 --output page.html result.json"""


def arguments(parser: Parser) -> None:
    parser.add_argument("original", help="Hub id or folder")
    parser.add_argument("quantized", help="Hub id or folder; the result is kept in a run folder")
    parser.add_argument("--dataset_name", required=True, help="Hub id, folder of images, or 'digits'")
    parser.add_argument("--split", help="or a part, such as 'test[:500]'; default: validation or test if there is one")
    columns(parser)
    match_labels(parser)
    task(parser)
    parser.add_argument("--max_samples", type=int, help="use so many images, chosen at random")
    parser.add_argument(
        "--max_drop",
        type=float,
        metavar="POINTS",
        help="the gate: exit status 0 only if top-1 drops by less, at the given confidence",
    )
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--output", nargs="+", metavar="FILE", default=[], help="also write .html, .md or .json files")
