"""Names of settings as other programs have them, above all Transformers' `TrainingArguments`: what they mean here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fliqs_hf.errors import ConfigError


@dataclass
class ForeignArguments:
    """Other names, as in Transformers' `TrainingArguments`."""

    bf16: bool = field(default=False, metadata={"help": "the same as mixed_precision: bf16"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "the same as resume: true, false, or the path of this run"}
    )


#: name elsewhere -> what to do here
ADVICE = {
    "batch_size": "use per_device_train_batch_size (and per_device_eval_batch_size)",
    "train_batch_size": "use per_device_train_batch_size",
    "eval_batch_size": "use per_device_eval_batch_size",
    "auto_find_batch_size": "set per_device_train_batch_size: one found by trying repeats nothing",
    "lr": "use learning_rate",
    "epochs": "use num_train_epochs",
    "num_epochs": "use num_train_epochs",
    "steps": "use max_steps",
    "num_steps": "use max_steps",
    "train_steps": "use max_steps",
    "num_train_steps": "use max_steps",
    "warmup": "use warmup_ratio or warmup_steps",
    "scheduler": "use lr_scheduler_type",
    "lr_scheduler": "use lr_scheduler_type",
    "lr_scheduler_kwargs": "no schedule has settings but warmup_ratio and warmup_steps: leave it out",
    "model": "use model_name_or_path",
    "model_name": "use model_name_or_path",
    "pretrained": "use model_name_or_path",
    "config_name": "use model_name_or_path, or model_type with config_overrides",
    "tokenizer_name": "images need no tokenizer: leave it out",
    "image_processor_name": "the checkpoint's own image processor is used: leave it out",
    "dataset": "use dataset_name",
    "data_dir": "use train_dir, or dataset_name for a folder of parquet files",
    "test_dir": "use validation_dir",
    "remove_unused_columns": "the columns used are image_column_name and label_column_name: leave it out",
    "fp16": "float16 scales the loss, which a resumed run would not repeat: use mixed_precision: bf16",
    "half_precision_backend": "use mixed_precision",
    "fp16_full_eval": "use mixed_precision: bf16",
    "bf16_full_eval": "use mixed_precision: bf16",
    "eval_strategy": "use eval_steps: 0 evaluates at the end only, N every N steps",
    "evaluation_strategy": "use eval_steps: 0 evaluates at the end only, N every N steps",
    "do_train": "max_steps and finetune_steps say what is trained: leave it out",
    "do_eval": "what is delivered is always evaluated: leave it out; eval_steps evaluates while training",
    "do_predict": "fliqs-hf validate evaluates a finished model: leave it out",
    "eval_on_start": "the fp32 model is always evaluated first: leave it out",
    "save_strategy": "use save_steps: states are always kept for resume, every so many steps",
    "save_total_limit": "only the last state is kept: leave it out",
    "save_safetensors": "nothing else is written: leave it out",
    "save_only_model": "states hold what resume needs, and are removed at the end: leave it out",
    "logging_strategy": "use logging_steps",
    "logging_dir": "use output_dir, where metrics.jsonl and the trackers' files are",
    "metric_for_best_model": "the best is that of the highest top-1: leave it out",
    "greater_is_better": "the best is that of the highest top-1: leave it out",
    "early_stopping_patience": "use load_best_model_at_end with eval_steps",
    "trust_remote_code": "code of a checkpoint is never run: use an architecture that Transformers has",
    "use_auth_token": "use token in a settings file, HF_TOKEN, or hf auth login",
    "hub_token": "use token in a settings file, HF_TOKEN, or hf auth login",
    "hub_strategy": "a run is published when it is finished: use push_to_hub",
    "push_to_hub_model_id": "use hub_model_id",
    "hub_private": "use hub_private_repo",
    "project": "the project is called fliqs in every tracker: use run_name for the run",
    "no_cuda": "use use_cpu",
    "device": "use use_cpu, or CUDA_VISIBLE_DEVICES to choose GPUs",
    "use_cuda": "a GPU is used where there is one: leave it out",
    "local_rank": "accelerate launch sets it: leave it out",
    "data_seed": "use seed",
    "full_determinism": "a run on CPUs always repeats itself: leave it out",
    "optim": "the optimizer is AdamW: leave it out",
    "optimizer": "the optimizer is AdamW: leave it out",
    "label_smoothing": "use label_smoothing_factor",
    "gradient_clip": "use max_grad_norm",
    "clip_grad": "use max_grad_norm",
    "max_norm": "use max_grad_norm",
    "num_workers": "use dataloader_num_workers",
    "grad_accum": "use gradient_accumulation_steps",
    "deepspeed": "name its configuration in that of accelerate: accelerate launch --config_file …",
    "fsdp": "name it in the configuration of accelerate: accelerate launch --config_file …",
    "torch_compile_mode": "the backend's default mode is used: leave it out",
    "bits": "use target_bits",
    "formats": "use search_space",
    "weight_format": "search_space says the formats; one format without a search: fliqs-hf quantize --weight_format",
    "output": "use output_dir",
    "out": "use output_dir",
    "overwrite": "use overwrite_output_dir",
    "num_labels": "the classes are those of the data set: leave it out",
    "ema": "use ema_decay, such as 0.999",
    "distillation": "use distill, such as 0.5",
    "mixup": "use augment: mixup",
    "cutmix": "use augment: cutmix",
}


def advice(name: str) -> str | None:
    """What to do about a setting that only other programs have; None if it is not known from elsewhere."""
    name = name.replace("-", "_")
    if name in ADVICE:
        return ADVICE[name]
    from transformers import TrainingArguments

    if name in {f.name for f in fields(TrainingArguments)}:
        return "Transformers' Trainer has it, this recipe does not: leave it out; --help lists what exists"
    return None


def fold(values: dict[str, Any]) -> None:
    """Turn `ForeignArguments` among the values of all arguments into those that they stand for, in place.

    Raises: ConfigError: they contradict others, or name another run's state.
    """
    bf16, resumed = (values.pop(f.name) for f in fields(ForeignArguments))
    if bf16:
        if values["mixed_precision"] == "no":
            raise ConfigError("bf16=True contradicts mixed_precision='no': leave one of them out")
        values["mixed_precision"] = "bf16"
    if resumed is None:
        return
    word = resumed.strip().lower()
    if word in ("true", "false"):
        values["resume"] = values["resume"] or word == "true"
        return
    run = Path(values["output_dir"]).resolve()
    if Path(resumed).resolve() != run and run not in Path(resumed).resolve().parents:
        raise ConfigError(
            f"resume_from_checkpoint={resumed!r} is not in output_dir={values['output_dir']!r}: a run goes on from "
            "the last state in its own folder"
        )
    values["resume"] = True
