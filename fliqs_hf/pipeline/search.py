"""The main job: fine-tune in fp32 if wanted, search formats, train for them, evaluate, save, report, publish."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo, Target, trace_layers, unlisted_bytes
from fliqs_hf.cost.hardware import HardwareShare, Profile, load_profile, profile_here
from fliqs_hf.cost.latency import LatencyTable
from fliqs_hf.errors import ConfigError
from fliqs_hf.failures import status_of
from fliqs_hf.formats import parse as parse_format
from fliqs_hf.lock import locked
from fliqs_hf.nn import make_searchable, quantizable_layers
from fliqs_hf.oneshot import FinalChoice, OneShotSearch
from fliqs_hf.oneshot.hook import FixedFormats, SearchHook
from fliqs_hf.pipeline.alternatives import measure_alternatives
from fliqs_hf.pipeline.checks import check_arguments, limits_of, settled, sources_of, targets_of, uniform_formats
from fliqs_hf.pipeline.completion import complete
from fliqs_hf.pipeline.costs import search_problem, search_space
from fliqs_hf.pipeline.delivery import deliver, packed_in
from fliqs_hf.pipeline.finetuning import finetune
from fliqs_hf.pipeline.floor import Floor, FloorTest, record
from fliqs_hf.pipeline.job import Job, load
from fliqs_hf.pipeline.neighbour import LATENT, keep, neighbour
from fliqs_hf.pipeline.outputs import check_places, check_run_folders
from fliqs_hf.pipeline.outside import Publishing, Tracking
from fliqs_hf.pipeline.prior import Prior, check_one_policy
from fliqs_hf.pipeline.recipe import bits_of, recipe_at, summary
from fliqs_hf.pipeline.search_floor import floor_of, meet
from fliqs_hf.records import RunResults
from fliqs_hf.runs.folder import RunFolder, cost_summary, write_front
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training import train
from fliqs_hf.training.arguments import DataArguments, ModelArguments, SearchArguments, TrainingArguments, parse
from fliqs_hf.training.loading import hub_token
from fliqs_hf.training.monitor import UNSETTLED
from fliqs_hf.training.state import steps_done
from fliqs_hf.wording import figure


@dataclass(frozen=True)
class Planned:
    """A search before it begins: the job with the recipe of the target, and what is searched."""

    job: Job
    problem: SearchProblem


@dataclass(frozen=True)
class Start:
    """What the searches for all targets start from.

    Attributes:
        job: without the recipe of any target.
        layers: all that were traced; those of `space` are searched, the others stay in fp32.
        planned: of one space, by target.
        model: in fp32; searches train copies of it. fp32: its `Score`.
        other_bytes, fp32_bytes: of the checkpoint, beside the layers' weights, and of the whole in fp32.
        prior: sensitivity scores.
        uniform: formats of the uniform models to train for comparison, in `folder`.
        floor: of accuracy that the delivered model must meet.
        before: the run whose trained weights the search starts from, instead of `model`'s.
        kept: whether a search keeps its own for the next one.
    """

    job: Job
    folder: RunFolder
    layers: tuple[LayerInfo, ...]
    planned: dict[Target, Planned]
    model: Any
    fp32: Any
    prior: Prior
    other_bytes: int
    fp32_bytes: int
    uniform: list[str]
    floor: Floor | None = None
    before: RunFolder | None = None
    kept: bool = False

    @property
    def space(self) -> SearchSpace:
        return next(iter(self.planned.values())).problem.space


def main(argv: list[str] | None = None, description: str | None = None) -> list[dict[str, Any]]:
    """Parse and run.

    Returns: `results.json` of every target, with its `run` folder.
    Raises: FliqsError: anything that is wrong with arguments, data, model or run folder.
    """
    parts = parse(sys.argv[1:] if argv is None else argv, description or __doc__)
    with ExitStack() as stack:
        stack.enter_context(hub_token(parts[0].token))
        check_arguments(*parts)
        parts = (*parts[:3], settled(parts[3]))
        targets, uniform = targets_of(parts[3]), uniform_formats(parts[3])
        floor_of(parts[3], parts[2], len(targets))
        folder = RunFolder(parts[2].output_dir)
        several = len(targets) > 1
        runs = {target: RunFolder(folder.path / target.label) if several else folder for target in targets}
        check_places((folder, *runs.values()), sources_of(parts[0], parts[1]))
        if get_int_from_env(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0) == 0:
            for path in dict.fromkeys(run.path for run in (folder, *runs.values())):
                stack.enter_context(locked(path))
        return _run(parts, folder, runs, uniform)


def _run(
    parts: tuple[ModelArguments, DataArguments, TrainingArguments, SearchArguments],
    folder: RunFolder,
    runs: dict[Target, RunFolder],
    uniform: list[str],
) -> list[dict[str, Any]]:
    """`main` with folders that no other process writes to."""
    check_output((folder, *runs.values()), parts[2])
    job = load(*parts)
    floor = floor_of(parts[3], parts[2], len(runs))
    return carry_out(job, folder, runs, *searched(job, list(runs)), uniform, floor)


def carry_out(
    job: Job,
    folder: RunFolder,
    runs: dict[Target, RunFolder],
    layers: tuple[LayerInfo, ...],
    planned: dict[Target, Planned],
    uniform: list[str],
    floor: Floor | None = None,
) -> list[dict[str, Any]]:
    """The run of a job: fp32, then a search for each target. Returns: as `main`."""
    if floor is not None:
        job.task.check_right()
    several, warm = len(runs) > 1, bool(job.settings["warm_start"])
    whole = job if several else next(iter(planned.values())).job  # whose settings `folder` records
    if job.args.resume:
        folder.check(whole.settings, job.search)
        for target, run in runs.items():
            run.check(planned[target].job.settings, job.search)
    job.accelerator.wait_for_everyone()
    publishing = Publishing(job, runs)
    if job.accelerator.is_main_process:
        if not job.args.resume:  # at once: whatever `--resume` finds later is of this run
            for run in (folder, *runs.values()):
                run.files.clear()
        folder.configure(whole.settings, job.search)
        if several:
            folder.files.claim(*(f"{target.label}/" for target in runs))

    model = finetune(job, folder)
    fp32 = job.evaluate(model, "fp32 evaluation")
    job.accelerator.print(f"fp32 {job.task.measure}: {fp32.value:.2%} of {fp32.n} images")
    start = Start(
        job, folder, layers, planned,
        model=model,
        fp32=fp32,
        prior=Prior(job, model),
        other_bytes=unlisted_bytes(model, layers),
        fp32_bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        uniform=uniform,
        floor=floor,
    )  # fmt: skip
    results = []
    for number, (target, run) in enumerate(runs.items()):
        track = Tracking(job, f"{target.label}/" if several else "", job.args.finetune_steps + number * job.steps)
        start = replace(start, kept=warm and number + 1 < len(runs))
        results.append({**search_for(run, target, start, track), "run": str(run.path)})
        if start.before is not None and job.accelerator.is_main_process:
            start.before.discard(LATENT)
        start = replace(start, before=run if warm else None)
        publishing.push(target)
    if several and job.accelerator.is_main_process:
        print(f"\n{write_front(folder, results, fp32)}")
    job.accelerator.end_training()
    publishing.finish()
    return results


def script(argv: list[str] | None = None, description: str | None = None) -> int:
    """`main` for a terminal, with errors as one line on stderr (`FLIQS_HF_TRACEBACK=1`: and how they came about).

    Returns: the exit status, as `fliqs_hf.failures.explain` says it.
    """
    return status_of(lambda: main(argv, description), "add --resume to go on")


def searched(job: Job, targets: Sequence[Target]) -> tuple[tuple[LayerInfo, ...], dict[Target, Planned]]:
    """The layers, and what is to be done for each target. What cannot work, such as a target out of reach, fails here,
    before training."""
    search_args = job.search_args
    wanted = quantizable_layers(job.model, search_args.modules_to_not_convert)
    layers = trace_layers(job.model, job.eval_data[0][0][None].to(job.accelerator.device))
    if search_args.latency_table is not None:
        LatencyTable.load(search_args.latency_table).check(layers)
    space = search_space(search_args, [layer for layer in layers if layer.name in wanted])
    limits = limits_of(search_args)
    first = search_problem(job.model, layers, space, targets[0], job.quantizers, limits)
    planned = {}
    for target in targets:
        problem = replace(first, target=target)  # of one kind of cost
        own = job.following(recipe_at(bits_of(problem), job.args, job.task, job.trained))
        if own.quantizers != job.quantizers:  # of which a file may hold numbers
            problem = search_problem(job.model, layers, space, target, own.quantizers, limits)
        planned[target] = Planned(own, problem)
        own.train_config(job.steps, own.args.learning_rate)
        search = OneShotSearch(problem, job.search, job.steps)
        if job.args.load_best_model_at_end and search.phase(job.steps - 1) != "final":
            raise ConfigError(UNSETTLED)
    return layers, planned


def check_output(runs: Sequence[RunFolder], args: TrainingArguments) -> None:
    """Raises: ConfigError: see `check_run_folders`."""
    replace = args.resume or args.overwrite_output_dir
    check_run_folders(runs, replace, "add --resume to go on with it, --overwrite_output_dir to replace it")


def search_for(run: RunFolder, target: Target, start: Start, track: Tracking) -> dict[str, Any]:
    """One search and all that a run folder has at its end, of which a resumed run makes what is not there.

    Raises: CheckpointError: what was recorded is damaged.
    """
    job = start.planned[target].job
    found = run.read_record(RunResults) if job.args.resume else None
    result = {} if found is None else asdict(found)
    if found is None:
        job.accelerator.print(f"training with {summary(job.settings)}")
        result = _search(job, run, target, start, track)
    else:
        job.accelerator.print(f"{run.path} is finished")
    if job.accelerator.is_main_process:
        run.discard(run.state.name)
        for name in start.uniform:  # of a result that is on record: it was made from them
            start.folder.write_result(f"uniform_{name}.json", result["accuracy"][f"uniform_{name}"])
        print(complete(run, start.layers, start.space, result))
    job.accelerator.wait_for_everyone()
    return result


def _search(job: Job, run: RunFolder, target: Target, start: Start, track: Tracking) -> dict[str, Any]:
    """Policy and weights together, then the final allocation, packed, saved, loaded and evaluated; the result last."""
    accelerator, args = job.accelerator, job.args
    search = OneShotSearch(
        start.planned[target].problem, job.search, job.steps, seed=args.seed,
        rank=accelerator.process_index, world_size=accelerator.num_processes, device=accelerator.device,
        gather=accelerator.gather if accelerator.num_processes > 1 else None,
    )  # fmt: skip
    if (sensitivity := start.prior.scores(run, search.problem)) is not None:
        search.start_from(sensitivity.decision_scores)
    check_one_policy(accelerator, search)
    if accelerator.is_main_process:
        run.configure(job.settings, job.search)
        run.begin(start.layers, start.space, sensitivity)
        run.claim(f"{run.state.name}/", run.policy.name)
        run.forget_after(steps_done(run.state))

    def on_log(entry: dict[str, Any]) -> None:
        run.append({**entry, "phase": search.phase(entry["step"] - 1)})
        track.log(entry)

    trained = train_formats(
        job, start, lambda switch: SearchHook(search, switch, run.policy), start.space.formats, run.state,
        f"search for {target.kind} {figure(target.value)}", on_log, source=neighbour(start.model, start.before),
    )  # fmt: skip
    if start.kept and accelerator.is_main_process:
        keep(run, trained)
    final = search.finalize()
    trials: list[FloorTest] = []
    if start.floor is not None:
        trained, trials = _meet_floor(job, run, start, start.floor, search, trained)
        final = FinalChoice.of(search.problem, start.space.choice(trials[-1].allocation), search.policy.argmax().cpu())
    signals = search.policy.signals() if sensitivity is None else sensitivity.decision_scores
    measure = partial(_measure, job, run, start.space, final.allocation, signals.tolist())
    accuracy = deliver(job, run, trained, final.allocation, None, "searched evaluation", measure)
    track.log({"step": job.steps, f"eval/{accuracy.key}": accuracy.value, "eval/loss": accuracy.loss})
    others = {f"uniform_{name}": train_uniform(start, name) for name in start.uniform}
    seconds = run.seconds()
    result: dict[str, Any] = {
        "target": {target.kind: target.value, "cost": search.problem.target_cost, "cap": target.cap},
        "cost": {
            **cost_summary(start.layers, final.allocation, start.other_bytes), "target_ratio": final.cost_ratio,
        },
        "accuracy": {"fp32": start.fp32.to_dict(), **others, "searched": accuracy.to_dict()},
        "checkpoint_bytes": run.model_bytes(),
        "fp32_bytes": start.fp32_bytes,
        "seconds": seconds,
        "seconds_per_step": seconds / job.steps,
        "sensitivity_seconds": sensitivity.seconds if sensitivity is not None else None,
        "repaired": final.repaired,
        "argmax_cost_ratio": final.argmax_cost_ratio,
    }  # fmt: skip
    if start.floor is not None:
        result["floor"] = record(trials, start.floor)
    if (profile := _profile(job.settings["hardware"])) is not None:
        result["hardware"] = asdict(HardwareShare.of(profile, start.layers, final.allocation))
    if accelerator.is_main_process:
        run.write_record(RunResults(**result), sealed=True)
    accelerator.wait_for_everyone()
    return result


def _profile(named: str | None) -> Profile | None:
    """The profile that the user names, else that of the machine at hand, if there is one."""
    return profile_here() if named is None else load_profile(named)


def _measure(
    job: Job, run: RunFolder, space: SearchSpace, allocation: Allocation, signals: Any, packed: Any, layers: Any
) -> None:
    """Put the alternatives on record."""
    found = measure_alternatives(job, packed, layers, space, allocation, signals)
    if found is not None:
        run.write_record(found)


def _meet_floor(
    job: Job, run: RunFolder, start: Start, floor: Floor, search: OneShotSearch, trained: Any
) -> tuple[Any, list[FloorTest]]:
    """As `meet`, with this job's way to train and to pack."""

    def pack(model: Any, allocation: Allocation, folder: str) -> Any:
        return packed_in(job, run, model, allocation, folder, "evaluation for the floor")

    def train_on(model: Any, allocation: Allocation, state: Path, name: str) -> Any:
        return train_formats(
            job, start, lambda switch: FixedFormats(switch, allocation), start.space.formats, state, name, source=model
        )

    return meet(job, run, search, floor, (start.model, trained), pack, train_on)


