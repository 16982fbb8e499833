"""What other formats would have done to the delivered model: one decision changed at a time, on held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.nn import QuantizerSettings, packed_layers
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.swap import packed_version, standing_in
from fliqs_hf.pipeline.job import Job
from fliqs_hf.records import MeasuredAlternatives
from fliqs_hf.selection import SearchSpace
from fliqs_hf.selection.changes import changes
from fliqs_hf.selection.neighbours import Way, neighbours
from fliqs_hf.training.data import Loader

#: Multiply-accumulates of all forward passes together, on a CPU and elsewhere, that choose the number of images. With
#: the 130 alternatives of DeiT-Tiny's 50 decisions, 50 images at 224 pixels, it is about a minute on two CPU cores.
_CPU_MACS, _DEVICE_MACS = 2**43, 2**47
#: Images at least and at most, and most of their bytes, as they are held for all passes.
_LEAST, _MOST, _MOST_BYTES = 16, 4096, 2**30


@torch.no_grad()
def measure_alternatives(
    job: Job,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    space: SearchSpace,
    allocation: Allocation,
    signals: Sequence[Sequence[float]],
) -> MeasuredAlternatives | None:
    """The next formats of each decision, on `alternative_images` of the job's held-out images.

    Args:
        model: packed in `allocation`, in memory; it is left as it is.
        layers: those that were packed, with their trained weights, by name.
        signals: of each decision and format, lower is better: they choose among formats of as many bits.
    Returns: None where the job wants none, or there are fewer than two images.
    """
    start = time.perf_counter()
    choice = space.choice(allocation)
    rows = next_formats(space, choice.tolist(), signals)
    images = min(images_for(job, space, len(rows)), len(job.eval_data))
    if images < 2:
        return None
    losses = losses_of(job, model, images)
    with evaluation(model):
        found = differences(model, layers, space, choice, [row[1:] for row in rows], job.quantizers, losses)
    made: dict[str, dict[str, Any]] = {decision.name: {} for decision in space.decisions}
    for (_, index, k), change in zip(rows, changes(found, [way for way, *_ in rows]), strict=True):
        made[space.decisions[index].name][space.formats[k].name] = asdict(change)
    return MeasuredAlternatives(images=images, seconds=time.perf_counter() - start, changes=made)


def differences(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    space: SearchSpace,
    choice: Tensor,
    rows: Sequence[tuple[int, int]],
    settings: QuantizerSettings,
    losses: Callable[[], Tensor],
) -> Tensor:
    """Losses of a packed model with one decision changed, less those of the model as it is.

    Args:
        layers: as of `measure_alternatives`. choice: the model's, int64 [D].
        rows: decision and its other format, as indices.
        losses: of each image, [images].
    Returns: float64 on the CPU, [rows, images].
    """
    packed, now = packed_layers(model), space.allocation(choice)
    before = losses().double().cpu()
    found = before.new_empty(len(rows), len(before))
    for row, (index, k) in enumerate(tqdm(rows, desc="alternatives", leave=False)):
        other = choice.clone()
        other[index] = k
        pairs = {}
        for name, formats in space.allocation(other).items():
            if formats != now[name]:
                pairs[packed[name]] = packed_version(layers[name], formats, settings)
                pairs[packed[name]].choose_kernels(packed[name].kernels, packed[name].weight_cache)
        with standing_in(pairs):
            found[row] = losses().double().cpu() - before
    return found


def next_formats(
    space: SearchSpace, choice: Sequence[int], signals: Sequence[Sequence[float]]
) -> list[tuple[Way, int, int]]:
    """Which way, the decision and its other format, as indices."""
    decisions = enumerate(zip(choice, space.allowed.tolist(), signals, strict=True))
    return [
        (way, index, k)
        for index, (chosen, allowed, own) in decisions
        for way, k in neighbours(space.formats, allowed, chosen, own).items()
    ]


def images_for(job: Job, space: SearchSpace, rows: int) -> int:
    """How many held-out images so many alternatives are measured on, if there are as many."""
    if (given := job.args.alternative_images) is not None:
        return given
    budget = _CPU_MACS if job.accelerator.device.type == "cpu" else _DEVICE_MACS
    passes = budget // max(1, sum(layer.macs for layer in space.layers))
    image = job.eval_data[0][0]
    most = min(_MOST, _MOST_BYTES // (image.numel() * image.element_size()))
    return max(_LEAST, min(most, passes // max(1, rows)))


def losses_of(job: Job, model: nn.Module, count: int) -> Callable[[], Tensor]:
    """Of the model on so many of the held-out images, the same at each call."""
    order = torch.randperm(len(job.eval_data), generator=torch.Generator().manual_seed(job.args.seed))
    loader = Loader(Subset(job.eval_data, order[:count].tolist()), job.args.per_device_eval_batch_size)
    device = job.accelerator.device
    batches = [(images.to(device), targets.to(device)) for images, targets in loader]

    def losses() -> Tensor:
        found = []
        for images, targets in batches:
            with job.accelerator.autocast():
                predictions = job.task.prediction(model(images)).float()
            pairs = zip(predictions.split(1), targets.split(1), strict=True)
            found += [job.task.loss(prediction, target) for prediction, target in pairs]
        return torch.stack(found)

    return losses
