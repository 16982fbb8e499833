"""Fine-tuning in fp32 before the search, for a new data set or model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fliqs_hf import checksums
from fliqs_hf.errors import CheckpointError
from fliqs_hf.pipeline.job import Job
from fliqs_hf.pipeline.outside import Tracking
from fliqs_hf.pipeline.statistics import settle_batchnorm
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.tasks import Task
from fliqs_hf.training import train


def finetune(job: Job, folder: RunFolder) -> Any:
    """Train the job's model in fp32, if the arguments say so, and keep the result in `fp32/`, which `--resume` takes.

    Returns: the fp32 model that searches start from.
    """
    model = job.model
    if not job.args.finetune_steps:
        return model
    kept, state = folder.records / "fp32", folder.records / "fp32-state"
    if job.args.resume and kept.exists():
        model.load_state_dict(_intact(kept, job.task).state_dict())
        if job.accelerator.is_main_process:
            folder.discard(state.name)
        return model
    if job.accelerator.is_main_process:
        folder.claim(kept.name, f"{state.name}/")
    job.accelerator.wait_for_everyone()
    config = job.train_config(job.args.finetune_steps, job.args.finetune_learning_rate or job.args.learning_rate)
    trained: Any = train(
        model, job.train_data, config, job.accelerator, augment=job.augment, score=job.score, state_folder=state,
        resume=job.args.resume, on_log=Tracking(job, "fp32/").log, name="fp32 training",
        task=job.task,
    )  # fmt: skip
    settle_batchnorm(job, trained, "fp32")
    if job.accelerator.is_main_process:
        with folder.replacing(kept.name) as draft:
            trained.save_pretrained(draft)
            job.processor.save_pretrained(draft)
            checksums.seal_folder(draft)
        folder.discard(state.name)
    job.accelerator.wait_for_everyone()
    return trained


def _intact(kept: Path, task: Task) -> Any:
    """The fine-tuned model as it was written. Raises: CheckpointError: damaged, or changed since."""
    try:
        checksums.check_folder(kept)
        return task.auto_class().from_pretrained(kept)
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the fine-tuned model is lost: {error}; restore it, or remove {kept}, and --resume trains it again"
        ) from error
