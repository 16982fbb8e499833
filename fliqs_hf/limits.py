"""What numbers and names may be given as arguments: one table for the recipe and every command.

Arguments of one name mean the same everywhere, so their limits are written once, and are checked before anything is
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fliqs_hf.errors import ConfigError


@dataclass(frozen=True)
class Limit:
    """Lowest and highest value; `above` leaves the lowest out, `below` the highest."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def allows(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:.12g}"


COUNT = Limit(1)
SHARE = Limit(0, 1)
POSITIVE = Limit(0, above=True)
#: What PyTorch and NumPy take as a seed.
SEED = Limit(0, 2**32 - 1)
#: Whole numbers beyond it do not fit into 64 bits.
LARGEST = 2**63 - 1

LIMITS: Mapping[str, Limit] = {
    # images and data
    "image_size": COUNT,
    "batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "max_train_samples": COUNT,
    "max_eval_samples": COUNT,
    "calibration_images": COUNT,
    "prior_images": COUNT,
    "batchnorm_images": Limit(0),
    "alternative_images": Limit(0),
    "max_samples": Limit(2),  # a validation says nothing about a single image
    "train_val_split": Limit(0, 1, above=True, below=True),
    # training
    "seed": SEED,
    "seeds": SEED,
    "max_steps": COUNT,
    "trials": COUNT,
    "trial_steps": COUNT,
    "num_train_epochs": POSITIVE,
    "finetune_steps": Limit(0),
    "warmup_steps": Limit(0),
    "warmup_ratio": SHARE,
    "learning_rate": POSITIVE,
    "finetune_learning_rate": POSITIVE,
    "weight_decay": Limit(0),
    "max_grad_norm": POSITIVE,
    "gradient_accumulation_steps": COUNT,
    "ema_decay": Limit(0, 1, below=True),
    "label_smoothing_factor": SHARE,
    "distill": SHARE,
    "distill_features": Limit(0),
    "dataloader_num_workers": Limit(0),
    "logging_steps": COUNT,
    "save_steps": COUNT,
    "eval_steps": Limit(0),
    # targets
    "target_bits": Limit(0, 32, above=True),
    "target_bops": POSITIVE,
    "target_size_mb": POSITIVE,
    "target_memory_mb": POSITIVE,
    "target_energy_uj": POSITIVE,
    "target_latency_ms": POSITIVE,
    "target_ratio": Limit(0, 1, above=True),
    "points": Limit(2),
    "measure": Limit(0),
    "floor_steps": Limit(2),
    # timing
    "rounds": Limit(3),
    "threads": COUNT,
    # validation
    "max_drop": Limit(0, 100),
    "min_accuracy": SHARE,
    "held_out_images": Limit(2),
    "min_agreement": Limit(0, 100),
    "opset": Limit(21, 25),
    "confidence": Limit(0.5, 1, above=True, below=True),
}


def check_values(values: Mapping[str, Any], prefix: str = "") -> None:
    """Check arguments by name; a list is checked item by item, None is an argument that is not given.

    Args:
        prefix: of the names in messages, such as "--".
    Raises: ConfigError: a number that is not finite, does not fit into 64 bits or is outside `LIMITS`, or a text that
        is empty or cannot be part of a file name, or an empty list of numbers or of formats to choose from.
    """
    for name, value in values.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items:
            _check(f"{prefix}{name}", item, LIMITS.get(name))
        if isinstance(value, list) and not value and (name in LIMITS or name == "search_space"):
            raise ConfigError(f"{prefix}{name} is an empty list: give at least one value, or leave it out")


def check_distinct(name: str, values: Iterable[Any]) -> None:
    """Raises: ConfigError: a value that is given twice."""
    seen = []
    for value in values:
        if value in seen:
            raise ConfigError(f"{name} has {value!r} more than once")
        seen.append(value)


def _check(name: str, value: Any, limit: Limit | None) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError(f"{name}={value!r} is empty: give a value, or leave it out")
        if "\0" in value:
            raise ConfigError(f"{name}={value!r} holds a zero byte, which no name can")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > LARGEST:
        raise ConfigError(f"{name}={_short(value)} must be a finite number of at most 64 bits")
    if limit is not None and not limit.allows(value):
        raise ConfigError(f"{name}={value!r} must be {limit}")


def _short(value: float) -> str:
    """Python refuses to write whole numbers of more than 4300 digits."""
    return repr(value) if isinstance(value, float) else f"{value:#x}"[:40]
