"""`fliqs-hf profile`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.unused import check_unused
from fliqs_hf.cost.choices import choices
from fliqs_hf.cost.hardware import load_profile
from fliqs_hf.cost.latency import BETWEEN, LatencyTable
from fliqs_hf.cost.roofline import roofline
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.pipeline.checkpoints import empty_model, load_model, read_config, traced
from fliqs_hf.pipeline.outputs import check_apart, check_result_file
from fliqs_hf.pipeline.profiling import profile as measure
from fliqs_hf.training.loading import device_of
from fliqs_hf.wording import change, short

ENDINGS = (".json", ".csv")
#: How what is written begins.
_OURS = ('{\n "conditions"', "layer,weight,activation,ms")


def profile(args: argparse.Namespace) -> int:
    """Raises: ConfigError: an output that is none, a quantized model, formats that cannot be paired, or an option
    without effect."""
    if args.estimate is not None:
        why = "is for measuring, and --estimate measures nothing: leave it out"
        check_unused(args, why, "rounds", "threads", "device")
    output = Path(args.output)
    if output.suffix not in ENDINGS:
        raise ConfigError(f"{args.output}: the ending says the form, one of {', '.join(ENDINGS)}")
    check_apart(output, {"MODEL": args.model})
    check_result_file(output, lambda text: text.startswith(_OURS), "OUTPUT")
    if output.exists() and not args.overwrite:
        raise ConfigError(f"{output} exists: pass --overwrite to replace it")
    space = args.search_space and (args.search_space[0] if len(args.search_space) == 1 else args.search_space)
    found_formats = choices(space, args.estimate if space is None else None, args.activation)
    pairs = _pairs(found_formats.formats, found_formats.activation)
    config, quantization = read_config(args.model, args.revision)
    if quantization is not None:
        raise ConfigError(f"{args.model} is quantized already; measure the fp32 checkpoint, which is packed for it")
    if args.estimate is not None:
        layers, _ = traced(empty_model(config))
        found = roofline(load_profile(args.estimate), layers, pairs, args.batch_size)
    else:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        device = device_of(args.device)
        model = load_model(args.model, args.revision).to(device)
        partial = output.with_name(f"{output.name}.partial")
        found = measure(
            model, traced(model)[0], pairs, batch_size=args.batch_size, rounds=args.rounds, partial=partial
        )
    found.save(output)
    answer(args.json, {**found.conditions, "output": args.output, "models_ms": _totals(found)}, _text(args, found))
    return 0


def _pairs(formats: tuple[Format, ...], activation: str) -> list[LayerFormats]:
    """Of weights and inputs: each format for both, or every combination."""
    weights = [fmt for fmt in formats if not fmt.for_inputs_only]
    if not weights:
        raise ConfigError(f"{', '.join(fmt.name for fmt in formats)}: none of them is for weights")
    if activation == "same":
        return [LayerFormats(fmt, fmt) for fmt in weights]
    return [LayerFormats(weight, inputs) for weight in weights for inputs in formats]


def _totals(found: LatencyTable) -> dict[str, float]:
    """Sums of uniform models, by pair."""
    totals: dict[str, float] = {}
    for row in found.rows:
        if row.layer != BETWEEN:
            key = f"{row.weight} × {row.activation}"
            totals[key] = totals.get(key, found.between_ms) + row.ms
    return totals


def _text(args: argparse.Namespace, found: LatencyTable) -> str:
    totals = _totals(found)
    fp32 = next(iter(totals.values()))
    rows = [(pair, short(ms), f"{fp32 / ms:.2f} ×") for pair, ms in totals.items()]
    text = table(("all layers in", "ms", "fp32 over it"), rows)
    text += f"\n\n{found.label}, {found.conditions['device']}; {short(found.between_ms)} ms are between the layers\n"
    if found.conditions["estimated"]:
        text += f"ESTIMATE, {found.conditions['how']}\n"
    else:
        worst = found.conditions["worst_error_of_uniform_models"]
        text += f"sums of layers differ from these whole models by at most {change(worst)} %\n"
    return text + (
        f"saved in {args.output}\n"
        f"next     fliqs-hf quantize {args.model} OUTPUT --latency_table {args.output} --target_latency_ms … "
        "--calibration …"
    )
