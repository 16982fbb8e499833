"""Statistics of batch norms, from a job's training images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.pipeline.job import Job
from fliqs_hf.training.batchnorm import reestimate_batchnorm, tracking_norms
from fliqs_hf.training.data import train_loader


def settle_batchnorm(job: Job, model: Any, name: str) -> None:
    """Give the batch norms of `model`, where it has any, the statistics of its weights and formats as they are now.

    Every process that calls this takes the same images, so that all have the same model.
    """
    wanted, batch = job.args.batchnorm_images, job.args.per_device_train_batch_size
    if not wanted or not tracking_norms(model):
        return
    count = -(-wanted // batch)
    loader = train_loader(job.train_data, batch, job.args.seed, 0, count, 0, 1, 0)

    def images() -> Iterator[Tensor]:
        for values, _ in tqdm(loader, desc=f"{name}: batch norms", disable=not job.accelerator.is_local_main_process):
            yield values.to(job.accelerator.device)

    reestimate_batchnorm(model, images())
