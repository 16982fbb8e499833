"""The arguments of `fliqs-hf recommend`; what it does is in `fliqs_hf/cli/recommend.py`."""

from __future__ import annotations

from fliqs_hf_cli import quantize
from fliqs_hf_cli.parser import Parser, columns, match_labels, take_defaults

HELP = "one quantized checkpoint that is accurate enough, with what speaks for it"
EXAMPLES = """  fliqs-hf recommend MODEL runs/pilot --calibration photos/ --max_drop 0.5
  fliqs-hf recommend MODEL runs/pilot --calibration photos/ --hardware onnxruntime-cpu --min_accuracy 0.78
It is `quantize` with a floor of accuracy and no other target: formats that the hardware runs, the cheapest allocation
that held-out labelled images prove to meet the floor, beside the next more and less precise ones that were tested.
Exit status 1, and no file, where none does."""


def arguments(parser: Parser) -> None:
    parser.add_argument("model", help="fp32 checkpoint: Hub id or folder")
    parser.add_argument("output", help="run folder to write")
    parser.add_argument("--calibration", metavar="DATASET", required=True,
                        help="labelled images: Hub id, folder, digits")  # fmt: skip
    parser.add_argument("--hardware", metavar="NAME",
                        help="whose formats to choose from: a profile, auto (this machine; default where no formats "
                        "are named), or a .yaml file")  # fmt: skip
    parser.add_argument("--max_drop", type=float, metavar="POINTS", help="default: 0.5, without --min_accuracy")
    parser.add_argument("--min_accuracy", type=float, metavar="FRACTION", help="least top-1, such as 0.78")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the floor (default: %(default)s)")
    parser.add_argument("--floor_steps", type=int, default=4, metavar="N",
                        help="allocations that are tested at most, from the most precise one down (default: "
                        "%(default)s): each is packed and run on all held-out images")  # fmt: skip
    parser.add_argument("--latency_table", metavar="FILE", help="choose by time instead of bit operations")
    parser.add_argument("--search_space", nargs="+", metavar="FORMAT",
                        help="formats, or a space such as mixed; default: what --hardware runs")  # fmt: skip
    parser.add_argument("--calibration_split", help="default: train where there is one")
    parser.add_argument("--calibration_images", type=int, default=256,
                        help="how many (default: %(default)s); the others decide, and the more they are, the smaller "
                        "the drop that they can rule out")  # fmt: skip
    parser.add_argument("--held_out", metavar="DATASET", help="default: that of --calibration")
    parser.add_argument("--held_out_split", help="default: validation or test where there is one, else the only one")
    parser.add_argument("--held_out_images", type=int, default=10_000, help="at most (default: %(default)s)")
    columns(parser)
    match_labels(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in OUTPUT")
    take_defaults(parser, quantize.arguments)
