"""Settings of one training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fliqs_hf.checks import check_fields
from fliqs_hf.errors import ConfigError
from fliqs_hf.training.compiling import check_backend
from fliqs_hf.training.schedule import Schedule, check_schedule, learning_rate_at


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Raises: ConfigError: a value out of range, or of another type."""

    max_steps: int
    batch_size: int = 32  # per device
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None  # instead of the ratio
    schedule: Schedule = "cosine"  # of the learning rate after the warm-up
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    label_smoothing: float = 0.0
    distill_weight: float = 0.0  # share of the loss that imitates the teacher
    feature_weight: float = 0.0  # of what the outputs of blocks miss of the teacher's, added to the loss
    quality: Literal["loss", "accuracy"] = "loss"  # what the hook is told: "loss" (its negative) or "accuracy"
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    eval_steps: int = 0  # 0: no evaluation while training
    keep_best: bool = False  # return the best weights of those evaluations, not the last
    ema_decay: float = 0.0  # of a moving average of the weights, which is then what is evaluated and returned; 0: none
    workers: int = 0
    compile_backend: str | None = None  # of `torch.compile` for the forward and backward passes; None: not compiled

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("label_smoothing", "distill_weight", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        check_schedule(self.schedule, self.warmup_steps, self.max_steps)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must be at least 0 and below 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "eval_steps", "workers", "feature_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.compile_backend is not None:
            check_backend(self.compile_backend)
        if self.keep_best and not self.eval_steps:
            raise ConfigError("keeping the best weights needs evaluations: set eval_steps")

    def learning_rate_at(self, step: int) -> float:
        warmup = round(self.warmup_ratio * self.max_steps) if self.warmup_steps is None else self.warmup_steps
        return learning_rate_at(step, self.learning_rate, self.schedule, warmup, self.max_steps)
