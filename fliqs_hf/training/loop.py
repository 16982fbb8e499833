"""One training loop for fine-tuning, quantization-aware training and the one-shot search.

Everything random in a step (dropout, augmentation, formats) is a function of (seed, step, rank), and the order of the
images one of (seed, epoch). A run that is interrupted and resumed therefore ends in the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fliqs_hf.checks import check_fields
from fliqs_hf.errors import ConfigError, TrainingError
from fliqs_hf.interrupt import finishing
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training.backends import Backend, ShardedBackend
from fliqs_hf.training.compiling import check_backend
from fliqs_hf.training.data import ImageData, train_loader
from fliqs_hf.training.ema import WeightAverage
from fliqs_hf.training.schedule import Schedule, check_schedule, learning_rate_at
from fliqs_hf.training.seeds import derived_seed
from fliqs_hf.training.state import Best, load_state, save_state, states
from fliqs_hf.training.stream import StreamData
from fliqs_hf.training.window import Window
from fliqs_hf.training.zero import ZeroBackend, check_zero

#: (images, labels) -> (images, labels or class probabilities), on the device; randomness from the global generator
Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


UNSETTLED = (
    "the best weights cannot be kept: this search samples formats to its last step, so no evaluation before that is "
    "of the result; lower explore_fraction, or leave load_best_model_at_end out"
)


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
        for name in ("weight_decay", "eval_steps", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.compile_backend is not None:
            check_backend(self.compile_backend)
        if self.keep_best and not self.eval_steps:
            raise ConfigError("keeping the best weights needs evaluations: set eval_steps")

    def learning_rate_at(self, step: int) -> float:
        warmup = round(self.warmup_ratio * self.max_steps) if self.warmup_steps is None else self.warmup_steps
        return learning_rate_at(step, self.learning_rate, self.schedule, warmup, self.max_steps)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only: not for biases, norms, scales, position embeddings and tokens."""
    spared = (
        "position_embedding",
        "cls_token",
        "distillation_token",
        "mask_token",
        "register_tokens",  # DINOv2 with registers
        "relative_position_bias_table",
        "attention_biases",  # LeViT, [heads, offsets]
        "logit_scale",  # Swin v2, [heads, 1, 1]
        "layer_scale",  # SwiftFormer, [channels, 1, 1]
        "grn.",  # ConvNeXt v2: weight and bias of a norm, [1, 1, 1, channels]
        "head.probe",  # SigLIP: the query that pools patches
    )
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if parameter.dim() < 2 or any(word in name for word in spared) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(
    model: nn.Module,
    data: ImageData | StreamData,
    config: TrainConfig,
    accelerator: Any,
    *,
    hook: StepHook | None = None,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    score: Callable[[nn.Module], float] | None = None,
    state_folder: Path | None = None,
    resume: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    name: str = "training",
    task: Task = IMAGE_CLASSIFICATION,
) -> nn.Module:
    """Train `model`, in place where it is whole on every process.

    Args:
        model: takes `pixel_values`, returns what `task` understands.
        accelerator: an `accelerate.Accelerator`; mixed precision and distribution are its business.
        score: evaluates the model, higher is better, the same on every process; called every `eval_steps` steps.
        state_folder: where states for `resume` go; none are written without it.
        on_log: gets the mean metrics since the last log, every `logging_steps` steps, on the main process; "seconds"
            are those of training until then, without interruptions and what they lost.
    Returns: the model, unwrapped; with FSDP2 or DeepSpeed another one, whole, as theirs stays sharded.
    Raises: TrainingError: the loss or a gradient is not finite. DiskError: a state cannot be written. Interrupted:
        a signal arrived, the state is saved. CheckpointError: `resume` with a damaged state, or of other settings.
    """
    _check_support(accelerator, config)
    task.check(getattr(model, "config", None))
    if config.keep_best and (score is None or state_folder is None):
        raise ConfigError("keeping the best weights needs a score and a state_folder")
    if config.keep_best and hook is not None and not hook.settled(config.max_steps - 1):
        raise ConfigError(UNSETTLED)
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.learning_rate)
    backend = _backend(accelerator, model, optimizer, config, task)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    best = Best(state_folder / "best") if config.keep_best and state_folder is not None else None
    meta = {"config": repr(config), "world_size": accelerator.num_processes, "name": name}
    window = Window(accelerator)
    known = _resume(state_folder, backend, meta, hook, average, window, data) if resume else {}
    step, spent = known.get("step", 0), known.get("seconds", 0.0)
    if best is not None and step:
        best.resume(known["best"])
    elif best is not None and accelerator.is_main_process:
        best.forget()
    if teacher is not None:
        teacher.to(accelerator.device).eval().requires_grad_(False)

    micro = config.gradient_accumulation_steps
    loader = train_loader(
        data, config.batch_size, config.seed, step * micro, config.max_steps * micro,
        accelerator.process_index, accelerator.num_processes, config.workers,
    )  # fmt: skip
    batches = iter(loader)
    bar = tqdm(total=config.max_steps, initial=step, desc=name, disable=not accelerator.is_local_main_process)
    started = time.perf_counter() - spent
    with finishing(accelerator.num_processes == 1) as signalled, bar:
        while step < config.max_steps:
            torch.manual_seed(derived_seed("step", config.seed, step, accelerator.process_index))
            backend.set_learning_rate(config.learning_rate_at(step))
            loss, quality = _step(backend, batches, config, accelerator, hook, augment, teacher, task, step)
            norm = backend.step(config.max_grad_norm)
            extra = hook.end_step(step, quality) if hook is not None else {}
            if average is not None:
                average.update()
            window.add({"loss": loss, "grad_norm": norm, **extra})
            step += 1
            bar.update()
            last = step == config.max_steps
            judge = score is not None and config.eval_steps > 0 and (step % config.eval_steps == 0 or last)
            judge = judge and (hook is None or hook.settled(step - 1))
            due = last or judge or step % config.logging_steps == 0
            save = state_folder is not None and step % config.save_steps == 0
            stop = signalled.is_set and accelerator.num_processes == 1
            if due or save or stop:
                values, stop = window.read(signalled.is_set)
                _check_finite(values, window.length, step, config, state_folder)
                if judge and score is not None:
                    backend.share_buffers()
                    with average.applied() if average is not None else nullcontext():
                        values["score"] = score(model)
                        if best is not None and accelerator.is_main_process:
                            best.offer(values["score"], step, model)
                if due and accelerator.is_main_process:
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
                    if on_log is not None:
                        entry = {"step": step, "lr": config.learning_rate_at(step - 1), **values}
                        on_log(entry | {"seconds": round(time.perf_counter() - started, 3)})
                    if hook is not None:
                        hook.log(step)
                if due:
                    window.clear()
            if state_folder is not None and (stop or save):
                weights, moments = backend.tensors()
                if accelerator.is_main_process:
                    parts = (part for part in (hook, average, window) if part is not None)
                    tensors = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
                    known = {"seconds": time.perf_counter() - started, "best": best.record if best else None}
                    save_state(state_folder, step, weights, moments, tensors, {**meta, **known})
            if stop:
                raise signalled.interrupted(f"stopped after step {step}")
        if signalled.is_set:  # while the last step was being recorded
            raise signalled.interrupted("stopped after the last step")
    if average is not None:
        average.swap()
    accelerator.wait_for_everyone()
    if best is not None:
        best.load(model)
    return backend.finish()