def train_formats(
    job: Job,
    start: Start,
    hook: Callable[[Any], Any],
    formats: Any,
    state: Path,
    name: str,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    source: Any = None,
) -> Any:
    """Train a copy of the fp32 model, quantized as the hook says.

    Args:
        source: plain, of other weights to start from.
        hook: `FormatSwitch` -> `StepHook`.
    Returns: the copy, searchable, for `deliver`.
    """
    model = copy.deepcopy(start.model if source is None else source)
    teacher = copy.deepcopy(start.model) if job.args.distill or job.args.distill_features else None
    groups = {layer.name: layer.input_group for layer in start.space.layers}
    switch = make_searchable(model, formats, names=list(groups), input_groups=groups, settings=job.quantizers)
    return train(
        model, job.train_data, job.train_config(job.steps, job.args.learning_rate),
        job.accelerator, hook=hook(switch), augment=job.augment, teacher=teacher, score=job.score,
        state_folder=state, resume=job.args.resume, on_log=on_log, name=name, task=job.task,
    )  # fmt: skip


def train_uniform(start: Start, fmt: str) -> dict[str, Any]:
    """The model with one format everywhere, trained for as many steps by the recipe for its bits: what the search must
    beat.

    All targets share it, and so does a run that is resumed.

    Returns: its accuracy, as in results.json and `uniform_<format>.json`; its packed weights are in
        `uniform_<format>/`.
    """
    run, folder = start.folder, f"uniform_{fmt}"
    base, bits = start.job, parse_format(fmt).effective_bits
    job = base.following(recipe_at(bits, base.args, base.task, base.trained))
    record = f"{folder}.json"
    state = run.records / f"{folder}-state"
    accuracy = run.read_result(record)
    if accuracy is not None:
        if job.accelerator.is_main_process:
            run.discard(state.name)
        return accuracy
    allocation = Allocation.uniform([layer.name for layer in start.space.layers], fmt)
    if job.accelerator.is_main_process:
        run.claim(folder, f"{state.name}/")
    trained = train_formats(
        job, start, lambda switch: FixedFormats(switch, allocation), [parse_format(fmt)], state, f"uniform {fmt}"
    )
    accuracy = deliver(job, run, trained, allocation, folder, f"uniform {fmt} evaluation").to_dict()
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        run.write_result(record, accuracy)
        run.discard(state.name)
    return accuracy
