"""The main job: fine-tune in fp32 if wanted, search formats, train for them, evaluate, save, report, publish."""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForImageClassification

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import CostTable, LayerInfo, Target, trace_layers, unlisted_bytes
from fliqs_hf.errors import ConfigError, FliqsError, FormatError
from fliqs_hf.formats import parse as parse_format
from fliqs_hf.hf import FLIQSConfig, quantize
from fliqs_hf.nn import make_searchable, quantizable_layers, restore
from fliqs_hf.pipeline.job import Job, load, targets_of
from fliqs_hf.pipeline.prior import Prior
from fliqs_hf.search import OneShotSearch, SearchSpace
from fliqs_hf.search.hook import FixedFormats, SearchHook
from fliqs_hf.search.run import RunFolder, cost_summary, layer_table, write_front
from fliqs_hf.training import Accuracy, Interrupted, train
from fliqs_hf.training.arguments import SearchArguments, TrainingArguments, parse
from fliqs_hf.training.state import states


@dataclass(frozen=True)
class Start:
    """What the searches for all targets start from.

    Attributes:
        original: the fp32 weights. fp32: their accuracy.
        other_bytes, fp32_bytes: of the checkpoint, beside the layers' weights, and of the whole in fp32.
        prior: sensitivity scores.
        uniform: formats of the uniform models to train for comparison.
    """

    layers: tuple[LayerInfo, ...]
    space: SearchSpace
    table: CostTable
    original: dict[str, Tensor]
    fp32: Accuracy
    prior: Prior
    other_bytes: int
    fp32_bytes: int
    uniform: list[str]


def main(argv: list[str] | None = None, description: str | None = None) -> list[dict[str, Any]]:
    """Parse and run.

    Returns: `results.json` of every target, with its `run` folder.
    Raises: FliqsError: anything that is wrong with arguments, data, model or run folder.
    """
    parts = parse(sys.argv[1:] if argv is None else argv, description or __doc__)
    targets, uniform = targets_of(parts[3]), uniform_formats(parts[3])
    job = load(*parts)
    folder = RunFolder(job.args.output_dir)
    layers, space, table = searched(job, parts[3], targets)
    if job.args.finetune_steps and Path(parts[0].model_name_or_path or "").resolve() == finetuned(folder).resolve():
        raise ConfigError(
            f"the fine-tuned model would replace {parts[0].model_name_or_path!r}, which it starts from: "
            "choose another output_dir, or finetune_steps=0"
        )
    runs = {
        target: folder if len(targets) == 1 else RunFolder(folder.path / f"{target.kind}-{target.value:g}")
        for target in targets
    }
    if job.args.resume:
        folder.check(job.settings)
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        if not job.args.resume:  # at once: whatever `--resume` finds later is of this run
            for run in (folder, *runs.values()):
                run.clear()
        folder.configure(job.settings, job.search)

    finetune(job, folder)
    fp32 = job.evaluate(job.model, "fp32 evaluation")
    job.accelerator.print(f"fp32 accuracy: {fp32.top1:.2%} of {fp32.n} images")
    state = {name: tensor.detach().clone() for name, tensor in job.model.state_dict().items()}
    start = Start(
        layers, space, table,
        original=state,
        fp32=fp32,
        prior=Prior(job, space, table, state),
        other_bytes=unlisted_bytes(job.model, layers),
        fp32_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        uniform=uniform,
    )  # fmt: skip
    results = []
    for target, run in runs.items():
        results.append({**search_for(job, run, target, start), "run": str(run.path)})
        if job.args.push_to_hub and job.accelerator.is_main_process:
            push(job.args, run, target if len(targets) > 1 else None)
    if len(targets) > 1 and job.accelerator.is_main_process:
        print(f"\n{write_front(folder, results, fp32)}")
    job.accelerator.end_training()
    return results


def script(argv: list[str] | None = None, description: str | None = None) -> int:
    """`main` for a terminal, with errors as one line on stderr.

    Returns: the exit status: 0, 2 for an error, 130 for an interruption.
    """
    try:
        main(argv, description)
    except KeyboardInterrupt as stop:
        print(f"\n{stop if isinstance(stop, Interrupted) else 'stopped; add --resume to go on'}", file=sys.stderr)
        return 130
    except FliqsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def uniform_formats(search_args: SearchArguments) -> list[str]:
    """Names of `--compare_uniform`, checked. Raises: ConfigError."""
    try:
        return [parse_format(name).name for name in search_args.compare_uniform or ()]
    except FormatError as error:
        raise ConfigError(f"compare_uniform: {error}") from error


