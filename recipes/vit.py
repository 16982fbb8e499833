"""Find a mixed-precision model: fine-tune in fp32 if wanted, search formats, train for them, evaluate, save.

    python recipes/vit.py recipes/configs/digits.yaml
    accelerate launch recipes/vit.py --model_name_or_path facebook/deit-tiny-patch16-224 --train_dir photos \\
        --finetune_steps 2000 --max_steps 2000 --target_bits 4 --output_dir runs/photos
    python recipes/vit.py recipes/configs/digits.yaml --target_bits 3 4 5      # a Pareto front
    python recipes/vit.py recipes/configs/digits.yaml --resume                 # after Ctrl-C

A YAML file as the first argument sets any of the arguments below; the command line overrides it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForImageClassification, HfArgumentParser
from transformers.utils import logging as hf_logging

from fliqs_hf import quantize
from fliqs_hf.cost import CostTable, Target, trace_layers, unlisted_bytes
from fliqs_hf.errors import ConfigError, FliqsError
from fliqs_hf.nn import make_searchable, quantizable_layers, restore
from fliqs_hf.search import OneShotSearch, SearchConfig, SearchSpace, fisher_scores
from fliqs_hf.search.hook import SearchHook
from fliqs_hf.search.run import RunFolder, cost_summary, layer_table
from fliqs_hf.training import ImageData, Interrupted, TrainConfig, evaluate, load_splits, train
from fliqs_hf.training.augment import BatchAugment
from fliqs_hf.training.data import train_loader
from fliqs_hf.training.models import load_classifier
from fliqs_hf.training.state import states


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
    train_val_split: float = field(default=0.15, metadata={"help": "share held out where there is no validation split"})
    image_column_name: str = "image"
    label_column_name: str = "label"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    cache_images: bool = field(default=False, metadata={"help": "keep processed images in memory (small data sets)"})
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
    modules_to_not_convert: list[str] | None = field(default=None, metadata={"help": "layers to leave in fp32: patterns"})
    tie: list[str] | None = field(default=None, metadata={"help": "share decisions: qkv, block, model or patterns"})
    target_bits: list[float] | None = field(default=None, metadata={"help": "BOPs of the uniform model of so many bits"})
    target_bops: list[float] | None = None
    target_size_mb: list[float] | None = field(default=None, metadata={"help": "size of the checkpoint, 10^6 bytes"})
    target_ratio: list[float] | None = field(default=None, metadata={"help": "BOPs over those of fp32"})
    cap: bool = field(default=False, metadata={"help": "the target is a limit, never exceeded"})
    preset: str = field(default="default", metadata={"help": "default, or paper for FLIQS as published"})
    search_overrides: dict | str | None = field(default=None, metadata={"help": "settings of SearchConfig that differ"})


Arguments = (ModelArguments, DataArguments, TrainingArguments, SearchArguments)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments, SearchArguments]:
    """Arguments from an optional YAML file and the command line. Raises: ConfigError: an unknown key."""
    parser = HfArgumentParser(Arguments, description=__doc__, prog="recipes/vit.py")
    if argv and argv[0].endswith((".yaml", ".yml")):
        settings = yaml.safe_load(Path(argv[0]).read_text()) or {}
        known = [f.name for cls in Arguments for f in fields(cls)]
        for key in settings:
            if key not in known:
                close = get_close_matches(key, known, 1)
                raise ConfigError(f"{argv[0]}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        parser.set_defaults(**settings)
        argv = argv[1:]
    arguments = parser.parse_args_into_dataclasses(argv)
    for instance in arguments:
        for f in fields(instance):
            if f.name in ("config_overrides", "search_overrides") and isinstance(getattr(instance, f.name), str):
                setattr(instance, f.name, yaml.safe_load(getattr(instance, f.name)))
    return arguments


def targets_of(search_args: SearchArguments) -> list[Target]:
    kinds = ("target_bits", "target_bops", "target_size_mb", "target_ratio")
    given = [(kind, values) for kind in kinds if (values := getattr(search_args, kind))]
    if len(given) > 1:
        raise ConfigError(f"give one kind of target, not {' and '.join(kind for kind, _ in given)}")
    kind, values = given[0] if given else ("target_bits", [4.0])
    return [Target.of(**{kind: value}, cap=search_args.cap or kind == "target_size_mb") for value in values]


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args, search_args = parse(sys.argv[1:] if argv is None else argv)
    targets = targets_of(search_args)
    search_config = SearchConfig.preset(search_args.preset, **(search_args.search_overrides or {}))
    folder = RunFolder(training_args.output_dir)
    accelerator = Accelerator(
        cpu=training_args.use_cpu,
        mixed_precision=training_args.mixed_precision,
        log_with=training_args.report_to.split(",") if training_args.report_to else None,
        project_dir=str(folder.path),
    )
    if not accelerator.is_main_process:
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    set_seed(training_args.seed)
    settings = {key: value for args in (model_args, data_args, training_args, search_args) for key, value in asdict(args).items()}
    if training_args.report_to:
        accelerator.init_trackers("fliqs", {key: str(value) for key, value in settings.items()})

    # Data and model
    with accelerator.main_process_first():
        train_split, eval_split = load_splits(
            data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_dir=data_args.train_dir,
            validation_dir=data_args.validation_dir,
            validation_split=data_args.validation_split,
            train_val_split=data_args.train_val_split,
            seed=training_args.seed,
        )
    feature = train_split.features.get(data_args.label_column_name)
    names = getattr(feature, "names", None) or sorted({str(label) for label in train_split[data_args.label_column_name]})
    model, processor = load_classifier(names, **asdict(model_args))
    columns = {"image_column": data_args.image_column_name, "label_column": data_args.label_column_name}
    caching = {"cache": data_args.cache_images}
    train_data = ImageData(train_split, processor, len(names), max_samples=data_args.max_train_samples, **columns, **caching)
    eval_data = ImageData(eval_split, processor, len(names), max_samples=data_args.max_eval_samples, **columns, **caching)
    sample = train_data[0][0]
    if training_args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    augment = None
    if data_args.augment:
        mean, std = (getattr(processor, key, None) or [0.5] * 3 for key in ("image_mean", "image_std"))
        augment = BatchAugment(data_args.augment, len(names), mean, std)

    # fp32
    def settings_of(steps: int, learning_rate: float, seed: int) -> TrainConfig:
        return TrainConfig(
            max_steps=steps,
            batch_size=training_args.per_device_train_batch_size,
            learning_rate=learning_rate,
            weight_decay=training_args.weight_decay,
            warmup_ratio=training_args.warmup_ratio,
            max_grad_norm=training_args.max_grad_norm,
            gradient_accumulation_steps=training_args.gradient_accumulation_steps,
            label_smoothing=training_args.label_smoothing_factor,
            distill_weight=training_args.distill,
            quality=search_config.quality,
            seed=seed,
            logging_steps=training_args.logging_steps,
            save_steps=training_args.save_steps,
            workers=training_args.dataloader_num_workers,
        )

    model.to(accelerator.device)
    fp32_folder = folder.path / "fp32"
    if training_args.finetune_steps and not (training_args.resume and (fp32_folder / "config.json").exists()):
        rate = training_args.finetune_learning_rate or training_args.learning_rate
        finetuning = settings_of(training_args.finetune_steps, rate, training_args.seed)
        state = folder.path / "fp32-state"
        if not training_args.resume:
            shutil.rmtree(state, ignore_errors=True)
        model = train(
            model, train_data, finetuning, accelerator, augment=augment, state_folder=state,
            resume=training_args.resume, name="fp32 training",
        )  # fmt: skip
        if accelerator.is_main_process:
            model.save_pretrained(f"{fp32_folder}.tmp")
            processor.save_pretrained(f"{fp32_folder}.tmp")
            shutil.rmtree(fp32_folder, ignore_errors=True)
            os.replace(f"{fp32_folder}.tmp", fp32_folder)
            shutil.rmtree(state, ignore_errors=True)
        accelerator.wait_for_everyone()
    elif training_args.finetune_steps:
        restored = AutoModelForImageClassification.from_pretrained(fp32_folder)
        model.load_state_dict(restored.state_dict())
    evaluation = {"batch_size": training_args.per_device_eval_batch_size, "workers": training_args.dataloader_num_workers}
    fp32 = evaluate(model, eval_data, accelerator, **evaluation, name="fp32 evaluation")
    accelerator.print(f"fp32 accuracy: {fp32.top1:.2%} of {fp32.n} images")

    # What is searched, and what it costs
    candidates = quantizable_layers(model, search_args.modules_to_not_convert)
    layers = trace_layers(model, sample[None].to(accelerator.device), names=None)
    layers = tuple(layer for layer in layers if layer.name in candidates)
    space = SearchSpace(layers, search_args.search_space[0] if len(search_args.search_space) == 1 else search_args.search_space,
                        search_args.activation, search_args.tie or ())  # fmt: skip
    original = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    other_bytes = unlisted_bytes(model, layers)
    table = CostTable(layers, space.formats, targets[0].cost_kind, fixed_cost=other_bytes if targets[0].kind == "size_mb" else 0)
    for target in targets:
        OneShotSearch(space, table, target, search_config, training_args.max_steps)  # a target out of reach fails now

    # Sensitivity prior: one pass, shared by all targets
    scores, prior_seconds = None, 0.0
    if search_config.prior == "fisher":
        start = time.perf_counter()
        count = -(-search_config.prior_images // training_args.per_device_train_batch_size)
        loader = train_loader(train_data, training_args.per_device_train_batch_size, training_args.seed, 0, count, 0, 1, 0)
        from tqdm.auto import tqdm

        bar = tqdm(loader, desc="sensitivity", disable=not accelerator.is_local_main_process)
        batches = ((images.to(accelerator.device), labels.to(accelerator.device)) for images, labels in bar)
        sensitivity = fisher_scores(model, batches, lambda images: model(images).logits, space)
        scores, prior_seconds = sensitivity.decision_scores, time.perf_counter() - start

    results = []
    for target in targets:
        run = folder if len(targets) == 1 else RunFolder(folder.path / f"{target.kind}-{target.value:g}")
        model.load_state_dict(original)
        teacher = None
        if training_args.distill:
            import copy

            teacher = copy.deepcopy(model)
        if accelerator.is_main_process:
            run.write_config({**settings, "search": asdict(search_config), f"target_{target.kind}": target.value})
            run.write_layers(layers)
            run.write("search_space.json", space.to_dict())
            if scores is not None:
                by_name = {d.name: [round(v, 8) for v in row] for d, row in zip(space.decisions, scores.tolist(), strict=True)}
                run.write("sensitivity.json", {"method": "fisher", "images": sensitivity.images, "seconds": prior_seconds, "scores": by_name})
        search = OneShotSearch(
            space, table, target, search_config, training_args.max_steps, seed=training_args.seed,
            rank=accelerator.process_index, world_size=accelerator.num_processes, device=accelerator.device,
            gather=accelerator.gather if accelerator.num_processes > 1 else None,
        )  # fmt: skip
        if scores is not None:
            search.start_from(scores)
        groups = {layer.name: layer.input_group for layer in layers}
        switch = make_searchable(model, space.formats, names=[layer.name for layer in layers], input_groups=groups)
        if not training_args.resume:
            shutil.rmtree(run.state, ignore_errors=True)
        saved = states(run.state) if training_args.resume else []
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run.forget_after(int(saved[-1].name.removeprefix("step-")) if saved else 0)

        def on_log(entry: dict[str, Any], run: RunFolder = run, search: OneShotSearch = search) -> None:
            run.append({**entry, "phase": search.phase(entry["step"] - 1)})
            if training_args.report_to:
                accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])

        start = time.perf_counter()
        model = train(
            model, train_data, settings_of(training_args.max_steps, training_args.learning_rate, training_args.seed),
            accelerator, hook=SearchHook(search, switch, run.policy if accelerator.is_main_process else None), augment=augment,
            teacher=teacher, state_folder=run.state, resume=training_args.resume, on_log=on_log,
            name=f"search for {target.kind} {target.value:g}",
        )  # fmt: skip
        seconds = time.perf_counter() - start
        final = search.finalize()
        restore(model)

        # Pack, save, and evaluate what was saved
        import copy

        packed = quantize(copy.deepcopy(model), final.allocation)
        if accelerator.is_main_process:
            packed.save_pretrained(run.checkpoint)
            processor.save_pretrained(run.checkpoint)
            final.allocation.save(run.path / "allocation.json")
        accelerator.wait_for_everyone()
        loaded = AutoModelForImageClassification.from_pretrained(run.checkpoint).to(accelerator.device)
        searched = evaluate(loaded, eval_data, accelerator, **evaluation, name="searched evaluation")
        if accelerator.is_main_process:
            size = sum(file.stat().st_size for file in run.checkpoint.glob("*.safetensors"))
            fp32_size = sum(t.numel() * t.element_size() for t in original.values())
            cost = cost_summary(layers, final.allocation, other_bytes)
            result = {
                "target": {target.kind: target.value, "cost": search.target_cost},
                "cost": {**cost, "target_ratio": final.cost_ratio},
                "accuracy": {"fp32": fp32.to_dict(), "searched": searched.to_dict()},
                "checkpoint_bytes": size,
                "seconds": seconds,
                "sensitivity_seconds": prior_seconds,
                "repaired": final.repaired,
                "argmax_cost_ratio": final.argmax_cost_ratio,
            }
            run.write("results.json", result)
            results.append((run, target, final, result))
            print(f"\n{layer_table(layers, final.allocation)}\n")
            if final.repaired:
                print(f"The policy's arg-max costs {final.argmax_cost_ratio:.3f} of the target; the integer program over its "
                      f"log-probabilities chose this allocation instead, at {final.cost_ratio:.3f}.")  # fmt: skip
            print(f"bit operations  {cost['fp32_bops'] / 1e9:9.3f} G fp32  -> {cost['bops'] / 1e9:9.3f} G  ({final.cost_ratio:.1%} of the target)")
            print(f"checkpoint      {fp32_size / 1e6:9.3f} MB fp32 -> {size / 1e6:9.3f} MB on disk")
            print(f"accuracy        {fp32.top1:9.2%} fp32    -> {searched.top1:9.2%} searched  ({searched.n} images)")
            print(f"run folder      {run.path}")
        shutil.rmtree(run.state, ignore_errors=True)
        accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(130)
    except FliqsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
