"""`fliqs-hf recommend`."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.quantize import quantized
from fliqs_hf.cost import example_image, trace_layers, unlisted_bytes, weight_bytes
from fliqs_hf.hf import FLIQSConfig
from fliqs_hf.hf import quantize as pack
from fliqs_hf.pipeline.checkpoints import device_of, load_model
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.timing import device_clock, interleaved
from fliqs_hf.wording import change, factor, milliseconds, percent, points, size

#: Passes of each model whose median is given, after one that prepares it.
ROUNDS = 15
FILE = "recommendation.json"
#: Points of top-1.
DEFAULT_DROP = 0.5


def recommend(args: argparse.Namespace) -> int:
    """One checkpoint that meets a floor of accuracy, with what speaks for it and for two others."""
    if args.max_drop is None and args.min_accuracy is None:
        args.max_drop = DEFAULT_DROP
    outcome = quantized(args)
    if outcome.status:
        answer(args.json, outcome.data, outcome.text)
        return outcome.status
    found = _figures(args, _chosen(outcome.data["floor"]["trials"]))
    run = RunFolder(args.output)
    run.write(FILE, found)
    answer(args.json, {**outcome.data, "recommendation": found}, f"{outcome.text}\n\n{_text(args, found)}")
    return 0


def _chosen(tests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The model that was written, and its neighbours among those that were tested, where it has them."""
    taken = max(number for number, test in enumerate(tests) if test["met"])
    names = {"safer": taken - 1, "recommended": taken, "faster": taken + 1}
    return {name: tests[number] for name, number in names.items() if 0 <= number < len(tests)}


def _figures(args: argparse.Namespace, chosen: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size, time of a pass over one image on this device, and accuracy as tested, of fp32 and of each model."""
    model = load_model(args.model, args.revision).to(device_of(args.device))
    layers = trace_layers(model)
    other = unlisted_bytes(model, layers)
    models = {"fp32": model}
    found: dict[str, dict[str, Any]] = {"fp32": {"bytes": weight_bytes(layers, {}, other_bytes=other)}}
    for name, test in chosen.items():
        allocation = Allocation.from_dict(test["allocation"])
        models[name] = pack(copy.deepcopy(model), FLIQSConfig(allocation=allocation))
        found[name] = {**test, "bytes": weight_bytes(layers, allocation, other_bytes=other)}
    for name, ms in _times(models).items():
        found[name]["ms"] = ms
    return found


@torch.no_grad()
def _times(models: Mapping[str, Any]) -> dict[str, float]:
    """Median milliseconds of each, in turn."""
    first = next(iter(models.values()))
    image, clock = example_image(first), device_clock(next(first.parameters()).device)
    seconds = interleaved({name: partial(model, image) for name, model in models.items()}, ROUNDS, clock=clock)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _text(args: argparse.Namespace, found: Mapping[str, Mapping[str, Any]]) -> str:
    fp32: Any = found["fp32"]
    rows: list[tuple[str, ...]] = []
    for name, entry in found.items():
        accuracy = ("", "", "")
        if name != "fp32":
            drop = f"{points(entry['drop'])} (at most {points(entry['highest_drop'])})"
            accuracy = (percent(entry["accuracy"]), drop, "met" if entry["met"] else "not met")
        rows.append(
            (name, size(entry["bytes"]), milliseconds(entry["ms"]), factor(fp32["ms"] / entry["ms"]), *accuracy)
        )
    head = ("model", "weights", "one image", "fp32 over it", "top-1", "points lost", "floor")
    text = table(head, rows)
    missing = [name for name in ("safer", "faster") if name not in found]
    why = {"safer": "nothing more precise is in the search space", "faster": "nothing cheaper was tested"}
    text += "".join(f"\nno {name} model: {why[name]}" for name in missing)
    if found["recommended"]["ms"] >= fp32["ms"]:
        text += f"\nit is not faster than fp32 here ({change(found['recommended']['ms'] / fp32['ms'] - 1)} % of time)"
    return text + f"\nallocations of all are in {args.output}/fliqs/{FILE}"
