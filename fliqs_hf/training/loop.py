"""One training loop for fine-tuning, quantization-aware training and the one-shot search.

Everything random in a step (dropout, augmentation, formats) is a function of (seed, step, rank), and the order of the
images one of (seed, epoch). A run that is interrupted and resumed therefore ends in the same bits.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from fliqs_hf.errors import ConfigError, TrainingError
from fliqs_hf.training.data import ImageData, derived_seed, train_loader
from fliqs_hf.training.state import load_state, save_state, states

#: (images, labels) -> (images, labels or class probabilities), on the device; randomness from the global generator
Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C arrived; the state is saved and the run can be resumed."""


class StepHook(Protocol):
    """What a search does around a training step."""

    def begin_step(self, step: int) -> list[Callable[[], None]]:
        """One callable per forward pass, each of which sets the formats of that pass."""
        ...

    def end_step(self, step: int, quality: Tensor) -> dict[str, Tensor]:
        """Qualities [forward passes], higher is better. Returns metrics, on the device."""
        ...

    def log(self, step: int) -> None:
        """Called on the main process where metrics are written."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Raises: ConfigError: a value out of range."""

    max_steps: int
    batch_size: int = 32  # per device
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    label_smoothing: float = 0.0
    distill_weight: float = 0.0  # share of the loss that imitates the teacher
    quality: str = "loss"  # what the hook is told: "loss" (its negative) or "accuracy"
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("label_smoothing", "distill_weight", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then one cosine to zero."""
        warmup = round(self.warmup_ratio * self.max_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, self.max_steps - warmup))) / 2


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only: not for biases, norms, position embeddings and class tokens."""
    embeddings = (
        "position_embedding",
        "cls_token",
        "distillation_token",
        "mask_token",
        "relative_position_bias_table",
    )
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if parameter.dim() < 2 or any(word in name for word in embeddings) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    accelerator: Any,
    *,
    hook: StepHook | None = None,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    state_folder: Path | None = None,
    resume: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    name: str = "training",
) -> nn.Module:
    """Train `model` in place.

    Args:
        model: takes `pixel_values`, returns an output with `.logits`.
        accelerator: an `accelerate.Accelerator`; mixed precision and distribution are its business.
        state_folder: where states for `resume` go; none are written without it.
        on_log: gets the metrics of every `logging_steps`-th step, on the main process.
    Returns: the model, unwrapped.
    Raises: TrainingError: the loss is not finite, or a state cannot be written. Interrupted: Ctrl-C.
        CheckpointError: `resume` with a state of other settings.
    """
    _check_distribution(accelerator)
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.learning_rate)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    meta = {"config": repr(config), "world_size": accelerator.num_processes, "name": name}
    step = _resume(state_folder, wrapped, optimizer, meta, hook, accelerator) if resume else 0
    if teacher is not None:
        teacher.to(accelerator.device).eval().requires_grad_(False)

    micro = config.gradient_accumulation_steps
    loader = train_loader(
        data, config.batch_size, config.seed, step * micro, config.max_steps * micro,
        accelerator.process_index, accelerator.num_processes, config.workers,
    )  # fmt: skip
    batches = iter(loader)
    bar = tqdm(total=config.max_steps, initial=step, desc=name, disable=not accelerator.is_local_main_process)
    window = _Window(accelerator.device)
    started = time.perf_counter()
    with _signal_flag() as interrupted, bar:
        while step < config.max_steps:
            torch.manual_seed(derived_seed("step", config.seed, step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            loss, quality = _step(wrapped, batches, config, accelerator, hook, augment, teacher, step)
            accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            extra = hook.end_step(step, quality) if hook is not None else {}
            window.add({"loss": loss, **extra})
            step += 1
            bar.update()
            due = step % config.logging_steps == 0 or step == config.max_steps
            stop = interrupted.is_set() and (accelerator.num_processes == 1 or due)
            if due or stop or step % config.save_steps == 0:
                values = window.read(accelerator)
                if values and not math.isfinite(values["loss"]):
                    raise TrainingError(
                        f"the loss was not finite within the {window.length} steps before step {step}: lower "
                        f"learning_rate={config.learning_rate}, or check the data"
                        + (
                            f"; the last good state is {states(state_folder)[-1]}"
                            if state_folder and states(state_folder)
                            else ""
                        )
                    )
                if values and due and accelerator.is_main_process:
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
                    if on_log is not None:
                        entry = {"step": step, "lr": config.learning_rate_at(step - 1), **values}
                        on_log(entry | {"seconds": round(time.perf_counter() - started, 3)})
                    if hook is not None:
                        hook.log(step)
            if state_folder is not None and (stop or step % config.save_steps == 0) and accelerator.is_main_process:
                unwrapped = accelerator.unwrap_model(wrapped)
                save_state(state_folder, step, unwrapped, optimizer, hook.state_dict() if hook else {}, meta)
            if stop:
                raise Interrupted(f"stopped after step {step}; add --resume to go on")
    return accelerator.unwrap_model(wrapped)


def _step(
    model: nn.Module,
    batches: Iterator[Any],
    config: TrainConfig,
    accelerator: Any,
    hook: StepHook | None,
    augment: Augment | None,
    teacher: nn.Module | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Forward and backward passes of one optimizer step. Returns: mean loss, and the quality of each pass [passes]."""
    passes = hook.begin_step(step) if hook is not None else [lambda: None]
    micro = config.gradient_accumulation_steps
    losses = torch.zeros((), device=accelerator.device)
    quality = torch.zeros(len(passes), device=accelerator.device)
    for m in range(micro):
        images, labels = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches))
        images, targets = augment(images, labels) if augment is not None else (images, labels)
        imitated = None
        if teacher is not None and config.distill_weight > 0:
            with torch.no_grad(), accelerator.autocast():
                imitated = teacher(images).logits.float().softmax(-1)
        for index, set_formats in enumerate(passes):
            set_formats()
            last = m == micro - 1 and index == len(passes) - 1
            with _synchronised(accelerator, model, last):
                with accelerator.autocast():
                    logits = model(images).logits
                logits = logits.float()
                loss = functional.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
                if imitated is not None:
                    imitation = functional.cross_entropy(logits, imitated)
                    loss = (1 - config.distill_weight) * loss + config.distill_weight * imitation
                accelerator.backward(loss / (micro * len(passes)))
            with torch.no_grad():
                measured = -loss if config.quality == "loss" else (logits.argmax(-1) == labels).float().mean()
                quality[index] += measured / micro
                losses += loss / (micro * len(passes))
    return losses, quality


@contextmanager
def _synchronised(accelerator: Any, model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are reduced over processes with the last backward pass of a step only."""
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


class _Window:
    """Sums of metrics on the device since the last read: reading is the only point that waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.sums, self.length = device, {}, 0  # type: tuple[torch.device, dict[str, Tensor], int]

    def add(self, values: dict[str, Tensor]) -> None:
        if not self.length or values.keys() - self.sums.keys():
            self.sums = {key: self.sums.get(key, torch.zeros((), device=self.device)) for key in (*self.sums, *values)}
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value.detach().to(self.device)
        self.length += 1

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means over steps and processes since the last read, or nothing if there was no step."""
        if not self.length:
            return {}
        stacked = torch.stack([value.float() for value in self.sums.values()]) / self.length
        means = dict(zip(self.sums, accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))
        self.sums, self.length = {}, 0
        return means


@contextmanager
def _signal_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that the step in progress is finished; a second Ctrl-C stops at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(*_: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def _resume(
    folder: Path | None,
    model: nn.Module,
    optimizer: Any,
    meta: dict[str, Any],
    hook: StepHook | None,
    accelerator: Any,
) -> int:
    saved = states(folder) if folder is not None else []
    if not saved:
        return 0
    step, extra = load_state(saved[-1], accelerator.unwrap_model(model), optimizer, meta)
    if hook is not None:
        hook.load_state_dict(extra)
    return step


def _check_distribution(accelerator: Any) -> None:
    kind = str(accelerator.distributed_type)
    if any(name in kind for name in ("FSDP", "DEEPSPEED", "MEGATRON")):
        raise ConfigError(
            f"{kind} shards the model, which this loop cannot checkpoint yet; use DDP (MULTI_GPU, MULTI_CPU)"
        )
