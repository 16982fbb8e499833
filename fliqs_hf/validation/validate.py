"""Compare a quantized model with its original on the user's own images, and decide whether it may take its place."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.checks import check_fields
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.hf.gate import NOT_ASKED, Gate
from fliqs_hf.hf.private import last_part
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, find_task
from fliqs_hf.training.labels import MatchLabels
from fliqs_hf.training.loading import device_of
from fliqs_hf.validation import page, statistics
from fliqs_hf.validation.comparison import WARM_UP_BATCHES, Example, PairedPredictions, compare
from fliqs_hf.validation.data import read
from fliqs_hf.validation.statistics import ClassChange, ConfidenceCalibration, Proportion
from fliqs_hf.version import __version__

FEWEST_TIMED_BATCHES = 5
"""Fewer timed batches than this give no latency: a median of two says nothing."""

WORST_CLASSES = 8
"""Classes shown with example images."""


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass over full batches, without image decoding and processing. `low_ms` and `high_ms` are the
    quartiles over batches; `image_ms` is the median batch divided by its images."""

    batch_ms: float
    low_ms: float
    high_ms: float
    image_ms: float
    batches: int


@dataclass(frozen=True)
class ModelResult:
    """One of the two models.

    Attributes:
        name: Hub name or folder name where known, else the class.
        formats: the number formats of its layers in short, or None.
        top1: share of the images that it gets right, whatever the task calls it. top5: None where the task has no more
            than 5 classes. calibration: None where it has no classes.
        weights_bytes: parameters and buffers in memory.
        working_bytes: peak memory of a forward pass beyond the weights; None where it cannot be measured.
        checkpoint_bytes: weight files as `save_pretrained` writes them; None for a model that has no such method.
        latency: None where there were too few full batches.
    """

    name: str
    formats: str | None
    top1: Proportion
    top5: Proportion | None
    calibration: ConfidenceCalibration | None
    weights_bytes: int
    working_bytes: int | None
    checkpoint_bytes: int | None
    latency: Latency | None


