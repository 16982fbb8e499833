"""Makes `optimum-cli fliqs …` of the command line in `fliqs_hf_cli`."""

import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from fliqs_hf_cli import DESCRIPTION, add_commands, run


class FliqsCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="fliqs", help=DESCRIPTION)

    @staticmethod
    def parse_args(parser):  # type: ignore[no-untyped-def]
        add_commands(parser)

    def run(self) -> None:
        if not hasattr(self.args, "fliqs_command"):
            self.parser.print_help()
            sys.exit(2)
        sys.exit(run(self.args))


REGISTER_COMMANDS = [FliqsCommand]