def searched(
    job: Job, search_args: SearchArguments, targets: list[Target]
) -> tuple[tuple[LayerInfo, ...], SearchSpace, CostTable]:
    """The layers, the space and its costs. What cannot work, such as a target out of reach, fails before training."""
    job.train_config(job.steps, job.args.learning_rate)
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
        OneShotSearch(space, table, target, job.search, job.steps)
    return layers, space, table


def finetuned(folder: RunFolder) -> Path:
    """Where the fine-tuned fp32 checkpoint goes."""
    return folder.path / "fp32"


def finetune(job: Job, folder: RunFolder) -> None:
    """Train in fp32, if the arguments say so, and keep the result in `fp32/`, which `--resume` starts from."""
    if not job.args.finetune_steps:
        return
    kept, state = finetuned(folder), folder.path / "fp32-state"
    if job.args.resume and (kept / "config.json").exists():
        job.model.load_state_dict(AutoModelForImageClassification.from_pretrained(kept).state_dict())
        return
    if not job.args.resume and job.accelerator.is_main_process:
        for old in (kept, state):
            shutil.rmtree(old, ignore_errors=True)
    job.accelerator.wait_for_everyone()
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


def search_for(job: Job, run: RunFolder, target: Target, start: Start) -> dict[str, Any]:
    """One search: policy and weights together, then the final allocation, packed, saved, loaded and evaluated."""
    accelerator, args = job.accelerator, job.args
    if args.resume and (run.path / "results.json").exists():
        accelerator.print(f"{run.path} is finished")
        result: dict[str, Any] = run.read("results.json")
        return result
    search = OneShotSearch(
        start.space, start.table, target, job.search, job.steps, seed=args.seed,
        rank=accelerator.process_index, world_size=accelerator.num_processes, device=accelerator.device,
        gather=accelerator.gather if accelerator.num_processes > 1 else None,
    )  # fmt: skip
    if (sensitivity := start.prior.scores(run, target)) is not None:
        search.start_from(sensitivity.decision_scores)
    accelerator.wait_for_everyone()
    first = 0
    if accelerator.is_main_process:
        saved = states(run.state)
        first = int(saved[-1].name.removeprefix("step-")) if saved else 0
        run.configure(job.settings, job.search)
        run.begin(start.layers, start.space, sensitivity)
        run.forget_after(first)

    def on_log(entry: dict[str, Any]) -> None:
        run.append({**entry, "phase": search.phase(entry["step"] - 1)})
        if args.report_to:
            accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])

    seconds = train_formats(
        job, start, lambda switch: SearchHook(search, switch, run.policy), start.space.formats, run.state,
        f"search for {target.kind} {target.value:g}", on_log,
    )  # fmt: skip
    final = search.finalize()
    accuracy = deliver(job, run, final.allocation, run.checkpoint.name, "searched evaluation")
    accelerator.wait_for_everyone()
    others = {f"uniform_{name}": train_uniform(job, run, start, name) for name in start.uniform}
    result = {
        "target": {target.kind: target.value, "cost": search.target_cost, "cap": target.cap},
        "cost": {
            **cost_summary(start.layers, final.allocation, start.other_bytes), "target_ratio": final.cost_ratio,
        },
        "accuracy": {"fp32": start.fp32.to_dict(), **others, "searched": accuracy.to_dict()},
        "checkpoint_bytes": sum(file.stat().st_size for file in run.checkpoint.glob("*.safetensors")),
        "fp32_bytes": start.fp32_bytes,
        "seconds": seconds,
        "seconds_per_step": seconds / max(1, job.steps - first),
        "sensitivity_seconds": sensitivity.seconds if sensitivity is not None else None,
        "repaired": final.repaired,
        "argmax_cost_ratio": final.argmax_cost_ratio,
    }  # fmt: skip
    if accelerator.is_main_process:
        run.write("results.json", result)
        shutil.rmtree(run.state, ignore_errors=True)
        print(f"\n{layer_table(start.layers, final.allocation)}\n\n{summary(result)}")
        print(f"run folder      {run.path}\n{report(run)}")
    accelerator.wait_for_everyone()
    return result


