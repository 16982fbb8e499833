"""One optimizer step: forward and backward passes, the update, and what a search learns from it.

Everything random in a step is a function of (seed, step, rank). Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fliqs_hf.training.backends import Backend
from fliqs_hf.training.config import TrainConfig
from fliqs_hf.training.ema import WeightAverage
from fliqs_hf.training.imitation import Teacher
from fliqs_hf.training.seeds import derived_seed

#: (images, labels) -> (images, labels or class probabilities), on the device; randomness from the global generator
Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class StepHook(Protocol):
    """What a search does around a training step."""

    def begin_step(self, step: int) -> list[Callable[[], None]]:
        """One callable per forward pass, each of which sets the formats of that pass. The first pass trains the
        weights; the others only measure a quality, on the same images, without a backward pass."""
        ...

    def end_step(self, step: int, quality: Tensor) -> dict[str, Tensor]:
        """Qualities [forward passes], higher is better. Returns metrics, on the device."""
        ...

    def settled(self, step: int) -> bool:
        """Whether the formats of step `step` are those of the result, so that evaluating the model says something."""
        ...

    def log(self, step: int) -> None:
        """Called on the main process where metrics are written."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class TrainingStep:
    """Takes the steps of a run."""

    def __init__(
        self,
        backend: Backend,
        batches: Iterator[Any],
        config: TrainConfig,
        *,
        hook: StepHook | None,
        augment: Augment | None,
        teacher: Teacher | None,
        average: WeightAverage | None,
    ) -> None:
        """
        Args:
            batches: of one forward pass each: (images, labels), on any device.
            average: takes the weights in after every step.
        """
        self.backend, self.batches, self.config = backend, batches, config
        self.hook, self.augment, self.average = hook, augment, average
        self.teacher = teacher
        self.accelerator, self.task = backend.accelerator, backend.task

    def take(self, step: int) -> dict[str, Tensor]:
        """Take step `step`, counted from 0. Returns: its metrics, scalars on the device."""
        config, backend, hook = self.config, self.backend, self.hook
        torch.manual_seed(derived_seed("step", config.seed, step, self.accelerator.process_index))
        backend.set_learning_rate(config.learning_rate_at(step))
        passes = hook.begin_step(step) if hook is not None else [lambda: None]
        loss = torch.zeros((), device=self.accelerator.device)
        quality = torch.zeros(len(passes), device=self.accelerator.device)
        for micro in range(config.gradient_accumulation_steps):
            self._batch(passes, loss, quality, last=micro == config.gradient_accumulation_steps - 1)
        norm = backend.step(config.max_grad_norm)
        extra = hook.end_step(step, quality) if hook is not None else {}
        if self.average is not None:
            self.average.update()
        return {"loss": loss, "grad_norm": norm, **extra}

    def _watching(self, index: int) -> AbstractContextManager[Callable[[], Tensor] | None]:
        """Around a forward pass. Gives what its blocks have missed of the teacher's, where the weights learn it."""
        wanted = self.teacher is not None and self.config.feature_weight > 0 and index == 0
        return self.teacher.watching() if wanted and self.teacher is not None else nullcontext()

    def _batch(self, passes: list[Callable[[], None]], losses: Tensor, quality: Tensor, *, last: bool) -> None:
        """The passes over one batch.

        Args:
            losses, quality: mean loss of the first pass, [], and quality of each, [passes]: their shares are added.
            last: whether it is the step's last batch.
        """
        config, task, parts = self.config, self.task, self.config.gradient_accumulation_steps
        images, labels = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in next(self.batches))
        images, targets = self.augment(images, labels) if self.augment is not None else (images, labels)
        imitated = None
        if self.teacher is not None:
            with self.accelerator.autocast():
                imitated = self.teacher.prediction(images)
        for index, set_formats in enumerate(passes):
            set_formats()
            # The first pass trains; the others are there to be compared with it, and need no gradient.
            with self.backend.training_pass(last) if index == 0 else torch.no_grad():
                with self._watching(index) as missed:
                    prediction = self.backend.prediction(images)
                loss = task.loss(prediction, targets, config.label_smoothing)
                if imitated is not None and config.distill_weight:  # a task may have no loss for it
                    imitation = task.imitation(prediction, imitated)
                    loss = (1 - config.distill_weight) * loss + config.distill_weight * imitation
                if index == 0:
                    total = loss if missed is None else loss + config.feature_weight * missed()
                    self.backend.backward(total / parts)
            with torch.no_grad():
                measured = -loss if config.quality == "loss" else task.quality(prediction, labels)
                quality[index] += measured / parts
                if index == 0:
                    losses += loss / parts
