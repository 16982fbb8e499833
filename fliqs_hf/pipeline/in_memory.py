"""The recipe for a model and images that are in memory: `fliqs_hf.search`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from fliqs_hf.cost import Target
from fliqs_hf.cost.choices import Choices, choices
from fliqs_hf.errors import ConfigError, DataError, did_you_mean
from fliqs_hf.formats import Format
from fliqs_hf.hf.quantizer import refuse_packed, require_transformers
from fliqs_hf.limits import check_values
from fliqs_hf.lock import locked
from fliqs_hf.nn.finite import check_finite
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.pipeline.checkpoints import load_processor
from fliqs_hf.pipeline.checks import check_settings
from fliqs_hf.pipeline.job import Job, accelerator_of, job_of, task_data, with_columns
from fliqs_hf.pipeline.outputs import check_run_folders
from fliqs_hf.pipeline.own_loop import SearchResult
from fliqs_hf.pipeline.search import carry_out, searched
from fliqs_hf.pipeline.search_floor import floor_of
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.selection.rules import rule_texts
from fliqs_hf.selection.space import ActivationMode
from fliqs_hf.tasks import Task, find_task
from fliqs_hf.training.arguments import DataArguments, ModelArguments, SearchArguments, TrainingArguments, typed
from fliqs_hf.training.foreign import ForeignArguments, advice, fold
from fliqs_hf.training.labels import names_of
from fliqs_hf.training.models import label_ids
from fliqs_hf.training.pixels import PixelData

Parts = tuple[ModelArguments, DataArguments, TrainingArguments, SearchArguments]
#: The run folder where none is named.
OUTPUT = "search_output"


def search(
    model: Any,
    data: Any,
    target: Target,
    *,
    eval_data: Any = None,
    processor: Any = None,
    output_dir: str | Path | None = None,
    config: SearchConfig | None = None,
    search_space: str | Sequence[str | Format] | None = None,
    hardware: str | None = None,
    activation: ActivationMode | None = None,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    modules_to_not_convert: Sequence[str] | None = None,
    tie: Sequence[str] = (),
    require: Mapping[str, Sequence[str | Format]] | None = None,
    min_bits: Mapping[str, float] | None = None,
    activation_granularity: Literal["per_token", "per_token_clipped"] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    task: str = "image-classification",
    **training: Any,
) -> SearchResult:
    """Search formats, train the weights for them, pack, evaluate: what `fliqs-hf search` does.

    Args:
        model: in fp32, of Transformers, trained for these classes or with `finetune_steps`. It stays as it is.
        data: images to train with: a `datasets.Dataset` with columns of images and of labels, or a dataset of pairs
            (pixel values [channels, height, width], label) or of dictionaries of both ("pixel_values", "labels"), as
            for `Trainer`. A `datasets.DatasetDict` holds those of `eval_data` too ("validation", or else "test").
        eval_data: images that accuracies are measured on, of the same kind.
        image_column, label_column: of a `datasets.Dataset`; default: the task's, "image" and "label" of classifiers.
        processor: the model's image processor; default: that of the checkpoint the model was loaded from.
        max_drop, min_accuracy, confidence: a floor of accuracy on `eval_data`, see docs/search.md.
        search_space, hardware, activation: see `cost.choices`; by default formats that this machine runs.
        tie, require, min_bits: see `SearchSpace`.
        output_dir: run folder to write, with report and card, and what `resume=True` goes on with; default:
            "search_output" in the working directory, as `Trainer` has its "trainer_output".
        training: settings of the recipe by name, such as `max_steps`, `learning_rate`, `finetune_steps`, `resume`.
    Returns: the packed model, as it is loaded from its files; its allocation, costs and accuracies.
    Raises: ConfigError, TargetError, FormatError, DataError: before any training. FloorError: no allocation met it.
    """
    parts = (
        ModelArguments(model_name_or_path=getattr(model, "name_or_path", None) or None, task=task),
        DataArguments(image_column_name=image_column, label_column_name=label_column),
        _training_arguments(training, output_dir),
        SearchArguments(
            **_chosen(choices(search_space, hardware, activation)),
            **_aim(target, max_drop, min_accuracy, confidence),
            **_patterns(modules_to_not_convert=modules_to_not_convert, tie=tie),
            require=rule_texts(require),
            min_bits=rule_texts(min_bits),
            activation_granularity=activation_granularity,
            search_overrides=_changes(config or SearchConfig()),
        ),
    )
    _check(model, parts)
    return _run(model, _splits(data, eval_data), target, parts, processor or _processor_of(model))


def _check(model: Any, parts: Parts) -> None:
    for part in parts:
        check_values(asdict(part))
    check_settings(*parts[2:])
    require_transformers(model)
    refuse_packed(model)
    check_finite(model)


def _run(model: Any, splits: tuple[Any, Any], target: Target, parts: Parts, processor: Any) -> SearchResult:
    model_args, data_args, args, search_args = parts
    kind = find_task(model_args.task)
    kind.check(model.config)
    if _is_prepared(splits[0]) and (column := data_args.image_column_name or data_args.label_column_name):
        raise ConfigError(f"the column {column!r} is of a datasets.Dataset with images, and data holds pixel values")
    data_args = with_columns(data_args, kind)
    with ExitStack() as stack:
        folder = RunFolder(args.output_dir)
        check_run_folders(
            [folder],
            args.resume or args.overwrite_output_dir,
            "give resume=True to go on with it, overwrite_output_dir=True to replace it",
        )
        accelerator = accelerator_of(args)
        if accelerator.is_main_process:
            stack.enter_context(locked(folder.path))
        pair = _tensors(kind, *splits, processor, model, data_args)
        parts = (model_args, data_args, args, search_args)
        job = job_of(parts, accelerator, kind, copy.deepcopy(model), processor, pair)
        result = _result(job, folder, target, search_args)
    return replace(result, run=folder.path)


def _result(job: Job, folder: RunFolder, target: Target, search_args: SearchArguments) -> SearchResult:
    layers, planned = searched(job, [target])
    own, problem = planned[target].job, planned[target].problem
    floor = floor_of(search_args, job.args, 1)
    (found,) = carry_out(job, folder, {target: folder}, layers, planned, [], floor)
    allocation = FinishedRun.read(folder.path).allocation
    packed = job.task.auto_class().from_pretrained(folder.path).to(job.accelerator.device)
    return SearchResult(
        allocation=allocation,
        model=packed,
        cost=problem.costs.of(allocation),
        target_cost=problem.target_cost,
        repaired=found["repaired"],
        layers=layers,
        activation_granularity=own.quantizers.activation_granularity,
        metrics={"accuracy": found["accuracy"], "cost": found["cost"]},
    )


def _chosen(found: Choices) -> dict[str, Any]:
    """As the recipe's arguments have it."""
    formats = [fmt.name for fmt in found.formats]
    return {"search_space": formats, "hardware": found.hardware, "activation": found.activation}


