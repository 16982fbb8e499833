"""`fliqs-hf recommend`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.quantize import quantized
from fliqs_hf.cost import example_image
from fliqs_hf.pipeline.checkpoints import load_model
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.timing import device_clock, interleaved
from fliqs_hf.training.loading import device_of
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
    found: dict[str, dict[str, Any]] = {}

    def more(run: RunFolder, result: dict[str, Any], tested: Mapping[int, Any]) -> None:
        found.update(_figures(args, run, result, tested))
        run.write(FILE, found)

    outcome = quantized(args, more)
    if outcome.status:
        answer(args.json, outcome.data, outcome.text)
        return outcome.status
    answer(args.json, {**outcome.data, "recommendation": found}, f"{outcome.text}\n\n{_text(args, found)}")
    return 0


def _figures(
    args: argparse.Namespace, run: RunFolder, result: Mapping[str, Any], tested: Mapping[int, Any]
) -> dict[str, dict[str, Any]]:
    """Size, time of a pass over one image on this device, and accuracy as tested: of fp32, of the model that is
    written, and of its neighbours among those that were tested, where it has them; all as loaded from their files."""
    trials, device = result["floor"]["trials"], device_of(args.device)
    taken = max(number for number, trial in enumerate(trials) if trial["met"])
    models = {"fp32": load_model(args.model, args.revision).to(device)}
    found: dict[str, dict[str, Any]] = {"fp32": {"bytes": result["fp32_bytes"]}}
    for name, number in {"safer": taken - 1, "recommended": taken, "faster": taken + 1}.items():
        if number not in tested:
            continue
        if number == taken:
            model, size_bytes = load_model(str(run.path)), run.model_bytes()
        else:
            model, size_bytes = _saved_and_loaded(tested[number])
        models[name], found[name] = model.to(device), {**trials[number], "bytes": size_bytes}
    for name, ms in _times(models).items():
        found[name]["ms"] = ms
    return found


def _saved_and_loaded(model: Any) -> tuple[Any, int]:
    """A packed model as a user would have it, and the bytes of its weight files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(folder), sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


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
    if "faster" in found and found["faster"]["ms"] >= found["recommended"]["ms"]:
        slower = change(found["faster"]["ms"] / found["recommended"]["ms"] - 1)
        text += f"\nthe one that should be faster is not, on this device ({slower} % of time)"
    return text + f"\nallocations of all are in {args.output}/fliqs/{FILE}"
