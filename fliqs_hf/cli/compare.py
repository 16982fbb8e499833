"""`fliqs-hf compare`."""

from __future__ import annotations

import argparse

from fliqs_hf.pipeline.compare import script


def compare(args: argparse.Namespace) -> int:
    return script(args.rest, "fliqs-hf compare")
