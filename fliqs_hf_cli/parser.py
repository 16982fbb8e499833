"""The parser of all commands: stricter than argparse's, with errors as the commands report theirs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Accepts no abbreviations, which a typo could be. With `pass_through` it leaves every argument to the command.

    `given` of a command's arguments are the names of those that were given, whatever their values.
    """

    def __init__(self, *args: Any, pass_through: bool = False, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"add_help": not pass_through, "allow_abbrev": False, **kwargs}
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        self.pass_through = pass_through
        self.as_json = False

    def error(self, message: str) -> NoReturn:
        self.exit(failed(f"{' '.join(message.split())}; {self.prog} --help lists the arguments", 2, self.as_json))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.as_json = "--json" in (sys.argv[1:] if args is None else args)
        if not self.pass_through:
            found, unknown = super().parse_known_args(args, namespace)
            if self._subparsers is None:
                names = [action.dest for action in self._actions]
                again, _ = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(names)))  # no defaults
                found.given = frozenset(name for name in names if getattr(again, name) is not None)
            return found, unknown
        namespace = namespace or argparse.Namespace()
        vars(namespace).update(self._defaults, rest=list(args))
        return namespace, []


def failed(message: str, status: int, as_json: bool) -> int:
    """Report an error. Returns: `status`."""
    if as_json:
        print(json.dumps({"error": message}))
    print(f"fliqs-hf: {message}", file=sys.stderr)
    return status


def match_labels(parser: Parser) -> None:
    """The argument of every command that compares labels of data with those of a model."""
    parser.add_argument("--match_labels", choices=("name", "index"), default="name",
                        help="match classes of data and model by name, or take the numbers as they are")  # fmt: skip


def task(parser: Parser) -> None:
    """The argument of every command that asks what a model's output means."""
    parser.add_argument("--task", default="image-classification", metavar="NAME",
                        help="what the model does (default: %(default)s)")  # fmt: skip


def columns(parser: Parser, without: str | None = "it must be there") -> None:
    """The columns of a data set; what they are called by default is the task's to say.

    Args: without: what holds where there are no labels; None for a command that reads none.
    """
    parser.add_argument("--image_column", help="default: the task's, such as image")
    if without is not None:
        parser.add_argument("--label_column", help=f"default: the task's, such as label; {without}")


def take_defaults(parser: Parser, arguments: Callable[[Parser], None]) -> None:
    """Let `parser` give every argument of another command, its default where it has none of that name itself."""
    other = Parser()
    arguments(other)
    own = {action.dest for action in parser._actions}
    parser.set_defaults(**{action.dest: action.default for action in other._actions if action.dest not in own})
