"""Sensitivity scores for a comparison, each measured once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.selection import FormatScore, Repeatable, SearchProblem, Sensitivity, find_score
from fliqs_hf.tasks import Task
from fliqs_hf.training.data import train_loader


class Scores:
    """Scores of the fp32 model and of second looks; a seed chooses the images."""

    def __init__(
        self, model: Any, data: Any, accelerator: Accelerator, batch_size: int, images: int, task: Task
    ) -> None:
        """
        Args:
            model: in fp32; what is measured are the weights that it has now.
        """
        self.model, self.data = model, data
        self.accelerator, self.batch_size, self.images, self.task = accelerator, batch_size, images, task
        self.original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.known: dict[tuple[str, float | None, int], Sensitivity] = {}

    def of(self, name: str, problem: SearchProblem, seed: int) -> Sensitivity:
        """Those of a registered score."""
        return self._measured(find_score(name), problem, seed)

    def prior(self, config: SearchConfig, problem: SearchProblem, seed: int) -> Sensitivity:
        """Those that a search starts from."""
        first = self.of(config.prior, problem, seed)
        return first if config.prior_passes == 1 else self._measured(config.second_look(first), problem, seed)

    def _measured(self, score: FormatScore, problem: SearchProblem, seed: int) -> Sensitivity:
        key = score.name, problem.aim.value if score.at_target else None, seed
        if key not in self.known:
            self.model.load_state_dict(self.original)
            found = score(self.model, self._batches(score, seed), self._prediction, problem, task=self.task)
            self.known[key] = replace(found, decision_scores=self._same_everywhere(found.decision_scores))
        return self.known[key]

    def _same_everywhere(self, scores: Tensor) -> Tensor:
        """Those of the main process: on others sums may differ in their last bits, and then allocations."""
        main: Tensor = broadcast(scores.to(self.accelerator.device))
        return main.to(scores.device)

    def _batches(self, score: FormatScore, seed: int) -> Repeatable:
        """The training images that a score is measured on."""
        images, device = min(self.images, score.most_images or self.images), self.accelerator.device
        loader = train_loader(self.data, self.batch_size, seed, 0, -(-images // self.batch_size), 0, 1, 0)
        batches = [(x.to(device), y.to(device)) for x, y in loader]
        name, shown = f"scores: {score.name}", self.accelerator.is_local_main_process
        return Repeatable(lambda: tqdm(batches, desc=name, disable=not shown))

    def _prediction(self, images: Tensor) -> Tensor:
        return self.task.prediction(self.model(images))