@dataclass(frozen=True)
class Drop:
    """Accuracy of the original minus that of the quantized model, as a fraction, with the two-sided interval of a
    paired bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WorstClass:
    """A class that lost images, with the first images that only the original gets right."""

    change: ClassChange
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class ValidationResult:
    """Everything that `validate` found. Fractions are between 0 and 1; the rendered forms show percentages.

    Attributes:
        measure: what the share of right images is called, "top-1 accuracy" of classifiers.
        agreement: images to which both models give the same class, right or wrong.
        broken, repaired: images that only the original, and only the quantized model, gets right.
        p_value: of McNemar's exact test that both are equally accurate.
        speedup: median over batches of (time of the original / time of the quantized model), or None.
        gate: None where no `max_drop` was given.
        class_changes: every class that has images, worst first; this and what follows of classes is empty where the
            task has no one class per image.
        class_names: by label.
        conditions: where and how it was measured; `labels`: what classes were matched by; `warnings`: what is known
            against the result.
    """

    images: int
    confidence: float
    original: ModelResult
    quantized: ModelResult
    top1_drop: Drop
    top5_drop: Drop | None
    agreement: Proportion
    broken: int
    repaired: int
    p_value: float
    speedup: float | None
    gate: Gate | None
    class_changes: tuple[ClassChange, ...]
    worst_classes: tuple[WorstClass, ...]
    class_names: tuple[str, ...]
    conditions: Mapping[str, Any]
    measure: str

    @property
    def exit_code(self) -> int:
        """0 if the gate passes or none was set, 1 if it fails or the images do not decide."""
        return 0 if self.gate is None or self.gate.verdict == "pass" else 1

    @property
    def more_images(self) -> int | None:
        """Images beyond those used that would settle an undecided gate at its limit."""
        return None if self.gate is None or self.gate.images is None else self.gate.images - self.images

    @property
    def passing_limit(self) -> float | None:
        """The smallest limit, a fraction, that these images would have passed; None where no limit was set."""
        return None if self.gate is None else self.gate.passing_limit

    @property
    def verdict(self) -> str:
        """The decision in plain words, with the limit and what the images at hand show."""
        return NOT_ASKED if self.gate is None else self.gate.sentence(self.top1_drop.value, self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Example images are left out, their row numbers are in."""
        data = dataclasses.asdict(self)
        for worst in data["worst_classes"]:
            for example in worst["examples"]:
                del example["jpeg"]
        said = ("verdict", "passing_limit", "more_images", "exit_code")
        return {**data, **{name: getattr(self, name) for name in said}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def to_markdown(self) -> str:
        return page.markdown(self)

    def to_html(self) -> str:
        """One self-contained page: no scripts, nothing loaded from elsewhere."""
        return page.html(self)


def validate(
    original: nn.Module,
    quantized: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    *,
    image_processor: Callable[..., Any],
    batch_size: int = 32,
    image_column: str = "image",
    label_column: str = "label",
    match_labels: MatchLabels = "name",
    max_drop: float | None = None,
    confidence: float = 0.95,
    device: str | torch.device | None = None,
    resamples: int = 9999,
    seed: int = 0,
    examples_per_class: int = 4,
    dataset_name: str | None = None,
    warnings: Sequence[str] = (),
    task: str = IMAGE_CLASSIFICATION.name,
) -> ValidationResult:
    """Compare two models on the same labelled images, in one pass over them.

    Args:
        original, quantized: models of the task, such as two that return logits. Both move to `device`.
        dataset: a `datasets.Dataset`, or anything that gives mappings with an image (PIL, or uint8 array) and a label.
            The images should be a random sample of those the model will meet, and none it was trained or searched on.
        image_processor: called as `image_processor(images, return_tensors="pt")["pixel_values"]`.
        match_labels: "name" matches a data set's class names with the models' by the rules of `training.labels`,
            "index" takes its numbers as they are.
        max_drop: the gate, in percentage points of top-1 accuracy, or of the share of images that another task calls
            right: the result passes only if the one-sided upper bound of the drop is below it.
        confidence: of every interval (two-sided) and of the gate (one-sided).
        device: default: where the original is.
        resamples, seed: of the bootstrap.
        examples_per_class: most example images kept of each class; 0 keeps images out of the report.
        dataset_name: what to call the images in the results; of a path only the last part is kept.
        warnings: what is known against the result, such as images that the model was trained on; shown with it.
        task: the name of a registered one. One without one class per image reads the data set itself, which is then a
            `datasets.Dataset`, and has neither top-5, calibration nor classes.
    Raises: ConfigError: a setting out of range, or a device that is not here. DataError: no images, or images, labels
        or label sets that do not fit. CheckpointError: a model returns NaN or infinities.
    """
    settings = _Settings(batch_size, max_drop, confidence, resamples, seed, examples_per_class, match_labels)
    kind, columns = find_task(task), (image_column, label_column)
    reading = read(kind, (original, quantized), dataset, image_processor, batch_size, columns, match_labels)
    place = device_of(device) if device is not None else next(original.parameters()).device
    length = math.ceil(len(dataset) / batch_size) if isinstance(dataset, Sized) else None
    found = compare(
        original.to(place), quantized.to(place), tqdm(reading.batches, total=length, desc="validate", unit="batch"),
        image_processor=reading.processor, batch_size=batch_size, device=place,
        examples_per_class=examples_per_class, task=kind,
    )  # fmt: skip
    data = {"dataset": None if dataset_name is None else last_part(dataset_name)}
    conditions = {**data, **_conditions(place, settings), "labels": reading.matched_by, "warnings": list(warnings)}
    return _result((original, quantized), found, settings, reading.names, conditions, kind.share)


@dataclass(frozen=True)
class _Settings:
    """Those of `validate`. Raises: ConfigError: one is out of range."""

    batch_size: int
    max_drop: float | None
    confidence: float
    resamples: int
    seed: int
    examples_per_class: int
    match_labels: MatchLabels

    def __post_init__(self) -> None:
        own = ("max_drop", "confidence", "batch_size", "resamples", "seed", "examples_per_class")
        check_fields(self, ConfigError, own)
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise ConfigError(f"max_drop={self.max_drop!r}: give percentage points between 0 and 100, such as 0.5")
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"confidence={self.confidence!r}: give a fraction above 0.5 and below 1, such as 0.95")
        for name, least in (("batch_size", 1), ("resamples", 100), ("seed", 0), ("examples_per_class", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value!r}: give {least} or more")
        if self.match_labels not in get_args(MatchLabels):
            raise ConfigError(f"match_labels={self.match_labels!r}: choose 'name' or 'index'")


def _result(
    models: tuple[nn.Module, nn.Module],
    found: PairedPredictions,
    settings: _Settings,
    names: tuple[str, ...] | None,
    conditions: Mapping[str, Any],
    measure: str,
) -> ValidationResult:
    """The statistics of what was found."""
    images, correct, confidence = len(found.agree), found.correct, settings.confidence
    if images < 2:
        raise DataError("the data set has one image; a validation needs at least two")
    broken, repaired = statistics.broken_and_repaired(correct[0], correct[1])

    def drop(right: NDArray[np.bool_]) -> Drop:
        interval = statistics.bootstrap_drop(right[0], right[1], confidence, settings.resamples, settings.seed)
        return Drop(float(right[0].mean() - right[1].mean()), *interval)

    changes = () if found.labels is None else statistics.class_changes(found.labels, correct[0], correct[1])
    worst = [change for change in changes[:WORST_CLASSES] if change.lost > 0]
    limit = settings.max_drop
    return ValidationResult(
        images=images,
        confidence=confidence,
        original=_model_result(models[0], found, 0, settings),
        quantized=_model_result(models[1], found, 1, settings),
        top1_drop=drop(correct),
        top5_drop=None if found.in_top5 is None else drop(found.in_top5),
        agreement=statistics.proportion(int(found.agree.sum()), images, confidence),
        broken=broken,
        repaired=repaired,
        p_value=statistics.mcnemar_p_value(broken, repaired),
        speedup=float(np.median(found.seconds[0] / found.seconds[1])) if _timed(found) else None,
        gate=None if limit is None else statistics.gate(broken, repaired, images, limit / 100, confidence, measure),
        class_changes=changes,
        worst_classes=tuple(WorstClass(change, found.examples.get(change.label, ())) for change in worst),
        class_names=names or tuple(map(str, range(found.classes or 0))),
        conditions=conditions,
        measure=measure,
    )


def _timed(found: PairedPredictions) -> bool:
    return len(found.seconds[0]) >= FEWEST_TIMED_BATCHES


def _model_result(model: nn.Module, found: PairedPredictions, i: int, settings: _Settings) -> ModelResult:
    correct, images, confidence = found.correct[i], len(found.agree), settings.confidence
    latency = None
    if _timed(found):
        low, median, high = (float(value) * 1e3 for value in np.quantile(found.seconds[i], [0.25, 0.5, 0.75]))
        latency = Latency(median, low, high, median / settings.batch_size, found.seconds.shape[1])
    allocation = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "allocation", None)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return ModelResult(
        name=_name(model),
        formats=allocation.summary() if isinstance(allocation, Allocation) else None,
        top1=statistics.proportion(int(correct.sum()), images, confidence),
        top5=None if found.in_top5 is None else statistics.proportion(int(found.in_top5[i].sum()), images, confidence),
        calibration=None if found.confidences is None else statistics.calibration(found.confidences[i], correct),
        weights_bytes=getattr(model, "file_bytes", 0)
        or sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        working_bytes=found.working_bytes[i],
        checkpoint_bytes=_checkpoint_bytes(model),
        latency=latency,
    )


def _name(model: nn.Module) -> str:
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if not Path(name).is_dir():
        return last_part(name)  # a page to pass on shows no paths
    folder = Path(name).resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name  # of a run folder


def _checkpoint_bytes(model: nn.Module) -> int | None:
    """Size of the weight files that `save_pretrained` writes, measured by writing them to a temporary folder; of an
    exported model that of its file."""
    if (size := getattr(model, "file_bytes", None)) is not None:
        return int(size)
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _conditions(device: torch.device, settings: _Settings) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "batch_size": settings.batch_size,
        "warm_up_batches": WARM_UP_BATCHES,
        "bootstrap": {
            "resamples": settings.resamples,
            "seed": settings.seed,
            "method": "percentile, paired by image",
        },
        "system": platform.platform(),
        "versions": {
            "fliqs_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
