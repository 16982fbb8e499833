"""Where a run goes on from: all that a step changes, written as one state and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fliqs_hf.training.backends import Backend
from fliqs_hf.training.config import TrainConfig
from fliqs_hf.training.ema import WeightAverage
from fliqs_hf.training.state import Best, load_state, save_state, states
from fliqs_hf.training.step import StepHook
from fliqs_hf.training.window import Window


class Checkpoint:
    """The states of a run in `folder`; without one none are written.

    Attributes:
        best: the best weights so far, where they are to be kept.
    """

    def __init__(
        self,
        folder: Path | None,
        backend: Backend,
        config: TrainConfig,
        name: str,
        *,
        hook: StepHook | None,
        average: WeightAverage | None,
        window: Window,
    ) -> None:
        self.folder, self.backend, self.save_steps = folder, backend, config.save_steps
        self.hook, self.average, self.window = hook, average, window
        self.best = Best(folder / "best") if config.keep_best and folder is not None else None
        world_size = backend.accelerator.num_processes
        self._settings = {"config": repr(config), "world_size": world_size, "name": name}

    def begin(self, resume: bool) -> tuple[int, float]:
        """Restore the last state, with `resume` and where there is one.

        Returns: steps and seconds of training until then.
        Raises: CheckpointError: a damaged state, or one of other settings.
        """
        known = self._restore() if resume else {}
        if self.best is not None and known:
            self.best.resume(known["best"])
        elif self.best is not None and self.backend.accelerator.is_main_process:
            self.best.forget()
        return known.get("step", 0), known.get("seconds", 0.0)

    def is_due(self, step: int) -> bool:
        """Whether a state is to be written after `step` steps."""
        return self.folder is not None and step % self.save_steps == 0

    def save(self, step: int, seconds: float) -> None:
        """Write the state after `step` steps, if there is a folder. All processes take part.

        Raises: DiskError: the last complete state is untouched.
        """
        if self.folder is None:
            return
        weights, moments = self.backend.tensors()
        if self.backend.accelerator.is_main_process:
            parts: list[_Part] = [part for part in (self.hook, self.average, self.window) if part is not None]
            tensors = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
            known = {"seconds": seconds, "best": self.best.record if self.best else None}
            save_state(self.folder, step, weights, moments, tensors, {**self._settings, **known})

    def load_best(self, model: nn.Module) -> None:
        """Give the model the best weights, where they were to be kept. Raises: CheckpointError: damaged or lost."""
        if self.best is not None:
            self.best.load(model)

    def _restore(self) -> dict[str, Any]:
        saved = states(self.folder) if self.folder is not None else []
        if not saved:
            return {}
        known, extra = load_state(saved[-1], self.backend.load, self._settings)
        if self.hook is not None:
            self.hook.load_state_dict(extra)
        if self.average is not None:
            self.average.load_state_dict(extra, known["step"])
        self.window.load_state_dict(extra)
        return known


class _Part(Protocol):
    def state_dict(self) -> dict[str, Tensor]: ...
