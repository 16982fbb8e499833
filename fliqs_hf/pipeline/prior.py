"""The sensitivity scores that a job's searches start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.errors import TrainingError
from fliqs_hf.oneshot import OneShotSearch
from fliqs_hf.pipeline.job import Job
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.selection import FormatScore, SearchProblem, Sensitivity, find_score
from fliqs_hf.training.data import train_loader

#: Images at a time, at most: the pass is not checkpointed and in float32, unlike the training.
BATCH = 32


class Prior:
    """Scores of the fp32 model, measured when they are first asked for, and of every target's second look.

    Each process measures its share of the images, and all get the same scores.
    """

    def __init__(self, job: Job, model: Any) -> None:
        """
        Args:
            model: in fp32; it is left as it is.
        """
        self.job, self.model = job, model
        self.first: Sensitivity | None = None

    def scores(self, run: RunFolder, problem: SearchProblem) -> Sensitivity | None:
        """What a search starts from; of a run that is resumed, what it has recorded."""
        job, config = self.job, self.job.search
        if config.prior == "none":
            return None
        if job.args.resume and (recorded := run.sensitivity(problem.space)) is not None:
            return recorded
        if self.first is None:
            self.first = self._measured(find_score(config.prior), "sensitivity", problem)
        if config.prior_passes == 1:
            return self.first
        return self._measured(config.second_look(self.first), "sensitivity again", problem)

    def _measured(self, score: FormatScore, shown: str, problem: SearchProblem) -> Sensitivity:
        batches, task = self._batches(shown), self.job.task
        return score(self.model, batches, self._prediction, problem, combine=self._sum, task=task)

    def _prediction(self, images: Tensor) -> Tensor:
        return self.job.task.prediction(self.model(images))

    def _sum(self, values: Tensor) -> Tensor:
        """Over processes."""
        accelerator = self.job.accelerator
        total: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum")
        return total.cpu()

    def _batches(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of at least `prior_images` training images, with labels, under a progress bar."""
        job, accelerator = self.job, self.job.accelerator
        batch, ranks = min(job.args.per_device_train_batch_size, BATCH), accelerator.num_processes
        count = -(-job.search.prior_images // (batch * ranks))
        loader = train_loader(job.train_data, batch, job.args.seed, 0, count, accelerator.process_index, ranks, 0)
        for images, labels in tqdm(loader, desc=name, disable=not accelerator.is_local_main_process):
            yield images.to(accelerator.device), labels.to(accelerator.device)


def check_one_policy(accelerator: Any, search: OneShotSearch) -> None:
    """Raises: TrainingError: processes start from different policies, and would search different models."""
    if accelerator.num_processes > 1:
        logits = search.policy.logits.detach().flatten()
        everyone = accelerator.gather(logits).view(accelerator.num_processes, -1)
        if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
            raise TrainingError(
                "the processes measured different sensitivities: their models or images differ. Give all of them the "
                "same checkpoint and data, and report this if they have"
            )
