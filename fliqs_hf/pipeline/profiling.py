"""Times of the layers of a model on this device, in situ: in whole models, with the kernels that they run with."""

from __future__ import annotations

import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import LayerInfo, example_image
from fliqs_hf.cost.latency import BETWEEN, FP32, LatencyRow, LatencyTable, names_of
from fliqs_hf.errors import ConfigError
from fliqs_hf.files import remove, write_text
from fliqs_hf.hf import quantize
from fliqs_hf.json_file import read_object
from fliqs_hf.nn.kernels import kernels_of
from fliqs_hf.timing import Clock, device_clock, timed
from fliqs_hf.validation.validate import processor_name
from fliqs_hf.version import __version__

#: Passes of each model before the first round: weights are prepared, caches and clocks settle.
WARM_UP = 2


@dataclass
class Samples:
    """Of one model: seconds of each round, of the whole pass and, in a second pass, of each layer."""

    whole: list[float] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)


@torch.no_grad()
def profile(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    pairs: Sequence[LayerFormats],
    *,
    batch_size: int = 1,
    rounds: int = 20,
    clock: Clock | None = None,
    partial: Path | None = None,
) -> LatencyTable:
    """Measure every layer in every pair of formats, and in fp32.

    For each pair the whole model is packed in it, so that layers meet the caches, the shared inputs (q, k, v) and the
    kernels that they have in use. Each round runs every model once without and once with a stopwatch at its layers,
    beginning with another model each time. Layers of one shape and place are pooled; a row has the median over rounds
    and the quartiles. What is between the layers is what is left of the whole pass, the median over all models.

    Args:
        model: plain, in evaluation mode, on its device; it is left as it was. All models are in memory together.
        layers: of `trace_layers(model)`.
        clock: seconds; default: `device_clock`. On a GPU it waits for each layer, so sums exceed what pipelines take.
        partial: file in which rounds are kept until all are done, to go on from after an interruption.
    Raises: ConfigError: fewer than three rounds, or a `partial` of another measurement.
    """
    if rounds < 3:
        raise ConfigError(f"rounds={rounds!r}: quartiles need at least 3")
    device = next(model.parameters()).device
    clock = clock or device_clock(device)
    names = [layer.name for layer in layers if layer.quantizable]
    models: dict[str, nn.Module] = {f"{FP32},{FP32}": model}
    for pair in pairs:
        allocation = Allocation(dict.fromkeys(names, pair))
        models[",".join(names_of(pair))] = quantize(copy.deepcopy(model), allocation)
    images = example_image(model).expand(batch_size, -1, -1, -1).contiguous()
    about = _conditions(model, device, batch_size, rounds)
    of = {
        **about,
        "pairs": list(models),
        "layers": [[layer.name, layer.macs, layer.weight_numel, layer.out_channels] for layer in layers],
    }
    samples = _resumed(partial, of, models)
    done = len(next(iter(samples.values())).whole)
    if done < rounds:
        for each in models.values():
            for _ in range(WARM_UP):
                each(images)
    order = list(models)
    for number in tqdm(range(done, rounds), desc="profile", unit="round"):
        first = number % len(order)
        for key in order[first:] + order[:first]:
            _measure(models[key], names, images, clock, samples[key])
        if partial is not None:
            kept = {key: [one.whole, one.layers] for key, one in samples.items()}
            write_text(partial, json.dumps({"of": of, "samples": kept}))
    kernels = {key: {name: choice.kernel for name, choice in kernels_of(each).items()} for key, each in models.items()}
    table = _table(layers, samples, kernels, about)
    if partial is not None:
        remove(partial)
    return table


def _measure(model: nn.Module, names: Sequence[str], images: Tensor, clock: Clock, samples: Samples) -> None:
    samples.whole.append(timed(lambda: model(images), clock))
    with _stopwatch(model, names, clock) as seconds:
        model(images)
    for name in names:
        samples.layers.setdefault(name, []).append(seconds[name])


@contextmanager
def _stopwatch(model: nn.Module, names: Sequence[str], clock: Clock) -> Iterator[dict[str, float]]:
    """Seconds that each layer takes within this context, over all its calls."""
    seconds = dict.fromkeys(names, 0.0)
    started: dict[str, float] = {}
    handles = []

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(*_: Any) -> None:
            started[name] = clock()

        def after(*_: Any) -> None:
            seconds[name] += clock() - started[name]

        return before, after

    try:
        for name in names:
            before, after = hooks(name)
            layer = model.get_submodule(name)
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _resumed(partial: Path | None, of: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Samples]:
    if partial is None or not partial.exists():
        return {key: Samples() for key in models}
    found = read_object(partial)
    if found.get("of") != json.loads(json.dumps(of)):
        raise ConfigError(
            f"{partial} holds rounds of another measurement (model, formats, device or versions differ): remove it, "
            "or repeat that command to finish it"
        )
    return {key: Samples(*found["samples"][key]) for key in models}


def _table(
    layers: Sequence[LayerInfo], samples: Mapping[str, Samples], kernels: Mapping[str, Any], about: Mapping[str, Any]
) -> LatencyTable:
    quantizable = [layer for layer in layers if layer.quantizable]
    places = _places(quantizable)
    rows, errors = [], {}
    between = [
        whole - sum(values)
        for one in samples.values()
        for whole, *values in zip(one.whole, *one.layers.values(), strict=True)
    ]
    rest, low, high = (max(0.0, value) for value in _summary(between))
    rows.append(LatencyRow(BETWEEN, FP32, FP32, rest, low, high))
    for key, one in samples.items():
        weight, activation = key.split(",")
        total = rest
        for layer in quantizable:
            alike = [one.layers[name] for name in places[layer.name]]
            values = _summary([statistics.fmean(values) for values in zip(*alike, strict=True)])
            kernel = kernels[key].get(layer.name, FP32)
            shape = (layer.macs, layer.weight_numel, layer.out_channels)
            rows.append(LatencyRow(layer.name, weight, activation, *values, kernel, *shape))
            total += values[0]
        errors[key] = total / (1e3 * statistics.median(one.whole)) - 1
    worst = max(errors.values(), key=abs)
    return LatencyTable(tuple(rows), {**about, "worst_error_of_uniform_models": worst})


def _places(layers: Sequence[LayerInfo]) -> dict[str, list[str]]:
    """Layer -> those of its shape and place; a second reader of one tensor finds it quantized already."""
    found: dict[tuple[Any, ...], list[str]] = {}
    seen: set[int] = set()
    for layer in layers:
        key = (layer.kind, layer.macs, layer.weight_numel, layer.out_channels, layer.input_group in seen)
        seen.add(layer.input_group)
        found.setdefault(key, []).append(layer.name)
    return {name: names for names in found.values() for name in names}


def _summary(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles, in milliseconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e3 * median, 1e3 * low, 1e3 * high


def _conditions(model: nn.Module, device: torch.device, batch_size: int, rounds: int) -> dict[str, Any]:
    return {
        "estimated": False,
        "model": type(model).__name__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "capability": None if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "rounds": rounds,
        "warm_up": WARM_UP,
        "system": platform.platform(),
        "torch": torch.__version__,
        "fliqs_hf": __version__,
    }