def train_formats(
    job: Job,
    start: Start,
    hook: Callable[[Any], Any],
    formats: Any,
    state: Path,
    name: str,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> float:
    """Train `job.model` from the fp32 weights, quantized as the hook says; it stays searchable, for `deliver`.

    Args:
        hook: `FormatSwitch` -> `StepHook`.
    Returns: seconds.
    """
    job.model.load_state_dict(start.original)
    teacher = copy.deepcopy(job.model) if job.args.distill else None
    groups = {layer.name: layer.input_group for layer in start.layers}
    switch = make_searchable(
        job.model, formats, names=[layer.name for layer in start.layers], input_groups=groups, settings=job.quantizers
    )
    begin = time.perf_counter()
    job.model = train(
        job.model, job.train_data, job.train_config(job.steps, job.args.learning_rate),
        job.accelerator, hook=hook(switch), augment=job.augment, teacher=teacher, score=job.score,
        state_folder=state, resume=job.args.resume, on_log=on_log, name=name,
    )  # fmt: skip
    return time.perf_counter() - begin


def deliver(job: Job, run: RunFolder, allocation: Allocation, folder: str, name: str) -> Accuracy:
    """Pack `job.model` into a sub-folder of the run, load it as a user would, and evaluate what was loaded.

    The model is plain afterwards.
    """
    if job.accelerator.is_main_process:
        config = FLIQSConfig(allocation=allocation, activation_granularity=job.quantizers.activation_granularity)
        with run.replacing(folder) as draft:
            quantize(copy.deepcopy(job.model), config).save_pretrained(draft)
            job.processor.save_pretrained(draft)
        if folder == run.checkpoint.name:
            allocation.save(run.path / "allocation.json")
    restore(job.model)
    job.accelerator.wait_for_everyone()
    packed = AutoModelForImageClassification.from_pretrained(run.path / folder).to(job.accelerator.device)
    return job.evaluate(packed, name)


def train_uniform(job: Job, run: RunFolder, start: Start, fmt: str) -> dict[str, Any]:
    """The model with one format everywhere, trained for as many steps: what the search must beat.

    Returns: its accuracy, as in results.json and `uniform_<format>.json`; its packed weights are in
        `uniform_<format>/`.
    """
    folder = f"uniform_{fmt}"
    record = f"{folder}.json"
    if job.args.resume and (run.path / record).exists():
        accuracy: dict[str, Any] = run.read(record)
        return accuracy
    allocation = Allocation.uniform([layer.name for layer in start.layers], fmt)
    state = run.path / f"{folder}-state"
    if job.accelerator.is_main_process and not job.args.resume:
        shutil.rmtree(state, ignore_errors=True)
    job.accelerator.wait_for_everyone()
    train_formats(
        job, start, lambda switch: FixedFormats(switch, allocation), [parse_format(fmt)], state, f"uniform {fmt}"
    )
    accuracy = deliver(job, run, allocation, folder, f"uniform {fmt} evaluation").to_dict()
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        run.write(record, accuracy)
        shutil.rmtree(state, ignore_errors=True)
    return accuracy


def summary(result: dict[str, Any]) -> str:
    """Cost, size and accuracy, before and after."""
    cost, accuracy = result["cost"], result["accuracy"]
    fp32, found = accuracy["fp32"], accuracy["searched"]
    lines = [
        f"bit operations  {cost['fp32_bops'] / 1e9:9.3f} G fp32  -> {cost['bops'] / 1e9:9.3f} G  "
        f"({cost['target_ratio']:.1%} of the target)",
        f"checkpoint      {result['fp32_bytes'] / 1e6:9.3f} MB fp32 -> "
        f"{result['checkpoint_bytes'] / 1e6:9.3f} MB on disk",
        f"accuracy        {fp32['top1']:9.2%} fp32    -> {found['top1']:9.2%} searched  ({found['n']} images)",
    ]
    lines += [
        f"                {other['top1']:9.2%} {name.replace('_', ' ')}, trained for as many steps"
        for name, other in accuracy.items()
        if name.startswith("uniform_")
    ]
    if result["sensitivity_seconds"] is not None:
        spent, step = result["sensitivity_seconds"], result["seconds_per_step"]
        lines.append(f"sensitivity     {spent:9.1f} s, as long as {spent / step:.0f} steps of this search")
    if result["repaired"]:
        lines.insert(
            0,
            f"The policy's arg-max costs {result['argmax_cost_ratio']:.3f} of the target; the integer program over "
            "its log-probabilities chose this allocation instead.\n",
        )
    return "\n".join(lines)


def report(run: RunFolder) -> str:
    """Write the report. Returns: the line that says where it is, or what is missing to make it."""
    try:
        from fliqs_hf.report.run_report import write_report
    except ImportError as error:
        return f"report          needs {error.name}: pip install fliqs-hf[report], then fliqs-hf report {run.path}"
    return f"report          {write_report(run.path)}"


def push(args: TrainingArguments, run: RunFolder, target: Target | None) -> None:
    """Publish the run: packed weights, card, allocation, history."""
    from fliqs_hf.hf.hub import push as push_run

    name = args.hub_model_id or run.path.resolve().name
    print(f"published at {push_run(run.path, f'{name}-{target.kind}-{target.value:g}' if target else name)}")
