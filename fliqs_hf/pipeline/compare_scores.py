"""Sensitivity scores for a comparison, each measured once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.baselines import elementwise_scores, hessian_trace_scores, loss_delta_scores
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.selection import SearchProblem, SearchSpace, Sensitivity, fisher_scores, two_pass_scores
from fliqs_hf.tasks import Task
from fliqs_hf.training.data import train_loader

#: Images that the dearer scores are measured on, at most.
SCORE_IMAGES = {"loss-delta": 512, "hessian": 512}
MEASURES: dict[str, Callable[..., Tensor]] = {"elementwise": elementwise_scores, "hessian": hessian_trace_scores}


class Scores:
    """Scores [D, K] of the fp32 model and of second looks, with the seconds they took; a seed chooses the images."""

    def __init__(
        self,
        model: Any,
        data: Any,
        space: SearchSpace,
        accelerator: Accelerator,
        batch_size: int,
        images: int,
        task: Task,
    ) -> None:
        """
        Args:
            model: in fp32; what is measured are the weights that it has now.
        """
        self.model, self.data, self.space = model, data, space
        self.accelerator, self.batch_size, self.images, self.task = accelerator, batch_size, images, task
        self.original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.known: dict[str, tuple[Tensor, float]] = {}

    def of(self, method: str, seed: int) -> tuple[Tensor, float]:
        """Those of a method."""
        key = f"{method}-{seed}"
        if key not in self.known:
            self.model.load_state_dict(self.original)
            batches, start = self._batches(method, seed), time.perf_counter()
            if method == "fisher":
                scores = fisher_scores(
                    self.model, self._bar(batches, method), self._prediction, self.space, task=self.task
                ).decision_scores
            elif method == "loss-delta":  # many passes, under a bar of its own
                scores = loss_delta_scores(self.model, batches, self._prediction, self.space, task=self.task)
            else:
                scores = MEASURES[method](
                    self.model, self._bar(batches, method), self._prediction, self.space, task=self.task
                )
            self.known[key] = self._same_everywhere(scores), time.perf_counter() - start
        return self.known[key]

    def prior(self, config: SearchConfig, problem: SearchProblem, seed: int) -> tuple[Tensor, float]:
        """Those that a search starts from."""
        first, seconds = self.of("fisher", seed)
        if config.prior_passes == 1:
            return first, seconds
        key = f"second look-{problem.aim.value:g}-{seed}"
        if key not in self.known:
            self.model.load_state_dict(self.original)
            batches = self._bar(self._batches("fisher", seed), "fisher again")
            once = Sensitivity(first, 0, seconds)
            twice = two_pass_scores(self.model, batches, self._prediction, problem, once, config.band, task=self.task)
            self.known[key] = self._same_everywhere(twice.decision_scores), twice.seconds
        return self.known[key]

    def _same_everywhere(self, scores: Tensor) -> Tensor:
        """Those of the main process: on others sums may differ in their last bits, and then allocations."""
        main: Tensor = broadcast(scores.to(self.accelerator.device))
        return main.to(scores.device)

    def _batches(self, method: str, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The training images that a score is measured on."""
        images, device = min(self.images, SCORE_IMAGES.get(method, self.images)), self.accelerator.device
        loader = train_loader(self.data, self.batch_size, seed, 0, -(-images // self.batch_size), 0, 1, 0)
        return [(x.to(device), y.to(device)) for x, y in loader]

    def _bar(self, batches: Sequence[tuple[Tensor, Tensor]], name: str) -> Iterable[tuple[Tensor, Tensor]]:
        shown: Iterable[tuple[Tensor, Tensor]] = tqdm(
            batches, desc=f"scores: {name}", disable=not self.accelerator.is_local_main_process
        )
        return shown

    def _prediction(self, images: Tensor) -> Tensor:
        return self.task.prediction(self.model(images))
