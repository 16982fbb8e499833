"""The arguments of `fliqs-hf front`; what it does is in `fliqs_hf/cli/front.py`."""

from __future__ import annotations

from fliqs_hf_cli import quantize
from fliqs_hf_cli.parser import Parser, columns, match_labels, take_defaults

HELP = "what every budget buys: the best allocations by cost, from one pass over images"
EXAMPLES = """  fliqs-hf front MODEL fronts/deit --calibration photos/
  fliqs-hf front MODEL fronts/deit --calibration photos/ --costs weight_bytes energy_uj --search_space int4 int8
  fliqs-hf front MODEL fronts/deit --calibration photos/ --measure 5
  fliqs-hf front MODEL fronts/deit --calibration photos/ --costs latency_ms --latency_table table.json
OUTPUT is a folder: front.csv, front.png, front.html, and an allocation.json for each point."""


def arguments(parser: Parser) -> None:
    parser.add_argument("model", help="fp32 checkpoint: Hub id or folder")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--calibration", metavar="DATASET", required=True, help="images: Hub id, folder, digits")
    parser.add_argument("--costs", nargs="+", metavar="COST", default=["bops", "weight_bytes"],
                        help="a front by each of these (default: %(default)s)")  # fmt: skip
    parser.add_argument("--measure", type=int, default=0, metavar="POINTS",
                        help="of each front: pack so many of them, as quantize does, and count right answers on "
                        "held-out images (default: none)")  # fmt: skip
    parser.add_argument(
        "--held_out", metavar="DATASET", help="labelled images for that; default: that of --calibration"
    )
    parser.add_argument("--held_out_split", help="default: validation or test where there is one, else the only one")
    parser.add_argument("--held_out_images", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--points", type=int, default=20, help="of each front (default: %(default)s)")
    parser.add_argument("--latency_table", metavar="FILE", help="times of layers, for the cost latency_ms")
    parser.add_argument("--search_space", nargs="+", metavar="FORMAT",
                        help="formats, or a space such as mixed; default: what --hardware runs")  # fmt: skip
    parser.add_argument("--activation", choices=("same", "separate"),
                        help="formats of weights and inputs: the same (default with formats that are named), or "
                        "chosen apart (default where the hardware runs every pair)")  # fmt: skip
    parser.add_argument("--hardware", metavar="NAME",
                        help="choose among formats that this runs: a profile, auto (this machine; default where no "
                        "formats are named), or a .yaml file")  # fmt: skip
    parser.add_argument("--calibration_split", help="default: train where there is one")
    parser.add_argument("--calibration_images", type=int, default=512, help="how many (default: %(default)s)")
    columns(parser, "with none, or if there is none, the model's own answers")
    match_labels(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    take_defaults(parser, quantize.arguments)
