"""Arguments of the recipes: dataclasses for `HfArgumentParser`, filled from a YAML file and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from fliqs_hf.errors import ConfigError


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "fp32 checkpoint: a Hub id or a folder"})
    model_type: str | None = field(default=None, metadata={"help": "train this architecture from scratch, e.g. vit"})
    config_overrides: dict | str | None = field(default=None, metadata={"help": "its settings, e.g. hidden_size: 64"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: the checkpoint's"})


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local folder, or 'digits' (no network)"})
    dataset_config_name: str | None = None
    train_dir: str | None = field(default=None, metadata={"help": "image folder, one sub-folder per class"})
    validation_dir: str | None = None
    validation_split: str | None = None
    train_val_split: float = field(
        default=0.15, metadata={"help": "share held out where there is no validation split"}
    )
    image_column_name: str = "image"
    label_column_name: str = "label"
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
    max_steps: int = field(default=1000, metadata={"help": "steps of each search, both phases"})
    finetune_steps: int = field(default=0, metadata={"help": "fp32 steps beforehand, for a new data set or model"})
    learning_rate: float = 1e-4
    finetune_learning_rate: float | None = field(default=None, metadata={"help": "default: learning_rate"})
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16; default: accelerate's"})
    label_smoothing_factor: float = 0.0
    distill: float = field(default=0.0, metadata={"help": "share of the loss that imitates the fp32 model, 0 to 1"})
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    report_to: str | None = field(default=None, metadata={"help": "trackio, tensorboard, wandb: comma-separated"})
    seed: int = 0
    use_cpu: bool = False
    resume: bool = field(default=False, metadata={"help": "go on after an interruption, to the same result"})
    push_to_hub: bool = False
    hub_model_id: str | None = None


@dataclass
class SearchArguments:
    """What is searched, and for what target."""

    search_space: list[str] = field(
        default_factory=lambda: ["mixed"],
        metadata={"help": "formats, or one of fliqs-s-int fliqs-s-fp fliqs-l-int fliqs-l-fp mixed"},
    )
    activation: str = field(default="same", metadata={"help": "same or separate formats for weights and activations"})
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "layers to leave in fp32: patterns"}
    )
    tie: list[str] | None = field(default=None, metadata={"help": "share decisions: qkv, block, model or patterns"})
    target_bits: list[float] | None = field(
        default=None, metadata={"help": "BOPs of the uniform model of so many bits"}
    )
    target_bops: list[float] | None = None
    target_size_mb: list[float] | None = field(default=None, metadata={"help": "size of the checkpoint, 10^6 bytes"})
    target_ratio: list[float] | None = field(default=None, metadata={"help": "BOPs over those of fp32"})
    cap: bool = field(default=False, metadata={"help": "the target is a limit, never exceeded"})
    preset: str = field(default="default", metadata={"help": "default, or paper for FLIQS as published"})
    search_overrides: dict | str | None = field(
        default=None, metadata={"help": "settings of SearchConfig that differ"}
    )


ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments, SearchArguments)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the examples as they are written."""


def parse(
    argv: list[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments, SearchArguments]:
    """Arguments from an optional YAML file, given first, and the command line, which overrides it.

    Raises: ConfigError: the file cannot be read, or has a key that does not exist (with the nearest one that does).
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(ARGUMENTS, description=description, formatter_class=_Help)
    if argv and argv[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**_settings(argv[0]))
        argv = argv[1:]
    arguments = parser.parse_args_into_dataclasses(argv)
    for instance in arguments:
        for name in ("config_overrides", "search_overrides"):
            if isinstance(getattr(instance, name, None), str):
                setattr(instance, name, yaml.safe_load(getattr(instance, name)))
    return arguments


def _settings(file: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the settings {file!r}: {error}") from error
    known = [f.name for cls in ARGUMENTS for f in fields(cls)]
    for key in settings:
        if key not in known:
            close = get_close_matches(key, known, 1)
            raise ConfigError(f"{file}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return dict(settings)
