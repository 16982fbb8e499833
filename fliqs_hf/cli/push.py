"""`fliqs-hf push`."""

from __future__ import annotations

import argparse

from fliqs_hf.cli.output import answer
from fliqs_hf.hf.hub import push as push_run
from fliqs_hf.runs.files import locked_run


def push(args: argparse.Namespace) -> int:
    with locked_run(args.run):
        url = push_run(
            args.run, args.repo_id, private=args.private, revision=args.revision, commit_message=args.commit_message,
            create_pr=args.create_pr, base_model=args.base_model, license=args.license,
        )  # fmt: skip
    answer(args.json, {"url": url}, url)
    return 0
