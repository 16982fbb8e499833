"""The arguments of `fliqs-hf quantize`; what it does is in `fliqs_hf/cli/quantize.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser, columns, match_labels, task

HELP = "quantize a checkpoint without training"
EXAMPLES = """  fliqs-hf quantize MODEL runs/w8a8                                      uniform INT8
  fliqs-hf quantize MODEL runs/w4 --weight_format int4 --activation_format none
  fliqs-hf quantize MODEL runs/mine --allocation allocation.json
  fliqs-hf quantize MODEL runs/w4a8 --weight_format int4 --activation_format int8 --calibration photos/
  fliqs-hf quantize MODEL runs/pilot --target_bits 4 --calibration photos/
  fliqs-hf quantize MODEL runs/small --target_size_mb 3 --target_energy_uj 400 --calibration photos/
  fliqs-hf quantize MODEL runs/safe --target_bits 4 --max_drop 0.5 --calibration photos/
The last three measure how sensitive the loss is to every format of every layer (one backward pass per image) and solve
for the best allocation at the target; several targets are met together, and none is exceeded. OUTPUT is a run folder:
a model, and what is known of it in OUTPUT/fliqs."""


def arguments(parser: Parser) -> None:
    parser.add_argument("model", help="fp32 checkpoint: Hub id or folder")
    parser.add_argument("output", help="run folder to write")
    parser.add_argument("--weight_format", help="one format for all weights (default: int8)")
    parser.add_argument("--activation_format", help="one format for all layer inputs, or none (default: int8)")
    parser.add_argument("--allocation", metavar="FILE", help="a format per layer, as a search writes it")
    _targets(parser)
    parser.add_argument(
        "--search_space",
        nargs="+",
        metavar="FORMAT",
        help="formats to choose from, or one of fliqs-s-int fliqs-s-fp fliqs-l-int fliqs-l-fp mixed; default: what "
        "some hardware multiplies as it is and --hardware runs",
    )
    parser.add_argument("--hardware", metavar="NAME",
                        help="choose among formats that this runs: a profile, auto (this machine; default where no "
                        "formats are named), or a .yaml file")  # fmt: skip
    parser.add_argument("--activation", choices=("same", "separate"),
                        help="formats of weights and inputs: the same, or chosen apart (default where the hardware "
                        "runs every pair, and with formats that are named)")  # fmt: skip
    _images(parser)
    _floor(parser)
    parser.add_argument(
        "--rounding", choices=("nearest", "gptq"), help="default: gptq with --calibration, else nearest"
    )
    parser.add_argument("--bias_correction", choices=("true", "false"),
                        help="keep the mean of every output channel; default: with one scale per layer")  # fmt: skip
    parser.add_argument("--activations", choices=("dynamic", "clipped", "absmax", "percentile", "mse"),
                        help="input scales: of each input itself (default), that times a factor per layer (clipped), "
                        "or one per layer")  # fmt: skip
    parser.add_argument("--weight_scale", choices=("absmax", "mse", "output"),
                        help="the largest value, or least error in the weight or in what the layer gives (needs "
                        "gptq); default: mse with --calibration, else absmax")  # fmt: skip
    parser.add_argument("--rotation", choices=("true", "false"),
                        help="turn what transformer blocks hand on into a basis without outliers, which changes no "
                        "answer of the fp32 model; default: true with --calibration, unless all inputs have one "
                        "format of 8 bits or more")  # fmt: skip
    parser.add_argument("--zero_points", choices=("true", "false"),
                        help="integer inputs of less than 8 bits may be one-sided; default: true with --calibration "
                        "and dynamic input scales")  # fmt: skip
    parser.add_argument("--fold_batchnorm", choices=("true", "false"), default="true",
                        help="batch norms into the convolutions before them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--modules_to_not_convert", nargs="+", metavar="PATTERN", help="layers that stay in fp32")
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in OUTPUT")


def _targets(parser: Parser) -> None:
    for name, text in (
        ("target_bits", "bit operations of the uniform model of so many bits"),
        ("target_bops", "bit operations per image"),
        ("target_size_mb", "size of the checkpoint in 10^6 bytes, never exceeded"),
        ("target_memory_mb", "weights with the largest input and output of a layer in 10^6 bytes, never exceeded"),
        ("target_ratio", "bit operations over those of fp32"),
        ("target_energy_uj", "energy per image in microjoules, never exceeded"),
        ("target_latency_ms", "time by --latency_table, never exceeded"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"mixed formats: {text}")
    parser.add_argument("--target", action="append", metavar="NAME=VALUE",
                        help="or one of these by name, or a cost that is registered")  # fmt: skip
    parser.add_argument("--require", action="append", metavar="PATTERN=FORMAT[,FORMAT]",
                        help="of layers that match: one of these formats, such as 'classifier=int8'")  # fmt: skip
    parser.add_argument("--min_bits", action="append", metavar="PATTERN=BITS",
                        help="of layers that match: at least so many, such as '*patch_embeddings*=6'")  # fmt: skip
    parser.add_argument("--score", metavar="NAME",
                        help="how sensitive the loss is to a format is found out: two-pass (default), fisher (half "
                        "the time), elementwise, loss-delta, hessian, lampq, or one that is registered")  # fmt: skip
    parser.add_argument("--latency_table", metavar="FILE", help="times of layers, as fliqs-hf profile writes them")


def _images(parser: Parser) -> None:
    parser.add_argument(
        "--calibration",
        metavar="DATASET",
        help="images that choose formats and improve rounding: Hub id, folder, digits",
    )
    parser.add_argument(
        "--calibration_split", help="or a part, such as 'train[:500]'; default: train where there is one"
    )
    parser.add_argument("--calibration_images", type=int, default=512, help="how many (default: %(default)s)")
    columns(parser, "with none, or if there is none, the model's own answers")
    task(parser)
    match_labels(parser)


def _floor(parser: Parser) -> None:
    parser.add_argument("--max_drop", type=float, metavar="POINTS",
                        help="floor: top-1 may fall by less on held-out images, at the given confidence; precision is "
                        "raised above a two-sided target until it does, else exit status 1")  # fmt: skip
    parser.add_argument("--min_accuracy", type=float, metavar="FRACTION", help="floor: least top-1, such as 0.78")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the floor (default: %(default)s)")
    parser.add_argument("--floor_steps", type=int, default=6, metavar="N",
                        help="allocations that are tested at most, from the most precise one down (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--held_out", metavar="DATASET",
                        help="labelled images that decide; default: those of --calibration without the ones that "
                        "calibrate")  # fmt: skip
    parser.add_argument("--held_out_split", help="default: validation or test where there is one, else the only one")
    parser.add_argument("--held_out_images", type=int, default=1000, help="how many (default: %(default)s)")
