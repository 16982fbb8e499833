"""The parser of the command line `fliqs-hf …` and `optimum-cli fliqs …`.

It stands beside the package, not in it, because importing `fliqs_hf` imports Transformers, and `--help` must not wait
for that. What the commands do is in `fliqs_hf/cli/`, imported when one runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

DESCRIPTION = "Mixed-precision quantization of vision transformers: search, quantize, validate, publish."
EXAMPLES = """
A first pilot on one model:
  fliqs-hf estimate facebook/deit-tiny-patch16-224          what each format would cost; no weights are downloaded
  fliqs-hf quantize MODEL runs/pilot --target_bits 4 --calibration photos/     formats by sensitivity, no training
  fliqs-hf search digits                                    formats by search, weights trained for them
  fliqs-hf report runs/digits                               why each layer got its format
  fliqs-hf validate MODEL runs/pilot --dataset_name photos/ --max_drop 0.5     may it take the original's place?
  fliqs-hf push runs/pilot user/name                        weights, model card and report to the Hub

Exit status: 0 done; 1 the answer is no (a gate not passed, a damaged checkpoint); 2 a mistake in the arguments or
input, named on stderr; 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP. With --json the answer is one JSON object on
stdout, {"error": …} if there is none. FLIQS_HF_TRACEBACK=1 shows where an error came from.
"""


#: What a command that was stopped advises.
GO_ON = {"search": "add --resume to go on", "compare": "the same command goes on where it was"}
START_AGAIN = "the same command starts again"


class Parser(argparse.ArgumentParser):
    """Accepts no abbreviations, which a typo could be. With `pass_through` it leaves every argument to the command."""

    def __init__(self, *args: Any, pass_through: bool = False, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"add_help": not pass_through, "allow_abbrev": False, **kwargs}
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        self.pass_through = pass_through
        self.as_json = False

    def error(self, message: str) -> NoReturn:
        self.exit(_failed(f"{' '.join(message.split())}; {self.prog} --help lists the arguments", 2, self.as_json))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.as_json = "--json" in (sys.argv[1:] if args is None else args)
        if not self.pass_through:
            return super().parse_known_args(args, namespace)
        namespace = namespace or argparse.Namespace()
        vars(namespace).update(self._defaults, rest=list(args))
        return namespace, []


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns: the exit status."""
    parser = Parser(prog="fliqs-hf", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    add_commands(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        return 2
    if args.version:
        from importlib.metadata import version

        print(version("fliqs-hf"))
        return 0
    if not hasattr(args, "fliqs_command"):
        parser.print_help()
        return 2
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Carry out parsed arguments. Returns: the exit status."""
    module, _, function = args.fliqs_command.partition(":")
    with _importing():
        failures: Any = importlib.import_module("fliqs_hf.failures")
        interrupt: Any = importlib.import_module("fliqs_hf.interrupt")
        # Libraries print as well: DeepSpeed does when it is imported.
        alone: Any = importlib.import_module("fliqs_hf.cli.output").alone_on_stdout
    as_json = getattr(args, "json", False) or "--json" in getattr(args, "rest", ())
    try:
        with (
            interrupt.stopping(GO_ON.get(module, START_AGAIN)),
            alone() if as_json else nullcontext(),
        ):
            if not hasattr(args, "rest"):  # those that are passed through are checked by who parses them
                importlib.import_module("fliqs_hf.limits").check_values(vars(args))
            status: int = getattr(importlib.import_module(f"fliqs_hf.cli.{module}"), function)(args)
    except (Exception, KeyboardInterrupt) as error:  # whatever it is: a program owes its user a sentence
        message, status = failures.explain(error)
        print(failures.trace(error), end="", file=sys.stderr)
        return _failed(message, status, as_json)
    return status


@contextmanager
def _importing() -> Iterator[None]:
    """For the seconds before `fliqs_hf.interrupt` is there to do it: a signal ends the process with a word."""

    def stop(number: int, _: object) -> None:
        print(f"fliqs-hf: stopped by {signal.Signals(number).name}; {START_AGAIN}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    here = threading.current_thread() is threading.main_thread()
    previous = {n: signal.signal(n, stop) for n in numbers if here and n and signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)


def _failed(message: str, status: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message}))
    print(f"fliqs-hf: {message}", file=sys.stderr)
    return status


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add all sub-commands to `parser`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def add(name: str, where: str, text: str, examples: str, arguments: Callable[[Parser], None] | None) -> None:
        more: dict[str, Any] = {"pass_through": True} if arguments is None else {}
        command = commands.add_parser(
            name, help=text, description=text[:1].upper() + text[1:] + ".", epilog=f"Examples:\n{examples}", **more
        )
        command.set_defaults(fliqs_command=where)
        if arguments is not None:
            arguments(command)
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    add("formats", "formats:formats", "the table of number formats: bits, range, smallest step", _FORMATS, _formats)
    add(
        "estimate",
        "estimate:estimate",
        "what a model costs in given formats, from its config alone",
        _ESTIMATE,
        _estimate,
    )
    add(
        "hardware", "hardware:hardware", "which formats devices run, and what a checkpoint gains", _HARDWARE, _hardware
    )
    add("quantize", "quantize:quantize", "quantize a checkpoint without training", _QUANTIZE, _quantize)
    add("search", "search:search", "search formats and train for them: the recipe (its own --help)", _SEARCH, None)
    add(
        "compare",
        "compare:compare",
        "the search against its alternatives at equal cost (its own --help)",
        _COMPARE,
        None,
    )
    add(
        "validate",
        "validate:validate",
        "compare a quantized model with its original on your images",
        _VALIDATE,
        _validate,
    )
    add("export", "export:export", "a packed model for other programs: ONNX, compared with itself", _EXPORT, _export)
    add("report", "publish:report", "write report.html and figures into a run folder", _REPORT, _report)
    add("push", "publish:push", "publish a run on the Hub: weights, card, report, history", _PUSH, _push)
    add(
        "inspect", "inspect:inspect", "what is in a quantized checkpoint, and whether it is intact", _INSPECT, _inspect
    )


_FORMATS = """  fliqs-hf formats
  fliqs-hf formats int4 e2m1 float8_e4m3fn --json"""


def _formats(parser: Parser) -> None:
    parser.add_argument("names", nargs="*", metavar="FORMAT", help="default: the common ones")


_ESTIMATE = """  fliqs-hf estimate facebook/deit-tiny-patch16-224
  fliqs-hf estimate runs/digits --layers
  fliqs-hf estimate MODEL --allocation allocation.json --formats int4 e2m1"""


def _estimate(parser: Parser) -> None:
    parser.add_argument("model", help="Hub id or folder; only its config is read")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", default=["int8", "e4m3", "int6", "int4", "e2m1"],
                        help="uniform models to list (default: %(default)s)")  # fmt: skip
    parser.add_argument("--allocation", metavar="FILE", help="an allocation.json to list as well")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the config's")
    parser.add_argument("--modules_to_not_convert", nargs="+", metavar="PATTERN", help="layers that stay in fp32")
    parser.add_argument("--layers", action="store_true", help="list MACs and parameters of every layer too")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


_HARDWARE = """  fliqs-hf hardware list
  fliqs-hf hardware show h100
  fliqs-hf hardware check runs/digits --hardware x86-vnni"""


def _hardware(parser: Parser) -> None:
    parser.add_argument("what", choices=("list", "show", "check"))
    parser.add_argument("name", nargs="?", help="of a profile to show, or of a quantized checkpoint to check")
    parser.add_argument("--hardware", metavar="NAME", default="auto",
                        help="to check for: a profile, auto (this machine), or a .yaml file")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


_QUANTIZE = """  fliqs-hf quantize MODEL runs/w8a8                                      uniform INT8
  fliqs-hf quantize MODEL runs/w4 --weight_format int4 --activation_format none
  fliqs-hf quantize MODEL runs/mine --allocation allocation.json
  fliqs-hf quantize MODEL runs/w4a8 --weight_format int4 --activation_format int8 --calibration photos/
  fliqs-hf quantize MODEL runs/pilot --target_bits 4 --calibration photos/
The last one measures how sensitive the loss is to every format of every layer (one backward pass per image) and solves
for the best allocation at the target. OUTPUT is a run folder: a model, and what is known of it in OUTPUT/fliqs."""


def _quantize(parser: Parser) -> None:
    parser.add_argument("model", help="fp32 checkpoint: Hub id or folder")
    parser.add_argument("output", help="run folder to write")
    parser.add_argument("--weight_format", help="one format for all weights (default: int8)")
    parser.add_argument("--activation_format", help="one format for all layer inputs, or none (default: int8)")
    parser.add_argument("--allocation", metavar="FILE", help="a format per layer, as a search writes it")
    for name, text in (
        ("target_bits", "bit operations of the uniform model of so many bits"),
        ("target_bops", "bit operations per image"),
        ("target_size_mb", "size of the checkpoint in 10^6 bytes, never exceeded"),
        ("target_ratio", "bit operations over those of fp32"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"mixed formats: {text}")
    parser.add_argument("--target", action="append", metavar="NAME=VALUE",
                        help="or one of these by name, or a cost that is registered")  # fmt: skip
    parser.add_argument(
        "--search_space",
        nargs="+",
        metavar="FORMAT",
        default=["mixed"],
        help="formats to choose from, or one of fliqs-s-int fliqs-s-fp fliqs-l-int fliqs-l-fp mixed",
    )
    parser.add_argument("--hardware", metavar="NAME",
                        help="choose among formats that this runs: a profile, auto (this machine), or a .yaml "
                        "file")  # fmt: skip
    parser.add_argument("--activation", choices=("same", "separate"), default="same",
                        help="formats of weights and inputs: the same, or chosen apart")  # fmt: skip
    parser.add_argument(
        "--calibration",
        metavar="DATASET",
        help="images that choose formats and improve rounding: Hub id, folder, digits",
    )
    parser.add_argument(
        "--calibration_split", help="or a part, such as 'train[:500]'; default: train where there is one"
    )
    parser.add_argument("--calibration_images", type=int, default=512, help="how many (default: %(default)s)")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label",
                        help="if there is no such column, the model's own answers are the labels")  # fmt: skip
    _match_labels(parser)
    parser.add_argument(
        "--rounding", choices=("nearest", "gptq"), help="default: gptq with --calibration, else nearest"
    )
    parser.add_argument("--bias_correction", choices=("true", "false"),
                        help="keep the mean of every output channel; default: with one scale per layer")  # fmt: skip
    parser.add_argument("--activations", choices=("dynamic", "clipped", "absmax", "percentile", "mse"),
                        help="input scales: of each input itself (default), that times a factor per layer (clipped), "
                        "or one per layer")  # fmt: skip
    parser.add_argument(
        "--weight_scale", choices=("absmax", "mse"), help="default: mse with --calibration, else absmax"
    )
    parser.add_argument("--fold_batchnorm", choices=("true", "false"), default="true",
                        help="batch norms into the convolutions before them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--modules_to_not_convert", nargs="+", metavar="PATTERN", help="layers that stay in fp32")
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in OUTPUT")


def _match_labels(parser: Parser) -> None:
    parser.add_argument("--match_labels", choices=("name", "index"), default="name",
                        help="match classes of data and model by name, or take the numbers as they are")  # fmt: skip


_SEARCH = """  fliqs-hf search digits
  fliqs-hf search settings.yaml --target_bits 4"""

_COMPARE = """  fliqs-hf compare runs/digits/fliqs/fp32 --dataset_name digits --output compare.csv"""

_VALIDATE = """  fliqs-hf validate MODEL runs/pilot --dataset_name photos/ --split test --max_drop 0.5
  fliqs-hf validate MODEL user/quantized --dataset_name cifar10 --output page.html result.json"""


def _validate(parser: Parser) -> None:
    parser.add_argument("original", help="Hub id or folder")
    parser.add_argument("quantized", help="Hub id or folder; the result is kept in a run folder")
    parser.add_argument("--dataset_name", required=True, help="Hub id, folder of images, or 'digits'")
    parser.add_argument("--split", help="or a part, such as 'test[:500]'; default: validation or test if there is one")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    _match_labels(parser)
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


_EXPORT = """  fliqs-hf export runs/pilot exported --dataset_name photos/ --min_agreement 99
  fliqs-hf export runs/pilot exported --form qdq               for TensorRT and NPUs; static scales fit best
  fliqs-hf validate MODEL exported --dataset_name photos/      the file, as a model like any other
The file runs in ONNX Runtime without this package, and holds the allocation as metadata. Before it is kept, it answers
the same images as the packed model; exit status 1, and no file, where too few answers are the same."""


def _export(parser: Parser) -> None:
    parser.add_argument("run", help="run folder, checkpoint folder or Hub id of a packed model")
    parser.add_argument("output", help="folder to write: model.onnx, its config and image processor, a record")
    parser.add_argument("--to", choices=("onnx", "torch"), default="onnx",
                        help="an ONNX file, or a program of torch.export (.pt2); default: %(default)s")  # fmt: skip
    parser.add_argument("--form", choices=("auto", "integer", "qdq"),
                        help="products of 8-bit integers, in the fastest operators of ONNX Runtime (auto, the "
                        "default) or in those of the standard (integer), or between QuantizeLinear and "
                        "DequantizeLinear (qdq)")  # fmt: skip
    parser.add_argument("--input_scales", choices=("as_packed", "per_tensor"),
                        help="per_tensor: one scale for the whole batch where inputs are 8-bit integers: faster, and "
                        "another quantization")  # fmt: skip
    parser.add_argument("--dataset_name", help="images to compare on: Hub id, folder of images, or 'digits'; default: "
                        "generated noise")  # fmt: skip
    parser.add_argument("--split", help="or a part, such as 'test[:500]'; default: validation or test if there is one")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--max_samples", type=int, default=256, help="images to compare on (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--min_agreement", type=float, metavar="PERCENT",
                        help="of the images must get the class that the packed model gives them; default: 95 with "
                        "--dataset_name, 0 on noise")  # fmt: skip
    parser.add_argument("--opset", type=int, help="21 to 25 (default: 21); 25 has 2-bit types")
    parser.add_argument("--weight_codes", choices=("signed", "unsigned"),
                        help="unsigned: exact on x86 CPUs without VNNI too, which saturate large signed codes; slower "
                        "elsewhere")  # fmt: skip
    parser.add_argument("--include_preprocessing", action="store_true",
                        help="take pixels from 0 to 255 of resized images, and normalize them there")  # fmt: skip
    parser.add_argument(
        "--external_data", action="store_true", default=None, help="weights in model.onnx.data; always above 1.8 GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is in OUTPUT")


_REPORT = """  fliqs-hf report runs/digits"""


def _report(parser: Parser) -> None:
    parser.add_argument("run", help="run folder of quantize or search")


_PUSH = """  fliqs-hf push runs/digits user/digits-3bit --private
  fliqs-hf push runs/pilot user/deit-4bit --base_model facebook/deit-tiny-patch16-224 --license apache-2.0
The access token comes from `hf auth login` or HF_TOKEN."""


def _push(parser: Parser) -> None:
    parser.add_argument("run", help="run folder, or that of a model alone")
    parser.add_argument("repo_id", help="namespace/name, or name in your own namespace")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--base_model", metavar="ID", help="the model on the Hub that was quantized")
    parser.add_argument("--license", metavar="ID", help="as the Hub names it, such as apache-2.0; default: that in "
                        "the README of a local original")  # fmt: skip
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--commit_message")
    parser.add_argument("--create_pr", action="store_true", help="propose it as a pull request")


_INSPECT = """  fliqs-hf inspect runs/digits
  fliqs-hf inspect user/digits-3bit --layers"""


def _inspect(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("--layers", action="store_true", help="list every layer")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


if __name__ == "__main__":
    sys.exit(main())
