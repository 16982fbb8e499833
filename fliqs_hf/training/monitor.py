"""What is known of a run while it goes on: means of its metrics, scores of the model, the best weights, the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from fliqs_hf.errors import ConfigError, TrainingError
from fliqs_hf.training.backends import Backend
from fliqs_hf.training.config import TrainConfig
from fliqs_hf.training.ema import WeightAverage
from fliqs_hf.training.state import Best, states
from fliqs_hf.training.step import StepHook
from fliqs_hf.training.window import Window

#: the model -> its score, higher is better, the same on every process
ModelScore = Callable[[nn.Module], float]
#: Gets a line of the log.
OnLog = Callable[[dict[str, Any]], None]

UNSETTLED = (
    "the best weights cannot be kept: this search samples formats to its last step, so no evaluation before that is "
    "of the result; lower explore_fraction, or leave load_best_model_at_end out"
)


def check_best(config: TrainConfig, score: ModelScore | None, folder: Path | None, hook: StepHook | None) -> None:
    """Raises: ConfigError: the best weights are to be kept, and cannot be found or stored."""
    if config.keep_best and (score is None or folder is None):
        raise ConfigError("keeping the best weights needs a score and a state_folder")
    if config.keep_best and hook is not None and not hook.settled(config.max_steps - 1):
        raise ConfigError(UNSETTLED)


class Monitor:
    """Watches a run. As a context it shows a progress bar. Only `look` waits for the device."""

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        config: TrainConfig,
        window: Window,
        *,
        score: ModelScore | None,
        hook: StepHook | None,
        average: WeightAverage | None,
        best: Best | None,
        on_log: OnLog | None,
        folder: Path | None,
    ) -> None:
        """
        Args:
            model: what is scored, every `eval_steps` steps and at the end, with its averaged weights if there are any.
            folder: of the states, of which the last is named where the run fails.
        """
        self.model, self.backend, self.config, self.window = model, backend, config, window
        self.score, self.hook, self.average, self.best = score, hook, average, best
        self.on_log, self.folder = on_log, folder
        self._bar: Any = None
        self._started = 0.0

    def begin(self, step: int, seconds: float, name: str) -> Any:
        """Count from here: after `step` steps and `seconds` of training. Returns: the bar, a context."""
        shown = self.backend.accelerator.is_local_main_process
        self._bar = tqdm(total=self.config.max_steps, initial=step, desc=name, disable=not shown)
        self._started = time.perf_counter() - seconds
        return self._bar

    @property
    def seconds(self) -> float:
        """Of training, without interruptions."""
        return time.perf_counter() - self._started

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in the metrics of a step."""
        self.window.add(metrics)
        self._bar.update()

    def is_due(self, step: int) -> bool:
        """Whether a line of the log is, after `step` steps."""
        return step == self.config.max_steps or step % self.config.logging_steps == 0 or self._is_scored(step)

    def look(self, step: int, signalled: bool) -> bool:
        """See how things are after `step` steps; score and log if it is time. All processes call it together.

        Returns: whether any process has been `signalled`.
        Raises: TrainingError: the loss or a gradient was not finite. DiskError: the best weights cannot be written.
        """
        values, stop = self.window.read(signalled)
        self._check_finite(values, step)
        if self._is_scored(step):
            values["score"] = self._scored(step)
        if self.is_due(step):
            if self.backend.accelerator.is_main_process:
                self._log(step, values)
            self.window.clear()
        return stop

    def _is_scored(self, step: int) -> bool:
        every = self.config.eval_steps
        if self.score is None or not every or (step % every and step != self.config.max_steps):
            return False
        return self.hook is None or self.hook.settled(step - 1)

    def _scored(self, step: int) -> float:
        assert self.score is not None  # or it would not be time
        self.backend.share_buffers()
        with self.average.applied() if self.average is not None else nullcontext():
            score = self.score(self.model)
            if self.best is not None and self.backend.accelerator.is_main_process:
                self.best.offer(score, step, self.model)
        return score

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._bar.set_postfix(loss=f"{values['loss']:.3f}")
        if self.on_log is not None:
            entry = {"step": step, "lr": self.config.learning_rate_at(step - 1), **values}
            self.on_log(entry | {"seconds": round(self.seconds, 3)})
        if self.hook is not None:
            self.hook.log(step)

    def _check_finite(self, values: dict[str, float], step: int) -> None:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(values[key]):
                saved = states(self.folder) if self.folder is not None else []
                raise TrainingError(
                    f"{key} was not finite within the {self.window.length} steps before step {step}: lower "
                    f"learning_rate={self.config.learning_rate}, or check the data"
                    + (f"; the last good state is {saved[-1]}" if saved else "")
                )
