"""What of a job's arguments can be refused before data and model are loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from fliqs_hf.cost import Target, target_kinds
from fliqs_hf.cost.choices import choices
from fliqs_hf.cost.latency import LatencyTable, use
from fliqs_hf.cost.target import given_targets
from fliqs_hf.errors import ConfigError, FormatError, HubError
from fliqs_hf.formats import parse as parse_format
from fliqs_hf.limits import check_distinct
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.pipeline.outputs import data_source
from fliqs_hf.pipeline.recipe import PLAIN
from fliqs_hf.selection.rules import parse_rules
from fliqs_hf.tasks import find_task
from fliqs_hf.training import TrainConfig
from fliqs_hf.training.arguments import DataArguments, ModelArguments, SearchArguments, TrainingArguments
from fliqs_hf.training.augment import check_augment
from fliqs_hf.training.compiling import DEFAULT_BACKEND
from fliqs_hf.training.models import read_classifier

#: How trackers call the name of a run; the others of accelerate name it by themselves.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


def check_arguments(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, search_args: SearchArguments
) -> None:
    """Raises: ConfigError, TargetError, HubError: arguments that cannot work, alone or together."""
    check_settings(args, search_args)
    if (data_args.dataset_name is None) == (data_args.train_dir is None):
        raise ConfigError("no data, or two: give either dataset_name (a Hub id, a folder or 'digits') or train_dir")
    if data_args.streaming and data_args.max_train_samples is not None:
        raise ConfigError(
            f"max_train_samples={data_args.max_train_samples} does not go with streaming, which reads all training "
            "images as they come: leave one of them out"
        )
    if data_args.streaming and args.num_train_epochs is not None:
        raise ConfigError("a stream has no known length: give max_steps instead of num_train_epochs")
    task = find_task(model_args.task)
    for name in ("streaming", "augment", "metrics"):
        if getattr(data_args, name) and not task.class_per_image:
            raise ConfigError(f"{name} is for tasks with one class per image, not for {task.name!r}: leave it out")
    check_augment(data_args.augment or [])
    read_classifier(**model_settings(model_args))


def check_settings(args: TrainingArguments, search_args: SearchArguments) -> None:
    """Raises: ConfigError, TargetError, HubError: settings that cannot work with any model and data."""
    search = search_config(search_args)
    if search_args.latency_table is not None:
        use(LatencyTable.load(search_args.latency_table))
    targets = targets_of(search_args)
    limits_of(search_args)
    _check_effects(args, search_args)
    settled(search_args)
    parse_rules(search_args.require, search_args.min_bits)
    uniform_formats(search_args)
    if args.max_steps is not None and args.num_train_epochs is not None:
        raise ConfigError(f"give max_steps={args.max_steps} or num_train_epochs={args.num_train_epochs}, not both")
    # Epochs become steps when the data are known; until then there are enough of them for any warm-up.
    train_config(args, args.max_steps or max(1000, args.warmup_steps or 0), args.learning_rate, search.quality)
    if args.finetune_steps:
        train_config(args, args.finetune_steps, args.finetune_learning_rate or args.learning_rate, search.quality)
    check_run_name(args.run_name, trackers_of(args.report_to))
    _check_hub_name(args, targets)


def _check_effects(args: TrainingArguments, search_args: SearchArguments) -> None:
    """Raises: ConfigError: a setting that differs from its default and has no effect beside the others."""
    floor = search_args.max_drop is not None or search_args.min_accuracy is not None
    if search_args.confidence != SearchArguments.confidence and not floor:
        raise ConfigError(
            f"confidence={search_args.confidence} is of a floor: give max_drop or min_accuracy, or leave it out"
        )
    if args.alternative_images == 1:
        raise ConfigError("alternative_images=1: an interval needs at least 2 images; 0 measures no other formats")
    if args.lr_scheduler_type == "constant" and args.warmup_ratio not in (0, TrainingArguments.warmup_ratio):
        raise ConfigError(
            f"a constant learning rate has no warmup_ratio={args.warmup_ratio}: use constant_with_warmup"
        )


def model_settings(model_args: ModelArguments) -> dict[str, Any]:
    """What `load_classifier` takes; the token is in the environment, see `hub_token`."""
    return {key: value for key, value in asdict(model_args).items() if key != "token"}


def sources_of(model_args: ModelArguments, data_args: DataArguments) -> dict[str, str | None]:
    """What is only read, by the names of the arguments."""
    return {
        "model_name_or_path": model_args.model_name_or_path,
        "dataset_name": data_source(data_args.dataset_name),
        "train_dir": data_args.train_dir,
        "validation_dir": data_args.validation_dir,
    }


def targets_of(search_args: SearchArguments) -> list[Target]:
    """The targets, in the order of their searches: as given, or with `warm_start` the dearest first; 4 bits if there
    is none. A size is always a cap."""
    given = given_targets(vars(search_args)) or {"bits": [4.0]}
    if len(given) > 1:
        raise ConfigError(f"give one kind of target, not {' and '.join(f'target_{kind}' for kind in given)}")
    ((kind, values),) = given.items()
    targets = [Target(kind, value, search_args.cap or target_kinds()[kind].is_limit) for value in values]
    check_distinct(f"target_{kind}", [target.label for target in targets])  # which names their folders
    if not search_args.warm_start:
        return targets
    if len(targets) == 1:
        raise ConfigError("warm_start needs several targets: with one there is no search before it to start from")
    return sorted(targets, key=lambda target: target.value, reverse=True)


def limits_of(search_args: SearchArguments) -> list[Target]:
    """Costs that are never exceeded, beside the target. Raises: ConfigError: one that is given twice."""
    found = []
    for kind, values in given_targets({"target": search_args.limits}).items():
        check_distinct("limits", [kind] * len(values))
        found.append(Target(kind, values[0], cap=True))
    return found


def search_config(search_args: SearchArguments) -> SearchConfig:
    overrides = search_args.search_overrides
    assert not isinstance(overrides, str), "`parse` makes a dictionary of it"
    return SearchConfig.preset(search_args.preset, **(overrides or {}))


def settled(search_args: SearchArguments) -> SearchArguments:
    """With the formats, the profile and `activation` that follow from these arguments on this machine: what a run
    records, so that it is resumed with the same ones or not at all.

    Raises: ConfigError: no formats, no such profile, or it runs none of them.
    """
    space = search_args.search_space
    try:
        named = space[0] if space and len(space) == 1 else space
        found = choices(named, search_args.hardware, search_args.activation)
    except FormatError as error:
        raise ConfigError(f"search_space: {error}") from error
    formats = space if found.profile is None else [fmt.name for fmt in found.formats]
    return replace(search_args, search_space=formats, hardware=found.hardware, activation=found.activation)


def uniform_formats(search_args: SearchArguments) -> list[str]:
    """Names of `--compare_uniform`, checked. Raises: ConfigError."""
    try:
        return [parse_format(name).name for name in search_args.compare_uniform or ()]
    except FormatError as error:
        raise ConfigError(f"compare_uniform: {error}") from error


def train_config(args: TrainingArguments, steps: int, learning_rate: float | None, quality: str) -> TrainConfig:
    """How `steps` steps are trained; what is not given is as for fp32. Raises: ConfigError: a value out of range."""
    return TrainConfig(
        max_steps=steps,
        batch_size=args.per_device_train_batch_size,
        learning_rate=PLAIN.learning_rate if learning_rate is None else learning_rate,
        weight_decay=args.weight_decay,
        warmup_ratio=args.warmup_ratio,
        warmup_steps=args.warmup_steps,
        schedule=args.lr_scheduler_type,
        max_grad_norm=args.max_grad_norm,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        label_smoothing=args.label_smoothing_factor,
        distill_weight=args.distill or 0.0,
        feature_weight=args.distill_features or 0.0,
        quality=quality,  # type: ignore[arg-type]
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        eval_steps=args.eval_steps,
        keep_best=args.load_best_model_at_end,
        ema_decay=args.ema_decay,
        workers=args.dataloader_num_workers,
        compile_backend=args.torch_compile_backend or (DEFAULT_BACKEND if args.torch_compile else None),
    )


def trackers_of(report_to: str | None) -> list[str]:
    """Names of `--report_to`. Raises: ConfigError: one that accelerate does not have, or that is not installed."""
    names = [name.strip() for name in (report_to or "none").split(",")]
    if names == ["none"]:
        return []
    there = sorted(str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers())
    for name in names:
        if name not in there and name != "all":
            raise ConfigError(
                f"report_to={name!r} is not available: install it, or choose from {', '.join(there) or 'none'}"
            )
    check_distinct("report_to", names)
    return names


def check_run_name(run_name: str | None, trackers: list[str]) -> None:
    """Raises: ConfigError: a name for a run that no tracker shows under it."""
    if run_name is None:
        return
    if not trackers:
        raise ConfigError(f"run_name={run_name!r} is for trackers: name one in report_to")
    if nameless := [name for name in trackers if name not in RUN_NAMES]:
        raise ConfigError(
            f"run_name={run_name!r} cannot be given to {nameless[0]}, which names runs by itself: leave it out, or "
            f"choose report_to from {', '.join(RUN_NAMES)}"
        )


def _check_hub_name(args: TrainingArguments, targets: list[Target]) -> None:
    name = args.hub_model_id or (Path(args.output_dir).resolve().name if args.push_to_hub else None)
    if name is None:
        return
    said = "hub_model_id" if args.hub_model_id else "output_dir, which names the repository: give hub_model_id;"
    try:
        for target in targets:
            validate_repo_id(f"{name}-{target.label}" if len(targets) > 1 else name)
    except HFValidationError as error:
        raise HubError(f"{said} {name!r} is no name of a repository: {' '.join(str(error).split())}") from error
