"""One training loop for fine-tuning, quantization-aware training and the one-shot search.

Everything random in a step (dropout, augmentation, formats) is a function of (seed, step, rank), and the order of the
images one of (seed, epoch). A run that is interrupted and resumed therefore ends in the same bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fliqs_hf.interrupt import finishing
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training.backends import backend_for, check_support
from fliqs_hf.training.checkpoint import Checkpoint
from fliqs_hf.training.config import TrainConfig
from fliqs_hf.training.data import ImageData, train_loader
from fliqs_hf.training.ema import WeightAverage
from fliqs_hf.training.imitation import Teacher
from fliqs_hf.training.monitor import ModelScore, Monitor, OnLog, check_best
from fliqs_hf.training.optimizer import adamw
from fliqs_hf.training.step import Augment, StepHook, TrainingStep
from fliqs_hf.training.stream import StreamData
from fliqs_hf.training.window import Window


def train(
    model: nn.Module,
    data: ImageData | StreamData,
    config: TrainConfig,
    accelerator: Any,
    *,
    hook: StepHook | None = None,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    score: ModelScore | None = None,
    state_folder: Path | None = None,
    resume: bool = False,
    on_log: OnLog | None = None,
    name: str = "training",
    task: Task = IMAGE_CLASSIFICATION,
) -> nn.Module:
    """Train `model`, in place where it is whole on every process.

    Args:
        model: takes `pixel_values`, returns what `task` understands.
        accelerator: an `accelerate.Accelerator`; mixed precision and distribution are its business.
        teacher: what `distill_weight` and `feature_weight` of the config imitate, of the model's architecture for the
            latter; moved to the device and frozen.
        score: evaluates the model, higher is better, the same on every process; called every `eval_steps` steps.
        state_folder: where states for `resume` go; none are written without it.
        on_log: gets the mean metrics since the last log, every `logging_steps` steps, on the main process; "seconds"
            are those of training until then, without interruptions and what they lost.
    Returns: the model, unwrapped; with FSDP2 or DeepSpeed another one, whole, as theirs stays sharded.
    Raises: TrainingError: the loss or a gradient is not finite. DiskError: a state cannot be written. Interrupted:
        a signal arrived, the state is saved. CheckpointError: `resume` with a damaged state, or of other settings.
    """
    check_support(accelerator, config)
    task.check(getattr(model, "config", None))
    check_best(config, score, state_folder, hook)
    backend = backend_for(accelerator, model, adamw(model, config.learning_rate, config.weight_decay), config, task)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    window = Window(accelerator)
    checkpoint = Checkpoint(state_folder, backend, config, name, hook=hook, average=average, window=window)
    step, seconds = checkpoint.begin(resume)
    batches = iter(_loader(data, config, accelerator, step))
    imitated = _teacher(teacher, model, config, accelerator, task)
    training = TrainingStep(backend, batches, config, hook=hook, augment=augment, teacher=imitated, average=average)
    monitor = Monitor(
        model, backend, config, window, score=score, hook=hook, average=average, best=checkpoint.best, on_log=on_log,
        folder=state_folder,
    )  # fmt: skip
    with monitor.begin(step, seconds, name), imitated or nullcontext():
        _run(training, monitor, checkpoint, step)
    if average is not None:
        average.swap()
    accelerator.wait_for_everyone()
    checkpoint.load_best(model)
    return backend.finish()


def _teacher(
    teacher: nn.Module | None, student: nn.Module, config: TrainConfig, accelerator: Any, task: Task
) -> Teacher | None:
    if teacher is None or not (config.distill_weight or config.feature_weight):
        return None
    return Teacher(teacher, task, accelerator.device, student if config.feature_weight else None)


def _run(training: TrainingStep, monitor: Monitor, checkpoint: Checkpoint, done: int) -> None:
    """The steps that come after `done` of them. Raises: Interrupted: by a signal, after the state was saved."""
    alone = training.accelerator.num_processes == 1
    with finishing(alone) as signalled:
        for step in range(done + 1, training.config.max_steps + 1):
            monitor.add(training.take(step - 1))
            save = checkpoint.is_due(step)
            stop = signalled.is_set and alone  # several processes hear of each other's signals when they look
            if save or stop or monitor.is_due(step):
                stop = monitor.look(step, signalled.is_set)
            if save or stop:
                checkpoint.save(step, monitor.seconds)
            if stop:
                raise signalled.interrupted(f"stopped after step {step}")
        if signalled.is_set:  # while the last step was being recorded
            raise signalled.interrupted("stopped after the last step")


def _loader(data: ImageData | StreamData, config: TrainConfig, accelerator: Any, done: int) -> Any:
    """Batches of this process from step `done` on."""
    parts = config.gradient_accumulation_steps
    return train_loader(
        data, config.batch_size, config.seed, done * parts, config.max_steps * parts,
        accelerator.process_index, accelerator.num_processes, config.workers,
    )  # fmt: skip
