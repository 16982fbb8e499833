"""Find a mixed-precision model: fine-tune in fp32 if wanted, search formats, train for them, evaluate, save.

    python recipes/vit.py recipes/configs/digits.yaml
    accelerate launch recipes/vit.py --model_name_or_path facebook/deit-tiny-patch16-224 --train_dir photos \\
        --finetune_steps 2000 --max_steps 2000 --target_bits 4 --output_dir runs/photos
    python recipes/vit.py recipes/configs/digits.yaml --target_bits 3 4 5      # a Pareto front
    python recipes/vit.py recipes/configs/digits.yaml --resume                 # after Ctrl-C

A YAML file as the first argument sets any of the arguments below; the command line overrides it.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging as hf_logging

from fliqs_hf import quantize
from fliqs_hf.cost import CostTable, LayerInfo, Target, trace_layers, unlisted_bytes
from fliqs_hf.errors import ConfigError, FliqsError
from fliqs_hf.nn import make_searchable, quantizable_layers, restore
from fliqs_hf.search import OneShotSearch, SearchConfig, SearchSpace, Sensitivity, fisher_scores
from fliqs_hf.search.hook import SearchHook
from fliqs_hf.search.run import RunFolder, cost_summary, layer_table, write_front
from fliqs_hf.training import Accuracy, ImageData, Interrupted, TrainConfig, evaluate, load_splits, train
from fliqs_hf.training.arguments import DataArguments, ModelArguments, SearchArguments, TrainingArguments, parse
from fliqs_hf.training.augment import BatchAugment
from fliqs_hf.training.data import held_in_memory, labelled, train_loader
from fliqs_hf.training.models import label_ids, load_classifier
from fliqs_hf.training.state import states
from fliqs_hf.training.stream import StreamData


@dataclass
class Job:
    """What every part of the run needs."""

    args: TrainingArguments
    accelerator: Accelerator
    search: SearchConfig
    settings: dict[str, Any]  # every argument, for config.json
    model: Any
    processor: Any
    train_data: ImageData | StreamData
    eval_data: ImageData
    augment: BatchAugment | None
    metrics: list[str]

    def train_config(self, steps: int, learning_rate: float) -> TrainConfig:
        return TrainConfig(
            max_steps=steps,
            batch_size=self.args.per_device_train_batch_size,
            learning_rate=learning_rate,
            weight_decay=self.args.weight_decay,
            warmup_ratio=self.args.warmup_ratio,
            max_grad_norm=self.args.max_grad_norm,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            label_smoothing=self.args.label_smoothing_factor,
            distill_weight=self.args.distill,
            quality=self.search.quality,
            seed=self.args.seed,
            logging_steps=self.args.logging_steps,
            save_steps=self.args.save_steps,
            eval_steps=self.args.eval_steps,
            keep_best=self.args.load_best_model_at_end,
            ema_decay=self.args.ema_decay,
            workers=self.args.dataloader_num_workers,
        )

    def score(self, model: Any) -> float:
        return self.evaluate(model, "evaluation").top1

    def evaluate(self, model: Any, name: str) -> Accuracy:
        size, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        return evaluate(
            model, self.eval_data, self.accelerator, batch_size=size, workers=workers, name=name, metrics=self.metrics
        )


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args, search_args = parse(sys.argv[1:] if argv is None else argv, __doc__)
    targets = targets_of(search_args)
    job = load(model_args, data_args, training_args, search_args)
    training_args = job.args
    folder = RunFolder(training_args.output_dir)
    layers, space, table = searched(job, search_args, targets)
    if training_args.resume:
        folder.check(job.settings)
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        folder.configure(job.settings, job.search)

    finetune(job, folder)
    fp32 = job.evaluate(job.model, "fp32 evaluation")
    job.accelerator.print(f"fp32 accuracy: {fp32.top1:.2%} of {fp32.n} images")

    sensitivity = measure_sensitivity(job, space) if job.search.prior == "fisher" else None
    original = {name: tensor.detach().clone() for name, tensor in job.model.state_dict().items()}
    results = []
    for target in targets:
        run = folder if len(targets) == 1 else RunFolder(folder.path / f"{target.kind}-{target.value:g}")
        job.model.load_state_dict(original)
        results.append(search_for(job, run, target, layers, space, table, sensitivity, fp32))
        if training_args.push_to_hub and job.accelerator.is_main_process:
            push(training_args, run, target if len(targets) > 1 else None)
    if len(targets) > 1 and job.accelerator.is_main_process:
        print(f"\n{write_front(folder, results, fp32)}")
    job.accelerator.end_training()


def targets_of(search_args: SearchArguments) -> list[Target]:
    """The targets, in the order given; 4 bits if there is none. A size is always a cap."""
    kinds = ("target_bits", "target_bops", "target_size_mb", "target_ratio")
    given = [(kind, values) for kind in kinds if (values := getattr(search_args, kind))]
    if len(given) > 1:
        raise ConfigError(f"give one kind of target, not {' and '.join(kind for kind, _ in given)}")
    kind, values = given[0] if given else ("target_bits", [4.0])
    return [Target.of(**{kind: value}, cap=search_args.cap or kind == "target_size_mb") for value in values]


def load(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, search_args: SearchArguments
) -> Job:
    """Accelerator, data, model and image processor."""
    search = SearchConfig.preset(search_args.preset, **(search_args.search_overrides or {}))
    trackers = args.report_to.split(",") if args.report_to else None
    accelerator = Accelerator(
        cpu=args.use_cpu, mixed_precision=args.mixed_precision, log_with=trackers, project_dir=args.output_dir
    )
    hf_logging.disable_progress_bar()
    if not accelerator.is_main_process:
        hf_logging.set_verbosity_error()
    set_seed(args.seed)
    with accelerator.main_process_first():
        train_split, eval_split = load_splits(
            data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_dir=data_args.train_dir,
            validation_dir=data_args.validation_dir,
            validation_split=data_args.validation_split,
            train_val_split=data_args.train_val_split,
            streaming=data_args.streaming,
            seed=args.seed,
        )
        train_split, eval_split, names = labelled(train_split, eval_split, data_args.label_column_name)
    model, processor = load_classifier(names, **asdict(model_args))
    if args.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    columns = {"image_column": data_args.image_column_name, "label_column": data_args.label_column_name}
    columns["label_ids"] = label_ids(names, model)
    train_data: ImageData | StreamData
    if data_args.streaming:
        train_data = StreamData(train_split, processor, len(names), **columns)
        eval_split = held_in_memory(eval_split, data_args.image_column_name, data_args.max_eval_samples)
    else:
        train_data = image_data(train_split, processor, len(names), data_args.max_train_samples, data_args, columns)
    eval_data = image_data(eval_split, processor, len(names), data_args.max_eval_samples, data_args, columns)
    augment = None
    if data_args.augment:
        mean, std = (getattr(processor, key, None) or [0.5] * 3 for key in ("image_mean", "image_std"))
        augment = BatchAugment(data_args.augment, len(names), mean, std)
    args = replace(args, max_steps=steps_of(args, train_data, accelerator.num_processes))
    parts = (model_args, data_args, args, search_args)
    settings = json.loads(json.dumps({k: v for part in parts for k, v in asdict(part).items()}))
    if trackers:
        accelerator.init_trackers("fliqs", {key: str(value) for key, value in settings.items()})
    model.to(accelerator.device)
    metrics = data_args.metrics or []
    return Job(args, accelerator, search, settings, model, processor, train_data, eval_data, augment, metrics)


def image_data(
    split: Any, processor: Any, num_labels: int, limit: int | None, args: DataArguments, columns: dict[str, Any]
) -> ImageData:
    """All images of a split, or `limit` random ones: a split may be sorted by class."""
    if limit is not None and limit < len(split):
        split = split.shuffle(seed=0).select(range(limit))
    return ImageData(split, processor, num_labels, cache=args.cache_images, **columns)


def steps_of(args: TrainingArguments, data: ImageData | StreamData, processes: int) -> int:
    """Optimizer steps of a search."""
    if args.num_train_epochs is None:
        return args.max_steps if args.max_steps is not None else 1000
    if args.max_steps is not None:
        raise ConfigError(f"give max_steps={args.max_steps} or num_train_epochs={args.num_train_epochs}, not both")
    if isinstance(data, StreamData):
        raise ConfigError("a stream has no known length: give max_steps instead of num_train_epochs")
    batches = max(1, len(data) // (args.per_device_train_batch_size * processes))
    return math.ceil(args.num_train_epochs * batches / args.gradient_accumulation_steps)


def searched(
    job: Job, search_args: SearchArguments, targets: list[Target]
) -> tuple[tuple[LayerInfo, ...], SearchSpace, CostTable]:
    """The layers, the space and its costs. What cannot work, such as a target out of reach, fails before training."""
    job.train_config(job.args.max_steps, job.args.learning_rate)
    wanted = quantizable_layers(job.model, search_args.modules_to_not_convert)
    traced = trace_layers(job.model, job.eval_data[0][0][None].to(job.accelerator.device))
    layers = tuple(layer for layer in traced if layer.name in wanted)
    formats = search_args.search_space
    space = SearchSpace(
        layers, formats[0] if len(formats) == 1 else formats, search_args.activation, search_args.tie or ()
    )
    fixed = unlisted_bytes(job.model, layers) if targets[0].kind == "size_mb" else 0
    table = CostTable(layers, space.formats, targets[0].cost_kind, fixed_cost=fixed)
    for target in targets:
        OneShotSearch(space, table, target, job.search, job.args.max_steps)
    return layers, space, table


def finetune(job: Job, folder: RunFolder) -> None:
    """Train in fp32, if the arguments say so, and keep the result in `fp32/`, which `--resume` starts from."""
    kept, state = folder.path / "fp32", folder.path / "fp32-state"
    if not job.args.finetune_steps:
        return
    if job.args.resume and (kept / "config.json").exists():
        job.model.load_state_dict(AutoModelForImageClassification.from_pretrained(kept).state_dict())
        return
    if not job.args.resume:
        shutil.rmtree(state, ignore_errors=True)
    config = job.train_config(job.args.finetune_steps, job.args.finetune_learning_rate or job.args.learning_rate)
    job.model = train(
        job.model, job.train_data, config, job.accelerator, augment=job.augment, score=job.score, state_folder=state,
        resume=job.args.resume, name="fp32 training",
    )  # fmt: skip
    if job.accelerator.is_main_process:
        with folder.replacing(kept.name) as draft:
            job.model.save_pretrained(draft)
            job.processor.save_pretrained(draft)
        shutil.rmtree(state, ignore_errors=True)
    job.accelerator.wait_for_everyone()


def measure_sensitivity(job: Job, space: SearchSpace) -> Sensitivity:
    """One backward pass per batch over `prior_images` training images; every rank measures the same."""
    batch = job.args.per_device_train_batch_size
    loader = train_loader(
        job.train_data, batch, job.args.seed, 0, -(-job.search.prior_images // batch), 0, 1, 0
    )  # fmt: skip
    bar = tqdm(loader, desc="sensitivity", disable=not job.accelerator.is_local_main_process)
    device = job.accelerator.device
    batches = ((images.to(device), labels.to(device)) for images, labels in bar)
    return fisher_scores(job.model, batches, lambda images: job.model(images).logits, space)


def search_for(
    job: Job,
    run: RunFolder,
    target: Target,
    layers: tuple[LayerInfo, ...],
    space: SearchSpace,
    table: CostTable,
    sensitivity: Sensitivity | None,
    fp32: Accuracy,
) -> dict[str, Any]:
    """One search: policy and weights together, then the final allocation, packed, saved, loaded and evaluated."""
    accelerator, args = job.accelerator, job.args
    if args.resume and (run.path / "results.json").exists():
        accelerator.print(f"{run.path} is finished")
        return run.read("results.json")
    search = OneShotSearch(
        space, table, target, job.search, args.max_steps, seed=args.seed, rank=accelerator.process_index,
        world_size=accelerator.num_processes, device=accelerator.device,
        gather=accelerator.gather if accelerator.num_processes > 1 else None,
    )  # fmt: skip
    if sensitivity is not None:
        search.start_from(sensitivity.decision_scores)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not args.resume:
            run.clear()
        saved = states(run.state)
        run.configure(job.settings, job.search)
        run.begin(layers, space, sensitivity)
        run.forget_after(int(saved[-1].name.removeprefix("step-")) if saved else 0)

    teacher = copy.deepcopy(job.model) if args.distill else None
    fp32_bytes = sum(tensor.numel() * tensor.element_size() for tensor in job.model.state_dict().values())
    other_bytes = unlisted_bytes(job.model, layers)
    groups = {layer.name: layer.input_group for layer in layers}
    switch = make_searchable(job.model, space.formats, names=[layer.name for layer in layers], input_groups=groups)

    def on_log(entry: dict[str, Any]) -> None:
        run.append({**entry, "phase": search.phase(entry["step"] - 1)})
        if args.report_to:
            accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])

    start = time.perf_counter()
    job.model = train(
        job.model, job.train_data, job.train_config(args.max_steps, args.learning_rate), accelerator,
        hook=SearchHook(search, switch, run.policy), augment=job.augment, teacher=teacher, score=job.score,
        state_folder=run.state, resume=args.resume, on_log=on_log, name=f"search for {target.kind} {target.value:g}",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    final = search.finalize()
    restore(job.model)

    if accelerator.is_main_process:
        with run.replacing(run.checkpoint.name) as draft:
            quantize(copy.deepcopy(job.model), final.allocation).save_pretrained(draft)
            job.processor.save_pretrained(draft)
        final.allocation.save(run.path / "allocation.json")
    accelerator.wait_for_everyone()
    packed = AutoModelForImageClassification.from_pretrained(run.checkpoint).to(accelerator.device)
    accuracy = job.evaluate(packed, "searched evaluation")
    result = {
        "target": {target.kind: target.value, "cost": search.target_cost, "cap": target.cap},
        "cost": {**cost_summary(layers, final.allocation, other_bytes), "target_ratio": final.cost_ratio},
        "accuracy": {"fp32": fp32.to_dict(), "searched": accuracy.to_dict()},
        "checkpoint_bytes": sum(file.stat().st_size for file in run.checkpoint.glob("*.safetensors")),
        "fp32_bytes": fp32_bytes,
        "seconds": seconds,
        "repaired": final.repaired,
        "argmax_cost_ratio": final.argmax_cost_ratio,
    }
    if accelerator.is_main_process:
        run.write("results.json", result)
        shutil.rmtree(run.state, ignore_errors=True)
        print(f"\n{layer_table(layers, final.allocation)}\n\n{summary(result)}\nrun folder      {run.path}")
    accelerator.wait_for_everyone()
    return result


def summary(result: dict[str, Any]) -> str:
    """Cost, size and accuracy, before and after."""
    cost, fp32, searched_ = result["cost"], result["accuracy"]["fp32"], result["accuracy"]["searched"]
    lines = [
        f"bit operations  {cost['fp32_bops'] / 1e9:9.3f} G fp32  -> {cost['bops'] / 1e9:9.3f} G  "
        f"({cost['target_ratio']:.1%} of the target)",
        f"checkpoint      {result['fp32_bytes'] / 1e6:9.3f} MB fp32 -> "
        f"{result['checkpoint_bytes'] / 1e6:9.3f} MB on disk",
        f"accuracy        {fp32['top1']:9.2%} fp32    -> {searched_['top1']:9.2%} searched  ({searched_['n']} images)",
    ]
    if result["repaired"]:
        lines.insert(
            0,
            f"The policy's arg-max costs {result['argmax_cost_ratio']:.3f} of the target; the integer program over "
            "its log-probabilities chose this allocation instead.\n",
        )
    return "\n".join(lines)


def push(args: TrainingArguments, run: RunFolder, target: Target | None) -> None:
    """Publish the run: packed weights, card, allocation, history."""
    from fliqs_hf.hf.hub import push as push_run

    name = args.hub_model_id or run.path.resolve().name
    print(f"published at {push_run(run.path, f'{name}-{target.kind}-{target.value:g}' if target else name)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\n{stop if isinstance(stop, Interrupted) else 'stopped; add --resume to go on'}", file=sys.stderr)
        sys.exit(130)
    except FliqsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
