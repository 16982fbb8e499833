"""One pass of two models over the same images: predictions, and what each forward pass took."""

from __future__ import annotations

import ctypes
import gc
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fliqs_hf.errors import CheckpointError, DataError
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.timing import device_clock
from fliqs_hf.training.labels import checked_label
from fliqs_hf.validation.data import Batch

MODELS = ("original", "quantized")

WARM_UP_BATCHES = 2
"""The first batch warms up, the second measures memory, the others are timed."""

THUMBNAIL = 96
"""Longest side of an example image, in pixels."""


@dataclass(frozen=True)
class Example:
    """An image that the original gets right and the quantized model wrong. `confidences` and `predictions` are of
    (original, quantized); `index` is its row in the data set, `jpeg` a thumbnail."""

    index: int | str
    label: int
    predictions: tuple[int, int]
    confidences: tuple[float, float]
    jpeg: bytes


@dataclass(frozen=True)
class PairedPredictions:
    """What both models did. The first axis of an array with two is the model: original, quantized.

    Attributes:
        correct: bool [2, images], whether the answer is right. agree: bool [images], whether both give the same one.
        labels: int64 [images]; it and what follows are None where the task has no one class per image.
        confidences: float64 [2, images], the answers' probabilities.
        in_top5: bool [2, images], or None where there are no more than 5 classes.
        classes: size of the models' output.
        examples: by class, the first ones in the order of the data set.
        seconds: float64 [2, timed batches], forward passes of full batches, both models in turn.
        working_bytes: peak memory of one forward pass of a full batch beyond what was allocated before, or None where
            it cannot be measured.
    """

    correct: NDArray[np.bool_]
    agree: NDArray[np.bool_]
    labels: NDArray[np.int64] | None
    confidences: NDArray[np.float64] | None
    in_top5: NDArray[np.bool_] | None
    classes: int | None
    examples: dict[int, tuple[Example, ...]]
    seconds: NDArray[np.float64]
    working_bytes: tuple[int | None, int | None]

    @classmethod
    def of(
        cls,
        batches: Sequence[tuple[Outputs, Outputs]],
        labels: NDArray[np.int64] | None,
        examples: dict[int, list[Example]],
        seconds: list[list[float]],
        working: list[int | None],
    ) -> PairedPredictions:
        """Raises: DataError: no batches."""
        if not batches:
            raise DataError("the data set has no images; a validation needs at least two")

        def joined(name: str) -> Any:
            if getattr(batches[0][0], name) is None:
                return None
            return np.stack([np.concatenate([getattr(pair[i], name) for pair in batches]) for i in (0, 1)])

        return cls(
            joined("right"),
            np.concatenate([pair[0].same for pair in batches]),
            labels,
            joined("confidences"),
            joined("in_top5"),
            batches[0][0].classes,
            {label: tuple(kept) for label, kept in examples.items()},
            np.array(seconds, dtype=np.float64).reshape(-1, 2).T,
            (working[0], working[1]),
        )


def compare(
    original: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Batch],
    *,
    image_processor: Callable[..., Any],
    batch_size: int,
    device: torch.device,
    examples_per_class: int,
    task: Task = IMAGE_CLASSIFICATION,
) -> PairedPredictions:
    """Run both models, already on `device`, over `batches`. The order of the two changes from batch to batch.

    Raises: DataError: no images, or outputs that do not match. CheckpointError: a model returns NaN or infinities.
    """
    models = (original, quantized)
    labels: list[NDArray[Any]] = []
    outputs: list[tuple[Outputs, Outputs]] = []
    seconds: list[list[float]] = []
    working: list[int | None] = [None, None]
    examples: dict[int, list[Example]] = {}
    clock = device_clock(device)
    with evaluation(original), evaluation(quantized), torch.inference_mode():
        for number, batch in enumerate(batches):
            pixels = _pixels(image_processor, batch).to(device)
            full = len(batch.images) == batch_size
            predictions: list[Tensor] = [pixels, pixels]
            elapsed = [0.0, 0.0]
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                if number == 1 and full:
                    with peak_memory(device) as peak:
                        predictions[i] = _prediction(models[i], pixels, task)
                    working[i] = peak.working_bytes
                else:
                    start = clock()
                    predictions[i] = _prediction(models[i], pixels, task)
                    elapsed[i] = clock() - start
            if full and number >= WARM_UP_BATCHES:
                seconds.append(elapsed)
            pair = _outputs(predictions, batch, task)
            outputs.append(pair)
            if task.class_per_image:
                labels.append(batch.labels)
                _keep_examples(examples, batch, pair, examples_per_class)
    return PairedPredictions.of(outputs, np.concatenate(labels) if labels else None, examples, seconds, working)


