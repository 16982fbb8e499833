"""Arguments of the recipes: dataclasses for `HfArgumentParser`, filled from a YAML file and the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from fliqs_hf.errors import ConfigError, did_you_mean
from fliqs_hf.limits import check_values
from fliqs_hf.training.foreign import ForeignArguments, advice, fold
from fliqs_hf.training.hints import as_type
from fliqs_hf.training.schedule import Schedule
from fliqs_hf.training.splits import TRAIN_VAL_SPLIT


@dataclass
class ModelArguments:
    """Which model."""

    task: str = field(
        default="image-classification", metadata={"help": "what the model does, as pipelines of Transformers name it"}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "fp32 checkpoint: a Hub id or a folder"})
    model_revision: str | None = field(default=None, metadata={"help": "its branch, tag or commit on the Hub"})
    model_type: str | None = field(default=None, metadata={"help": "train this architecture from scratch, e.g. vit"})
    config_overrides: dict | str | None = field(default=None, metadata={"help": "its settings, e.g. hidden_size: 64"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: the checkpoint's"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads of models and data are kept"})
    token: str | None = field(
        default=None, repr=False, metadata={"help": "of the Hub; in a settings file only, and never recorded"}
    )


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local folder, or 'digits' (no network)"})
    dataset_config_name: str | None = None
    streaming: bool = field(default=False, metadata={"help": "read training images as they come, nothing is stored"})
    train_dir: str | None = field(default=None, metadata={"help": "image folder, one sub-folder per class"})
    validation_dir: str | None = None
    validation_split: str | None = None
    train_val_split: float = field(
        default=TRAIN_VAL_SPLIT, metadata={"help": "share held out where there is no validation split"}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "default: the task's, such as image"})
    label_column_name: str | None = field(default=None, metadata={"help": "default: the task's, such as label"})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    cache_images: bool = field(default=False, metadata={"help": "keep processed images in memory (small data sets)"})
    metrics: list[str] | None = field(
        default=None, metadata={"help": "of the evaluate library, beside top-1 and top-5"}
    )
    augment: list[str] | None = field(default=None, metadata={"help": "flip crop randaugment mixup cutmix"})


@dataclass
class TrainingArguments:
    """How weights are trained. The same settings serve fp32 fine-tuning and the search."""

    output_dir: str = "runs/vit"
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace what an earlier run left there"})
    max_steps: int | None = field(default=None, metadata={"help": "steps of each search, both phases; default: 1000"})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "length of each search instead of max_steps"}
    )
    finetune_steps: int = field(default=0, metadata={"help": "fp32 steps beforehand, for a new data set or model"})
    recipe: Literal["auto", "none"] = field(
        default="auto",
        metadata={
            "help": "what learning_rate, distill, distill_features and activation_granularity are where they are not "
            "given: auto, what was best for a target of so many bits (docs/recipe.md); none, as for fp32"
        },
    )
    learning_rate: float | None = field(default=None, metadata={"help": "of each search; default: by recipe"})
    finetune_learning_rate: float | None = field(
        default=None, metadata={"help": "of the fp32 steps; default: learning_rate, or 1e-4"}
    )
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    warmup_steps: int | None = field(default=None, metadata={"help": "of each training, instead of warmup_ratio"})
    lr_scheduler_type: Schedule = field(default="cosine", metadata={"help": "after the warm-up; constant has none"})
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] | None = field(default=None, metadata={"help": "default: accelerate's"})
    batchnorm_images: int = field(
        default=2048, metadata={"help": "training images for the final statistics of batch norms; 0: running averages"}
    )
    fold_batchnorm: bool = field(
        default=True, metadata={"help": "deliver convolutions that have taken in the batch norms behind them"}
    )
    torch_compile: bool = field(default=False, metadata={"help": "compile training steps, where a compiler is there"})
    torch_compile_backend: str | None = field(default=None, metadata={"help": "compile with it; default: inductor"})
    ema_decay: float = field(default=0.0, metadata={"help": "deliver a moving average of the weights, e.g. 0.999"})
    label_smoothing_factor: float = 0.0
    distill: float | None = field(
        default=None, metadata={"help": "share of the loss that imitates the fp32 model, 0 to 1; default: by recipe"}
    )
    distill_features: float | None = field(
        default=None,
        metadata={
            "help": "weight of what the outputs of blocks miss of the fp32 model's, added to the loss; default: by "
            "recipe"
        },
    )
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    eval_steps: int = field(default=0, metadata={"help": "evaluate as often while training; 0: only at the end"})
    alternative_images: int | None = field(
        default=None,
        metadata={
            "help": "held-out images on which the report's other formats of each layer are measured; 0: none; "
            "default: as many as about a minute allows, 16 to 4096"
        },
    )
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "deliver the best weights of those evaluations, not the last"}
    )
    report_to: str | None = field(
        default=None, metadata={"help": "trackio, tensorboard, wandb and what accelerate has more: comma-separated"}
    )
    run_name: str | None = field(default=None, metadata={"help": "of the run in those trackers"})
    seed: int = 0
    use_cpu: bool = False
    resume: bool = field(default=False, metadata={"help": "go on after an interruption, to the same result"})
    push_to_hub: bool = False
    hub_model_id: str | None = field(default=None, metadata={"help": "default: the name of output_dir"})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "of a new one; default: as your account says"}
    )


@dataclass
class SearchArguments:
    """What is searched, and for what target."""

    hardware: str | None = field(
        default=None,
        metadata={
            "help": "choose among formats that this runs: a profile, auto (this machine; default where no formats are "
            "named), or a .yaml file"
        },
    )
    search_space: list[str] | None = field(
        default=None,
        metadata={
            "help": "formats, or one of fliqs-s-int fliqs-s-fp fliqs-l-int fliqs-l-fp mixed; default: what some "
            "hardware multiplies as it is and `hardware` runs"
        },
    )
    activation: Literal["same", "separate"] | None = field(
        default=None,
        metadata={
            "help": "formats of weights and activations: the same (default with formats that are named), or decided "
            "apart (default where the hardware runs every pair)"
        },
    )
    activation_granularity: Literal["per_token", "per_token_clipped"] | None = field(
        default=None,
        metadata={
            "help": "scale of a layer's input: of each token, or that times a learned factor per layer; default: by "
            "recipe"
        },
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "layers to leave in fp32: patterns"}
    )
    tie: list[str] | None = field(default=None, metadata={"help": "share decisions: qkv, block, model or patterns"})
    target_bits: list[float] | None = field(
        default=None, metadata={"help": "BOPs of the uniform model of so many bits"}
    )
    target_bops: list[float] | None = None
    target_size_mb: list[float] | None = field(
        default=None, metadata={"help": "most that the checkpoint's file may have, 10^6 bytes"}
    )
    target_memory_mb: list[float] | None = field(
        default=None,
        metadata={
            "help": "most for weights with the largest input and output of a layer, 10^6 bytes; see docs/cost.md"
        },
    )
    target_ratio: list[float] | None = field(default=None, metadata={"help": "BOPs over those of fp32"})
    target_energy_uj: list[float] | None = field(
        default=None, metadata={"help": "most energy per image in microjoules, see docs/cost.md"}
    )
    target_latency_ms: list[float] | None = field(
        default=None, metadata={"help": "most time by `latency_table`, in its unit"}
    )
    latency_table: str | None = field(
        default=None, metadata={"help": "times of layers on your device, as fliqs-hf profile writes them"}
    )
    target: list[str] | None = field(
        default=None, metadata={"help": "or NAME=VALUE: any of these, or a cost that is registered"}
    )
    limits: list[str] | None = field(
        default=None, metadata={"help": "NAME=VALUE: other costs, named as targets, that are never exceeded either"}
    )
    require: list[str] | None = field(
        default=None, metadata={"help": "PATTERN=FORMAT: what matching layers may have, e.g. classifier=int8,e4m3"}
    )
    min_bits: list[str] | None = field(
        default=None, metadata={"help": "PATTERN=BITS: what matching layers must have at least, e.g. *embed*=6"}
    )
    cap: bool = field(default=False, metadata={"help": "the target is a limit, never exceeded"})
    warm_start: bool = field(
        default=False,
        metadata={"help": "several targets: the dearest first, each search from the weights of the one before"},
    )
    max_drop: float | None = field(
        default=None,
        metadata={
            "help": "floor: points of top-1 against fp32 that may be lost on the evaluation images, at `confidence`; "
            "precision is raised above a two-sided target, and trained on, until it holds, else exit status 1"
        },
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "floor: least top-1, such as 0.78"})
    confidence: float = field(default=0.95, metadata={"help": "of the floor"})
    preset: str = field(default="default", metadata={"help": "default, or paper for FLIQS as published"})
    search_overrides: dict | str | None = field(
        default=None, metadata={"help": "settings of SearchConfig that differ"}
    )
    compare_uniform: list[str] | None = field(
        default=None, metadata={"help": "also train these uniform formats for as many steps, e.g. int4 e2m1"}
    )


ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments, SearchArguments)
FILES = (".yaml", ".yml", ".json")
#: Settings that come with the package, by name: `fliqs-hf search digits`.
PACKAGED = {file.stem: file for file in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}
_ALL = (*ARGUMENTS, ForeignArguments)
_NAMES = tuple(f.name for cls in ARGUMENTS for f in fields(cls))


class _Parser(HfArgumentParser):
    """Names the argument that exists where one does not; accepts no abbreviations, which a typo could be."""

    def __init__(self, description: str | None) -> None:
        super().__init__(_ALL, description=description, formatter_class=_Help, allow_abbrev=False)
        self.add_argument(
            "--config",
            help="a YAML or JSON file of these arguments, or one that comes with the package: "
            f"{', '.join(PACKAGED)}; also as the first argument",
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}; --help lists the arguments")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the examples as they are written."""


