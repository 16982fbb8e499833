"""What a job needs, from its arguments: accelerator, data, model, image processor, targets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils import logging as hf_logging

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import QuantizerSettings
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.pipeline.checks import RUN_NAMES, model_settings, search_config, trackers_of, train_config
from fliqs_hf.pipeline.recipe import PLAIN, Recipe, completed
from fliqs_hf.tasks import Task, find_task
from fliqs_hf.training import ImageData, TrainConfig, evaluate, load_models_whole, load_splits
from fliqs_hf.training.arguments import DataArguments, ModelArguments, SearchArguments, TrainingArguments
from fliqs_hf.training.augment import BatchAugment
from fliqs_hf.training.data import held_in_memory, undecoded
from fliqs_hf.training.evaluation import load_metric
from fliqs_hf.training.labels import names_of
from fliqs_hf.training.models import label_ids, load_classifier, read_classifier
from fliqs_hf.training.splits import at_most
from fliqs_hf.training.stream import StreamData


@dataclass(frozen=True)
class Job:
    """What every part of the run needs."""

    args: TrainingArguments
    search_args: SearchArguments
    accelerator: Accelerator
    search: SearchConfig
    quantizers: QuantizerSettings
    settings: dict[str, Any]  # every argument, for settings.json
    model: Any
    processor: Any
    train_data: ImageData | StreamData
    eval_data: ImageData
    augment: BatchAugment | None
    metrics: list[str]
    task: Task
    trained: bool  # whether searches start from a model that is: of a checkpoint with its head, or fine-tuned

    @property
    def steps(self) -> int:
        """Optimizer steps of a search."""
        assert self.args.max_steps is not None, "`load` sets it"
        return self.args.max_steps

    def following(self, recipe: Recipe) -> Job:
        """This job with what its arguments leave open."""
        args, search_args = completed(self.args, self.search_args, recipe)
        settings = {name: value for part in (args, search_args) for name, value in asdict(part).items()}
        return replace(
            self, args=args, search_args=search_args, quantizers=quantizers_of(search_args),
            settings=self.settings | {name: settings[name] for name in asdict(recipe)},
        )  # fmt: skip

    def train_config(self, steps: int, learning_rate: float | None) -> TrainConfig:
        return train_config(self.args, steps, learning_rate, self.search.quality)

    def score(self, model: Any) -> float:
        value: float = self.evaluate(model, "evaluation").value
        return value

    def evaluate(self, model: Any, name: str) -> Any:
        """`Score`, or what has its attributes."""
        size, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        return evaluate(
            model, self.eval_data, self.accelerator, batch_size=size, workers=workers, name=name,
            metrics=self.metrics, task=self.task,
        )  # fmt: skip


def load(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, search_args: SearchArguments
) -> Job:
    """Accelerator, data, model and image processor."""
    task = find_task(model_args.task)
    data_args = with_columns(data_args, task)
    accelerator = accelerator_of(args, data_args.metrics or [])
    with accelerator.main_process_first():
        train_split, eval_split, names = _splits(task, model_args, data_args, args.seed)
    model, processor, trained = load_classifier(names, **model_settings(model_args))
    ids = label_ids(names, model) if task.class_per_image else None
    names = names if task.class_per_image else names_of(model.config)
    train_data, eval_data = _data(task, train_split, eval_split, processor, names, ids, data_args)
    augment = None
    if data_args.augment:
        mean, std = (getattr(processor, key, None) or [0.5] * 3 for key in ("image_mean", "image_std"))
        augment = BatchAugment(data_args.augment, len(names), mean, std)
    parts = (model_args, data_args, args, search_args)
    return job_of(parts, accelerator, task, model, processor, (train_data, eval_data), augment, trained)


def with_columns(args: DataArguments, task: Task) -> DataArguments:
    """Those of the task, where the arguments name none."""
    image, label = args.image_column_name or task.columns[0], args.label_column_name or task.columns[1]
    return replace(args, image_column_name=image, label_column_name=label)


def accelerator_of(args: TrainingArguments, metrics: Sequence[str] = ()) -> Accelerator:
    """Processes, devices and seeds. What cannot be had must not stop the run after hours of training."""
    trackers = trackers_of(args.report_to)
    for metric in metrics:
        load_metric(metric)
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        log_with=trackers or None,
        project_dir=args.output_dir,
    )
    load_models_whole()
    hf_logging.disable_progress_bar()
    if not accelerator.is_main_process:
        hf_logging.set_verbosity_error()
    set_seed(args.seed)
    return accelerator


def job_of(
    parts: tuple[ModelArguments, DataArguments, TrainingArguments, SearchArguments],
    accelerator: Accelerator,
    task: Task,
    model: Any,
    processor: Any,
    data: tuple[ImageData | StreamData, ImageData],
    augment: BatchAugment | None = None,
    trained: bool = True,
) -> Job:
    """A job of what is loaded. Its model is on its device, and its settings are those that will be recorded."""
    model_args, data_args, args, search_args = parts
    train_data, eval_data = data
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        try:
            enable()
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing: {error}") from error
    args = replace(args, max_steps=steps_of(args, train_data, accelerator.num_processes))
    recorded = (model_args, data_args, args, search_args)
    settings = json.loads(json.dumps({k: v for part in recorded for k, v in asdict(part).items() if k != "token"}))
    if trackers := trackers_of(args.report_to):
        named = {tracker: {RUN_NAMES[tracker]: args.run_name} for tracker in trackers} if args.run_name else {}
        accelerator.init_trackers("fliqs", {key: str(value) for key, value in settings.items()}, named)
    return Job(
        args=args,
        search_args=search_args,
        accelerator=accelerator,
        search=search_config(search_args),
        quantizers=quantizers_of(search_args),
        settings=settings,
        model=model.to(accelerator.device),
        processor=processor,
        train_data=train_data,
        eval_data=eval_data,
        augment=augment,
        metrics=data_args.metrics or [],
        task=task,
        trained=trained or args.finetune_steps > 0,
    )


def quantizers_of(search_args: SearchArguments) -> QuantizerSettings:
    """Those of the arguments, or what is usual where they leave it open."""
    return QuantizerSettings(activation_granularity=search_args.activation_granularity or PLAIN.activation_granularity)


def _splits(task: Task, model_args: ModelArguments, data_args: DataArguments, seed: int) -> tuple[Any, Any, list[str]]:
    """Training and evaluation split, and the names of their classes."""
    train_split, eval_split = load_splits(
        data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        train_dir=data_args.train_dir,
        validation_dir=data_args.validation_dir,
        validation_split=data_args.validation_split,
        train_val_split=data_args.train_val_split,
        streaming=data_args.streaming,
        seed=seed,
        cache_dir=model_args.cache_dir,
    )
    _, processor = read_classifier(**model_settings(model_args))
    return task.classes(train_split, eval_split, str(data_args.label_column_name), processor)


def _data(
    task: Task, train_split: Any, eval_split: Any, processor: Any, names: list[str], ids: list[int] | None,
    args: DataArguments,
) -> tuple[ImageData | StreamData, ImageData]:  # fmt: skip
    """Both splits as tensors; a fault of all images shows here, before the training."""
    image, label = str(args.image_column_name), str(args.label_column_name)
    columns: dict[str, Any] = {"image_column": image, "label_column": label, "label_ids": ids}
    train_data: ImageData | StreamData
    if args.streaming:
        train_data = StreamData(train_split, processor, len(names), **columns)
        columns["stream"] = undecoded(eval_split, image)
        eval_split = held_in_memory(eval_split, names, args.max_eval_samples, image_column=image, label_column=label)
    else:
        train_data = task_data(task, train_split, processor, names, args.max_train_samples, args, columns)
    eval_data = task_data(task, eval_split, processor, names, args.max_eval_samples, args, columns)
    for data in (train_data, eval_data):
        data.first()
    return train_data, eval_data


def task_data(
    task: Task, split: Any, processor: Any, names: list[str], limit: int | None, args: DataArguments,
    columns: dict[str, Any],
) -> Any:  # fmt: skip
    """The images of `at_most`, as the model takes them."""
    return task.data(at_most(split, limit), processor, len(names), cache=args.cache_images, **columns)


def steps_of(args: TrainingArguments, data: ImageData | StreamData, processes: int) -> int:
    """Optimizer steps of a search."""
    if args.num_train_epochs is None:
        return args.max_steps if args.max_steps is not None else 1000
    assert not isinstance(data, StreamData), "`check_arguments` refuses it"
    batches = max(1, len(data) // (args.per_device_train_batch_size * processes))
    return math.ceil(args.num_train_epochs * batches / args.gradient_accumulation_steps)