@dataclass(frozen=True)
class Outputs:
    """Of one model for one batch, each [images], as in `PairedPredictions`; `answers` [images, ...]; `same`: where
    both models give the same one."""

    answers: NDArray[Any]
    right: NDArray[np.bool_]
    same: NDArray[np.bool_]
    confidences: NDArray[np.float64] | None = None
    in_top5: NDArray[np.bool_] | None = None
    classes: int | None = None


def _pixels(image_processor: Callable[..., Any], batch: Batch) -> Tensor:
    try:
        values: Tensor = image_processor(batch.images, return_tensors="pt")["pixel_values"]
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"images {batch.rows[0]} to {batch.rows[-1]} are not taken by {type(image_processor).__name__}: "
            f"{str(error) or type(error).__name__}"
        ) from error
    return values


def _prediction(model: nn.Module, pixels: Tensor, task: Task) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), pixels.dtype)
    return task.prediction(model(pixels.to(dtype)))


def _outputs(predictions: list[Tensor], batch: Batch, task: Task) -> tuple[Outputs, Outputs]:
    shapes = [tuple(values.shape) for values in predictions]
    if shapes[0] != shapes[1] or shapes[0][:1] != (len(batch.rows),):
        raise DataError(
            f"the original returns predictions of shape {shapes[0]}, the quantized model {shapes[1]}, for "
            f"{len(batch.rows)} images; both must be alike, with one for each image"
        )
    classes = task.size(predictions[0]) if task.class_per_image else None
    if classes is not None and batch.labels.max() >= classes:
        checked_label(batch.labels.max(), classes, f"image {batch.rows[int(batch.labels.argmax())]}", "the models'")
    targets = torch.from_numpy(batch.labels)
    finite = [_finite(values.double().cpu(), name, batch) for name, values in zip(MODELS, predictions, strict=True)]
    answers = [task.answers(values) for values in finite]
    same = task.same(*answers) == 1
    results = []
    for values, answer in zip(finite, answers, strict=True):
        sure = None if classes is None else task.confidence(values).numpy()
        first = None if classes is None or classes <= 5 else task.among_first(values, targets, 5).numpy()
        right = task.right(answer, targets)
        results.append(Outputs(answer.numpy(), right.numpy(), same.numpy(), sure, first, classes))
    return results[0], results[1]


def _finite(values: Tensor, name: str, batch: Batch) -> Tensor:
    finite = values.isfinite().reshape(len(values), -1).all(1)
    if not finite.all():
        row = batch.rows[int((~finite).nonzero()[0])]
        raise CheckpointError(
            f"the {name} model returns NaN or infinity for image {row}: damaged weights, or a dtype too narrow"
        )
    return values


def _keep_examples(examples: dict[int, list[Example]], batch: Batch, pair: tuple[Outputs, Outputs], most: int) -> None:
    original, quantized = pair
    assert original.confidences is not None and quantized.confidences is not None
    broken = original.right & ~quantized.right
    for i in np.flatnonzero(broken):
        label = int(batch.labels[i])
        kept = examples.setdefault(label, [])
        if len(kept) < most:
            predictions = (int(original.answers[i]), int(quantized.answers[i]))
            confidences = (float(original.confidences[i]), float(quantized.confidences[i]))
            kept.append(Example(batch.rows[i], label, predictions, confidences, _thumbnail(batch.images[i])))


def _thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


@dataclass
class PeakMemory:
    working_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Peak memory inside the block beyond what was in use before.

    On CUDA from PyTorch's allocator. On the CPU from the kernel's high-water mark of resident memory, on Linux where
    it can be reset; the heap is trimmed first, so that memory freed earlier does not hide what the block takes.
    Elsewhere `working_bytes` stays None.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.working_bytes = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and (resident := _reset_high_water()) is not None:
        yield peak
        high = _status_bytes("VmHWM")
        peak.working_bytes = None if high is None else max(0, high - resident)
    else:
        yield peak


def _reset_high_water() -> int | None:
    """Resident bytes now, with the high-water mark reset to them; None where the system does not allow it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    resident, high = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    # A reset that was accepted but ignored leaves the old mark far above.
    if resident is None or high is None or high - resident > 2**20:
        return None
    return resident


def _status_bytes(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
