"""`fliqs-hf quantize`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.calibration import CalibrationImages, check, input_format, pack, rounded, turn
from fliqs_hf.cli.floor import floor_of, meeting, missed, summary, taken
from fliqs_hf.cli.held_out import HeldOutImages
from fliqs_hf.cli.output import answer
from fliqs_hf.cli.targets import settle, targets
from fliqs_hf.cli.unused import check_quantize, check_unused
from fliqs_hf.cost import LayerInfo, Target, unlisted_bytes
from fliqs_hf.cost.hardware import HardwareShare, load_profile, profile_here
from fliqs_hf.cost.latency import NAME as LATENCY
from fliqs_hf.cost.latency import LatencyTable, use
from fliqs_hf.cost.models import BOPS
from fliqs_hf.errors import ConfigError
from fliqs_hf.hf import FLIQSConfig
from fliqs_hf.hf.card import write_card
from fliqs_hf.lock import locked
from fliqs_hf.pipeline.checkpoints import load_model, load_processor, read_config, traced
from fliqs_hf.pipeline.floor import FloorTest, candidates, record
from fliqs_hf.pipeline.outputs import check_places, check_run_folders, data_source
from fliqs_hf.pipeline.post_training import AllocationResult, allocate
from fliqs_hf.records import RunResults
from fliqs_hf.runs.folder import RunFolder, cost_lines, cost_summary, layer_table
from fliqs_hf.runs.replacement import replacing_run
from fliqs_hf.selection import find_score
from fliqs_hf.selection.rules import parse_rules
from fliqs_hf.tasks import find_task
from fliqs_hf.training.loading import device_of


def quantize(args: argparse.Namespace) -> int:
    outcome = quantized(args)
    answer(args.json, outcome.data, outcome.text)
    return outcome.status


class Outcome(NamedTuple):
    """Exit status, and what is said as JSON or as text."""

    status: int
    data: dict[str, Any]
    text: str


#: What else a command has to say of a run: it is given the run before it takes its place, what is said of it so far,
#: and of a floor the last three models that were tested, by their numbers.
More = Callable[[RunFolder, dict[str, Any], Mapping[int, Any]], None]


def quantized(args: argparse.Namespace, more: More | None = None) -> Outcome:
    """Write the run, or say why there is none."""
    output = RunFolder(args.output)
    sources = {"MODEL": args.model, "--calibration": data_source(args.calibration), "--allocation": args.allocation}
    sources["--latency_table"] = args.latency_table
    check_places([output], sources)
    with locked(output.path):
        return _quantized(args, output, more)


def _quantized(args: argparse.Namespace, output: RunFolder, more: More | None) -> Outcome:
    latency = None if args.latency_table is None else LatencyTable.load(args.latency_table)
    if latency is not None:
        use(latency)
    target, floor = _targets(args), floor_of(args)
    aim = _aim(args, target)
    check_quantize(args, chosen=aim is not None, floor=floor is not None)
    if aim is not None:
        settle(args, "separate")
    shown = profile_here() if args.hardware is None else load_profile(args.hardware)
    check_run_folders([output], args.overwrite, "pass --overwrite to replace it")
    model, processor = _loaded(args)
    if latency is not None:
        latency.check(traced(model)[0])
    fp32_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    start = time.perf_counter()
    calibration = None if args.calibration is None else CalibrationImages(args, model, processor)
    held_out = None if calibration is None or floor is None else HeldOutImages(args, model, processor, calibration)
    turn(args, model, calibration, chosen=aim is not None or args.allocation is not None)
    found = None
    if aim is not None:
        assert calibration is not None, "checked with the target"
        found = _allocated(args, model, calibration, aim)
        layers, allocation = found.layers, found.allocation
    else:
        allocation = _config(args).resolve(model)
        layers = _costed(model)
    other_bytes = unlisted_bytes(model, layers)
    trials: list[FloorTest] = []
    packed: dict[int, Any] = {}
    if floor is not None and held_out is not None and calibration is not None:
        tested = _to_test(args, allocation, found)
        packed, trials = meeting(args, model, tested, floor, held_out, calibration)
        if (number := taken(trials)) is None:
            message = missed(trials, floor, len(tested) == 1)
            return Outcome(1, {"floor": record(trials, floor), "error": message}, message)
        model, allocation = packed[number], trials[number].allocation
        found = None if found is None else found.at(allocation)
    else:
        pack(args, model, allocation, calibration)
    cost = _cost(layers, allocation, other_bytes, found)
    if calibration is not None:
        args.calibration_split = calibration.split
    result: dict[str, Any] = {
        "target": {one.kind: one.value for one in target},
        "cost": cost,
        "fp32_bytes": fp32_bytes,
        **({} if shown is None or not layers else {"hardware": asdict(HardwareShare.of(shown, layers, allocation))}),
        **({} if floor is None else {"floor": record(trials, floor)}),
    }
    with replacing_run(output.files) as draft:
        run = _save(args, RunFolder(draft), model, processor, layers, allocation, found)
        result["checkpoint_bytes"] = run.model_bytes()
        run.write_record(RunResults(**result))
        if more is not None:
            more(run, result, packed)
        write_card(run.path)
    result["seconds"] = time.perf_counter() - start
    text = _text(args, result, layers, allocation, "" if floor is None else summary(trials, floor))
    return Outcome(0, {**result, "allocation": allocation.to_dict(), "output": args.output}, text)


def _loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    """The fp32 model on its device, and its image processor. Raises: ConfigError: it is none that can be quantized."""
    if read_config(args.model, args.revision)[1] is not None:
        raise ConfigError(f"{args.model} is quantized already; start from the fp32 checkpoint")
    device = device_of(args.device)
    processor = load_processor(args.model, args.revision)
    model = load_model(args.model, args.revision)
    task = find_task(args.task)
    if args.calibration and not task.has_model(model):
        raise ConfigError(
            f"--calibration runs images through {task.models}, which {type(model).__name__} is not: name its --task"
        )
    return model.to(device), processor


def _aim(args: argparse.Namespace, target: list[Target]) -> list[Target] | str | None:
    """What formats are chosen for, None where they are given: a floor alone asks for the cheapest that meet it."""
    floor = args.max_drop is not None or args.min_accuracy is not None
    given = args.allocation or args.weight_format or args.activation_format
    cheapest = floor and not target and not given
    if not cheapest:
        return target or None
    return BOPS.name if args.latency_table is None else LATENCY


def _to_test(args: argparse.Namespace, allocation: Allocation, found: AllocationResult | None) -> list[Allocation]:
    """Against a floor, the most precise first."""
    if found is None:
        return [allocation]
    return candidates(found.problem, found.sensitivity.decision_scores, args.floor_steps)


def _cost(
    layers: Sequence[LayerInfo], allocation: Allocation, other_bytes: int, found: AllocationResult | None
) -> dict[str, float]:
    cost: dict[str, float] = cost_summary(layers, allocation, other_bytes) if layers else {}
    if found is not None:
        cost |= {"expected_loss_increase": found.loss_increase}
        cost |= {"target_ratio": max(found.used.values())} if found.used else {}
    return cost


def _allocated(
    args: argparse.Namespace, model: Any, images: CalibrationImages, aim: list[Target] | str
) -> AllocationResult:
    return allocate(
        model,
        images.labelled,
        aim,
        search_space=args.search_space,
        activation=args.activation,
        modules_to_not_convert=args.modules_to_not_convert,
        **parse_rules(args.require, args.min_bits),
        score=args.score or ("fisher" if isinstance(aim, str) else "two-pass"),
        **rounded(args),
        task=images.task,
    )


def _text(
    args: argparse.Namespace,
    result: dict[str, Any],
    layers: Sequence[LayerInfo],
    allocation: Allocation,
    accuracy: str,
) -> str:
    """What is printed of a result; without `layers` its costs are unknown."""
    cost = result["cost"]
    ratio = f" ({cost['target_ratio']:.1%} of the target)" if "target_ratio" in cost else ""
    text = (
        f"{layer_table(layers, allocation)}\n\n"
        f"bit operations  {cost['fp32_bops'] / 1e9:9.3f} G fp32  -> {cost['bops'] / 1e9:9.3f} G{ratio}\n"
        if layers
        else f"{allocation.summary()}\n\nbit operations  unknown\n"
    )
    text += "".join(f"{line}\n" for line in cost_lines(cost))
    text += _hardware_line(result.get("hardware"))
    return text + (
        f"{accuracy}"
        f"checkpoint      {result['fp32_bytes'] / 1e6:9.3f} MB fp32 -> {result['checkpoint_bytes'] / 1e6:9.3f} MB\n"
        f"saved in        {args.output}\n"
        f"next            fliqs-hf validate {args.model} {args.output} --dataset_name … --max_drop 0.5"
    )


def _hardware_line(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"on {found['profile']:<13}"
        + ", ".join(f"{part:.1%} {state}" for state, part in found["share"].items())
        + "\n"
    )


def _targets(args: argparse.Namespace) -> list[Target]:
    """Raises: ConfigError: settings that contradict one another."""
    uniform = [name for name in ("weight_format", "activation_format") if getattr(args, name) is not None]
    found = targets(args)
    given = [f"target_{target.kind}" for target in found]
    ways = [uniform[0]] if uniform else []
    ways += ["allocation"] if args.allocation else []
    ways += given[:1]
    if len(ways) > 1:
        raise ConfigError(f"give one of --{' and --'.join(ways)}: each says all formats")
    if given and not args.calibration:
        raise ConfigError(
            f"--{given[0]} chooses formats by their effect on images: give some with --calibration DATASET"
        )
    if _aim(args, found) is None:
        remedy = "give a target or a floor, such as --target_bits 4 or --max_drop 0.5"
        if ways:
            remedy = f"leave it out, or --{ways[0]}, which says all formats"
        of_choice = ("require", "min_bits", "score", "search_space", "activation")
        check_unused(args, f"is about formats that are chosen: {remedy}", *of_choice)
    parse_rules(args.require, args.min_bits)
    if args.score is not None:
        find_score(args.score)
    check(args)
    return found


def _costed(model: Any) -> tuple[LayerInfo, ...]:
    """The layers with their costs; none where the model cannot be run, which formats that are given do not need."""
    try:
        return traced(model)[0]
    except ConfigError as error:
        print(f"costs are not known: {error}", file=sys.stderr)
        return ()


def _config(args: argparse.Namespace) -> FLIQSConfig:
    if args.allocation is not None:
        return FLIQSConfig(allocation=args.allocation, modules_to_not_convert=args.modules_to_not_convert)
    formats: dict[str, Any] = {"modules_to_not_convert": args.modules_to_not_convert}
    if args.weight_format is not None:
        formats["weight_format"] = args.weight_format
    if args.activation_format is not None:
        formats["activation_format"] = input_format(args)
    return FLIQSConfig(**formats)


def _save(
    args: argparse.Namespace,
    run: RunFolder,
    model: Any,
    processor: Any,
    layers: tuple[LayerInfo, ...],
    allocation: Allocation,
    found: AllocationResult | None,
) -> RunFolder:
    """Write the run folder of the packed model, but for its results."""
    settings = {
        key: value for key, value in vars(args).items() if key not in ("json", "fliqs_command", "func", "given")
    }
    settings |= {"model_name_or_path": args.model, "dataset_name": args.calibration}
    run.configure(settings)
    if found is not None:
        run.begin(layers, found.space, found.sensitivity)
    elif layers:
        run.begin(layers)
    with run.files.model() as draft:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
    run.write("allocation.json", allocation.to_dict())
    return run
