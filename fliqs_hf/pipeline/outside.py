"""What a job shares with the outside: metrics with trackers, models with the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fliqs_hf.cost import Target
from fliqs_hf.errors import HubError
from fliqs_hf.hf.hub import make_repository
from fliqs_hf.hf.hub import push as push_run
from fliqs_hf.pipeline.job import Job
from fliqs_hf.runs.folder import RunFolder


class Tracking:
    """Sends metrics of one training to the trackers of `--report_to`; trackers want steps that never go back."""

    def __init__(self, job: Job, prefix: str, first_step: int = 0) -> None:
        """
        Args:
            first_step: how many steps earlier trainings of the run have.
        """
        self.job, self.prefix, self.first_step = job, prefix, first_step

    def log(self, entry: dict[str, Any]) -> None:
        values = {f"{self.prefix}{key}": value for key, value in entry.items() if key != "step"}
        self.job.accelerator.log(values, step=self.first_step + entry["step"])  # does nothing without trackers


class Publishing:
    """`--push_to_hub`: one repository per target, made before anything is trained."""

    def __init__(self, job: Job, runs: Mapping[Target, RunFolder]) -> None:
        """Raises: HubError: a name or a token that the Hub refuses."""
        args = job.args
        self.runs = runs
        self.names: dict[Target, str] = {}
        self.failures: list[str] = []
        if args.push_to_hub and job.accelerator.is_main_process:
            name = args.hub_model_id or Path(args.output_dir).resolve().name
            for target in runs:
                full = f"{name}-{target.label}" if len(runs) > 1 else name
                self.names[target] = make_repository(full, private=args.hub_private_repo)

    def push(self, target: Target) -> None:
        """Publish a target's run: packed weights, card, allocation, history. A failure does not stop other targets."""
        if target not in self.names:
            return
        path = self.runs[target].path
        try:
            print(f"published at {push_run(path, self.names[target])}")
        except HubError as error:
            self.failures.append(f"{error} The run is complete: fliqs-hf push {path} {self.names[target]}")

    def finish(self) -> None:
        """Raises: HubError: what could not be published, and how to."""
        if self.failures:
            raise HubError("\n".join(self.failures))