def _check_finite(values: dict[str, float], length: int, step: int, config: TrainConfig, folder: Path | None) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(values[key]):
            saved = states(folder) if folder is not None else []
            raise TrainingError(
                f"{key} was not finite within the {length} steps before step {step}: lower "
                f"learning_rate={config.learning_rate}, or check the data"
                + (f"; the last good state is {saved[-1]}" if saved else "")
            )


def _step(
    backend: Backend,
    batches: Iterator[Any],
    config: TrainConfig,
    accelerator: Any,
    hook: StepHook | None,
    augment: Augment | None,
    teacher: nn.Module | None,
    task: Task,
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
                imitated = task.prediction(teacher(images)).float()
        for index, set_formats in enumerate(passes):
            set_formats()
            # The first pass trains; the others are there to be compared with it, and need no gradient.
            with backend.training_pass(last=m == micro - 1) if index == 0 else torch.no_grad():
                prediction = backend.prediction(images)
                loss = task.loss(prediction, targets, config.label_smoothing)
                if imitated is not None:
                    imitation = task.imitation(prediction, imitated)
                    loss = (1 - config.distill_weight) * loss + config.distill_weight * imitation
                if index == 0:
                    backend.backward(loss / micro)
            with torch.no_grad():
                measured = -loss if config.quality == "loss" else task.quality(prediction, labels)
                quality[index] += measured / micro
                if index == 0:
                    losses += loss / micro
    return losses, quality


def _resume(
    folder: Path | None,
    backend: Backend,
    meta: dict[str, Any],
    hook: StepHook | None,
    average: WeightAverage | None,
    window: Window,
    data: ImageData | StreamData,
) -> dict[str, Any]:
    """Restore the last state. Returns: what else it knows: "step", "seconds", "best"; nothing where there is none."""
    saved = states(folder) if folder is not None else []
    if not saved:
        return {}

    def image() -> Tensor:
        first: Tensor = next(iter(train_loader(data, 1, 0, 0, 1, 0, 1, 0)))[0]
        return first

    known, extra = load_state(saved[-1], lambda weights, moments: backend.load(weights, moments, image), meta)
    if hook is not None:
        hook.load_state_dict(extra)
    if average is not None:
        average.load_state_dict(extra, known["step"])
    window.load_state_dict(extra)
    return known


def _backend(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, task: Task
) -> Backend:
    kind = str(accelerator.distributed_type)
    if "DEEPSPEED" in kind:
        return ZeroBackend(
            accelerator, model, optimizer, batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps, max_norm=config.max_grad_norm, task=task,
        )  # fmt: skip
    if "FSDP" in kind:
        return ShardedBackend(accelerator, model, optimizer, task=task)
    return Backend(accelerator, model, optimizer, config.compile_backend, task)


def _check_support(accelerator: Any, config: TrainConfig) -> None:
    """Raises: ConfigError: what this loop cannot do."""
    kind = str(accelerator.distributed_type)
    if "MEGATRON" in kind:
        raise ConfigError(f"{kind} steps the optimizer by itself, which this loop cannot follow; use DDP or FSDP2")
    if "FSDP" in kind and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ConfigError("FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate config")
    if "DEEPSPEED" in kind:
        check_zero(accelerator)
    if ("FSDP" in kind or "DEEPSPEED" in kind) and (config.ema_decay or config.eval_steps):
        name = "ema_decay" if config.ema_decay else "eval_steps"
        raise ConfigError(
            f"{name}={getattr(config, name)} needs the whole model on every process during training: use DDP, or 0"
        )
    if ("FSDP" in kind or "DEEPSPEED" in kind) and config.compile_backend:
        raise ConfigError(f"torch_compile does not go with {kind}, which shards the model: use DDP, or leave it out")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed_precision={accelerator.mixed_precision!r} scales the loss, which a resumed run would not repeat; "
            "choose bf16 or no"
        )
