"""`fliqs-hf compare`."""

from __future__ import annotations

import argparse

from fliqs_hf.cli.output import pass_through
from fliqs_hf.pipeline.compare import main


def compare(args: argparse.Namespace) -> int:
    return pass_through(args, main)