def _aim(target: Target, max_drop: float | None, min_accuracy: float | None, confidence: float) -> dict[str, Any]:
    """Target and floor, on record, so that a run is resumed with the same ones or not at all."""
    floor = {"max_drop": max_drop, "min_accuracy": min_accuracy, "confidence": confidence}
    return {"target": [f"{target.kind}={target.value!r}"], "cap": target.cap, **floor}


def _patterns(**given: Sequence[str] | None) -> dict[str, Any]:
    for name, patterns in given.items():
        if isinstance(patterns, str):
            raise ConfigError(f"{name}={patterns!r}: give a list of patterns")
    return {name: list(patterns or ()) or None for name, patterns in given.items()}


def _changes(config: SearchConfig) -> dict[str, Any]:
    """What differs from the default, as `search_overrides` of a settings file has it."""
    default = asdict(SearchConfig())
    return {name: value for name, value in asdict(config).items() if value != default[name]}


def _training_arguments(training: Mapping[str, Any], output_dir: str | Path | None) -> TrainingArguments:
    """Raises: ConfigError: a setting that does not exist, or that has no such value."""
    values: dict[str, Any] = {
        field.name: field.default for cls in (TrainingArguments, ForeignArguments) for field in fields(cls)
    }
    for name in training:
        if name not in values:
            remedy = "" if (known := advice(name)) is None else f"; {known}"
            raise ConfigError(f"search() has no argument {name!r}{remedy or did_you_mean(name, values)}")
    folder = str(OUTPUT if output_dir is None else output_dir)
    values |= {**typed(training, "search(): "), "output_dir": folder}
    fold(values)
    return TrainingArguments(**values)


def _processor_of(model: Any) -> Any:
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ConfigError("the model was made in memory and has no image processor: give processor=")
    return load_processor(name)


def _splits(data: Any, eval_data: Any) -> tuple[Any, Any]:
    """Training and evaluation images. Raises: ConfigError: one is missing, or is no dataset."""
    if isinstance(data, Mapping):
        other = next((name for name in ("validation", "test") if name in data), None)
        eval_data = data[other] if eval_data is None and other else eval_data
        if "train" not in data:
            raise ConfigError(f"data has the splits {', '.join(map(str, data))}: search() trains with 'train'")
        data = data["train"]
    if eval_data is None:
        raise ConfigError("give eval_data=, images that accuracy is measured on, such as half of train_test_split()")
    for name, given in (("data", data), ("eval_data", eval_data)):
        if isinstance(given, DataLoader):
            raise ConfigError(f"{name} is a DataLoader: give its dataset, or use fliqs_hf.Search in your own loop")
        if not hasattr(given, "__getitem__") or not hasattr(given, "__len__"):
            raise ConfigError(f"{name} is a {type(given).__name__}: give a dataset that has a length")
    return data, eval_data


def _is_prepared(data: Any) -> bool:
    """Whether its items are pixel values and labels already."""
    return not hasattr(data, "column_names") or "pixel_values" in data.column_names or data.format["type"] == "custom"


def _tensors(
    task: Task, train: Any, held_out: Any, processor: Any, model: Any, args: DataArguments
) -> tuple[Any, Any]:
    """Both as pixel values and labels. Raises: DataError: other items, or labels that are no classes of the model."""
    if _is_prepared(train):
        pairs = PixelData(train, model.num_labels, task), PixelData(held_out, model.num_labels, task)
        for data in pairs:
            data.first()
        return pairs
    train, held_out, names = task.classes(train, held_out, str(args.label_column_name), processor)
    columns = {
        "image_column": args.image_column_name,
        "label_column": args.label_column_name,
        "label_ids": label_ids(names, model) if task.class_per_image else None,
    }
    if len(names) > model.num_labels:
        raise DataError(f"the data set has {len(names)} classes, the model {model.num_labels}")
    names = names if task.class_per_image else names_of(model.config)
    split = [task_data(task, split, processor, names, None, args, columns) for split in (train, held_out)]
    for data in split:
        data.first()
    return split[0], split[1]
