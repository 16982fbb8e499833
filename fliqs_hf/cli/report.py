"""`fliqs-hf report`."""

from __future__ import annotations

import argparse

from fliqs_hf.cli.output import answer
from fliqs_hf.report.run_report import write_report
from fliqs_hf.runs.files import locked_run


def report(args: argparse.Namespace) -> int:
    with locked_run(args.run):
        page = write_report(args.run)
    figures = sorted(str(path) for path in (page.parent / "figures").glob("*.png"))
    answer(args.json, {"report": str(page), "figures": figures}, "\n".join([str(page), *figures]))
    return 0