def parse(
    argv: list[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments, SearchArguments]:
    """Arguments from an optional YAML or JSON file and the command line, which overrides it.

    Args:
        argv: the file, or the name of one of `PACKAGED`, is its first element or follows `--config`.
    Raises: ConfigError: the file cannot be read, or a key or argument does not exist (with the one that is meant), has
        a value of the wrong type, or one outside `fliqs_hf.limits`.
    """
    parser = _Parser(description)
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        parser.set_defaults(**_settings(known.config))
    space, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        raise ConfigError(f"unknown argument {argument!r}{_nearest(argument.lstrip('-').partition('=')[0])}")
    if any(argument.partition("=")[0] == "--token" for argument in argv):
        raise ConfigError(
            "--token would be seen by every user of the machine: use token in a settings file, HF_TOKEN, or hf auth "
            "login"
        )
    values = vars(space)
    fold(values)
    for name in ("config_overrides", "search_overrides"):
        values[name] = _mapping(name, values[name])
    check_values({name: values[name] for name in _NAMES})
    arguments = [cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in ARGUMENTS]
    return tuple(arguments)  # type: ignore[return-value]


def _settings(file: str) -> dict[str, Any]:
    """The settings of a file, checked by name and by type."""
    if not file.endswith(FILES):
        if file not in PACKAGED:
            raise ConfigError(
                f"{file!r} is neither a file of settings ({', '.join(FILES)}) nor the name of one that comes with "
                f"fliqs_hf ({', '.join(PACKAGED)})"
            )
        file = str(PACKAGED[file])
    try:
        settings = _yaml(Path(file).read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the settings {file!r}: {error}") from error
    if settings is None:
        raise ConfigError(f"{file}: the file holds no settings; they are 'key: value' lines")
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: settings are 'key: value' lines, not a {type(settings).__name__}")
    for key in settings:
        if key not in (*_NAMES, *(f.name for f in fields(ForeignArguments))):
            raise ConfigError(f"{file}: unknown key {key!r}{_nearest(str(key))}")
    return typed(settings, f"{file}: ")


def typed(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values of arguments by name, as their types have them: "1e-4" is a number, one value is a list of one.

    Args: prefix: of names in messages.
    Raises: ConfigError: a value that is none of its argument.
    """
    types = {f.name: t for cls in _ALL for f in fields(cls) for t in [get_type_hints(cls)[f.name]]}
    return {key: as_type(f"{prefix}{key}", value, types[key]) for key, value in settings.items()}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own would drop one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the key {key!r} is there twice")
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    """Raises: ValueError: no YAML, or a key twice."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _mapping(name: str, value: Any) -> dict[str, Any] | None:
    """Settings of `config_overrides` or `search_overrides`: what JSON can hold, as settings.json is to record them."""
    if isinstance(value, str):
        try:
            value = _yaml(value)
        except ValueError as error:
            raise ConfigError(f"{name}={value!r} is no YAML: {error}") from error
    if not isinstance(value, dict | None) or not all(isinstance(key, str) for key in value or ()):
        raise ConfigError(f'{name}={value!r} must be settings, such as "{{key: value}}"')
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}={value!r} holds what JSON cannot: {error}") from error
    return value


def _nearest(key: str) -> str:
    if (known := advice(key)) is not None:
        return f"; {known}"
    return did_you_mean(key, _NAMES, "--help lists what exists")
