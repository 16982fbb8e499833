"""The arguments of the command line `fliqs-hf …` and `optimum-cli fliqs …`: one file for each command.

They stand beside the package, not in it, because importing `fliqs_hf` imports Transformers, and `--help` must not wait
for that. What a command does is the function of its name in the file of its name in `fliqs_hf/cli/`, imported when it
runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from fliqs_hf_cli.parser import Parser, failed

#: In the order of the help. Each has HELP and EXAMPLES, and either `arguments`, or a parser of its own that is given
#: all that follows the name of the command.
COMMANDS = (
    "formats", "estimate", "hardware", "profile", "quantize", "front", "recommend", "search", "compare", "validate",
    "export", "report", "push", "inspect",
)  # fmt: skip
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

#: What a command that was stopped advises, unless it has GO_ON.
START_AGAIN = "the same command starts again"


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
    name = args.fliqs_command
    advice = getattr(_arguments_of(name), "GO_ON", START_AGAIN)
    with _importing():
        failures: Any = importlib.import_module("fliqs_hf.failures")
        interrupt: Any = importlib.import_module("fliqs_hf.interrupt")
        # Libraries print as well: DeepSpeed does when it is imported.
        alone: Any = importlib.import_module("fliqs_hf.cli.output").alone_on_stdout
    as_json = getattr(args, "json", False) or "--json" in getattr(args, "rest", ())
    try:
        with interrupt.stopping(advice), alone() if as_json else nullcontext():
            if not hasattr(args, "rest"):  # those that are passed through are checked by who parses them
                importlib.import_module("fliqs_hf.limits").check_values(vars(args))
            status: int = getattr(importlib.import_module(f"fliqs_hf.cli.{name}"), name)(args)
    except (Exception, KeyboardInterrupt) as error:  # whatever it is: a program owes its user a sentence
        message, status = failures.explain(error)
        print(failures.trace(error), end="", file=sys.stderr)
        return failed(message, status, as_json)
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


def _arguments_of(name: str) -> Any:
    return importlib.import_module(f"fliqs_hf_cli.{name}")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add all commands to `parser`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        module = _arguments_of(name)
        add_arguments = getattr(module, "arguments", None)
        more: dict[str, Any] = {"pass_through": True} if add_arguments is None else {}
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=f"Examples:\n{module.EXAMPLES}",
            **more,
        )
        command.set_defaults(fliqs_command=name)
        if add_arguments is not None:
            add_arguments(command)
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
