"""The models that a run folder has figures of: the original, this one, and those that it was compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost.hardware import HardwareShare
from fliqs_hf.cost.models import BOPS, known_costs
from fliqs_hf.errors import CheckpointError, FormatError
from fliqs_hf.formats import Format, parse
from fliqs_hf.hf.validation_record import ValidatedModel, Validation
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.tasks import recorded

CONFIDENCE = 0.95
FP32 = "fp32"
SEARCHED = "searched"


@dataclass(frozen=True)
class MeasuredAccuracy:
    """What a task measures of one model, and of counts of right answers the two-sided 95 % Wilson interval, and top-5
    where measured; fractions.

    Attributes:
        measure: "top-1", or what `value` is in another task, whose `correct`, `low` and `high` are None.
    """

    value: float
    images: int
    correct: int | None = None
    low: float | None = None
    high: float | None = None
    top5: float | None = None
    measure: str = "top-1"

    @property
    def key(self) -> str:
        return self.measure.replace(" ", "_").lower()

    @classmethod
    def of(cls, name: str, data: Mapping[str, Any]) -> MeasuredAccuracy:
        """From `{"top1", "top5", "correct", "n"}`, of which only top5 may be absent, or `{"measure", "value", "n"}`.

        Raises: CheckpointError: counts that are impossible or contradict top1, or a value that is no fraction.
        """
        if "measure" in data:
            return cls._of_task(name, data)
        try:
            correct, images, top1 = int(data["correct"]), int(data["n"]), float(data["top1"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"results.json: accuracy of {name!r}: needs top1, correct and n ({error!r})"
            ) from error
        # A stored fraction may be rounded, but never to another count.
        if not 0 <= correct <= images or images == 0 or abs(top1 - correct / images) >= 0.5 / images:
            raise CheckpointError(
                f"results.json: accuracy of {name!r}: top1={top1} contradicts {correct} correct of {images}; "
                "evaluate the model again"
            )
        top5 = data.get("top5")
        return cls.counted(correct, images, None if top5 is None else float(top5))

    @classmethod
    def counted(cls, correct: int, images: int, top5: float | None) -> MeasuredAccuracy:
        interval = binomtest(correct, images).proportion_ci(CONFIDENCE, method="wilson")
        return cls(correct / images, images, correct, float(interval.low), float(interval.high), top5)

    @classmethod
    def _of_task(cls, name: str, data: Mapping[str, Any]) -> MeasuredAccuracy:
        try:
            (measure, value), images = recorded(data), int(data["n"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"results.json: {name!r}: needs measure, value and n ({error!r})") from error
        if not (0 <= value <= 1 and images > 0):
            raise CheckpointError(f"results.json: {name!r}: {measure}={value} of {images} images cannot be")
        return cls(value, images, measure=measure)


@dataclass(frozen=True)
class Result:
    """One row of the table of results; None where it was not measured, or where no layer shapes were recorded.

    Attributes:
        costs: by the name of the cost, all that are registered; of the layers that can be quantized.
    """

    name: str
    accuracy: MeasuredAccuracy | None
    costs: Mapping[str, float | None] | None

    @property
    def label(self) -> str:
        return {FP32: "original (fp32)", SEARCHED: "this model"}.get(self.name, self.name.replace("_", " "))

    @property
    def bops(self) -> float | None:
        """Bit operations per image."""
        return None if self.costs is None else self.costs[BOPS.name]


def validation_of(run: FinishedRun) -> Validation | None:
    """Raises: CheckpointError: see `Validation.of`."""
    return Validation.of(run.validation, run.allocation.summary())


def hardware_of(run: FinishedRun) -> HardwareShare | None:
    """Where its bit operations run, if that was recorded. Raises: CheckpointError: a record that is none."""
    return None if run.results.hardware is None else HardwareShare.from_dict(run.results.hardware)


def measured_models(run: FinishedRun, validation: Validation | None) -> list[Result]:
    """The original first, this model last, with or without measurements; between them what results.json has besides.

    Accuracies are those of results.json or, where it has none of this model, those of the validation.
    """
    measured = _accuracies(run, validation)
    others = [name for name in measured if name not in (FP32, SEARCHED)]
    # The cost of the original needs no measurement, but without any result there is nothing to compare.
    names = [*([FP32] if measured or run.layers else []), *others, SEARCHED]
    rows = []
    for name in names:
        accuracy = measured.get(name)
        allocation = _allocation_of(name, run)
        if not run.layers or allocation is None:
            rows.append(Result(name, accuracy, None))
        else:
            rows.append(Result(name, accuracy, known_costs(run.layers, allocation)))
    return rows


def _accuracies(run: FinishedRun, validation: Validation | None) -> dict[str, MeasuredAccuracy]:
    recorded = run.results.accuracy
    if SEARCHED not in recorded and validation is not None:
        pair: dict[str, ValidatedModel] = {FP32: validation.original, SEARCHED: validation.quantized}
        return {
            name: MeasuredAccuracy.counted(model.correct, validation.images, model.top5)
            for name, model in pair.items()
        }
    return {name: MeasuredAccuracy.of(name, entry) for name, entry in recorded.items()}


def _allocation_of(name: str, run: FinishedRun) -> Allocation | None:
    """Of a row of the results: empty for the original, and None where its name does not say it."""
    if name == FP32:
        return Allocation({})
    if name == SEARCHED:
        return run.allocation
    if (fmt := _uniform_format(name)) is None:
        return None
    return Allocation.uniform(run.allocation, fmt)


def _uniform_format(name: str) -> Format | None:
    """`uniform_int4` -> INT4."""
    prefix, _, fmt = name.replace("-", "_").replace(" ", "_").partition("_")
    try:
        return parse(fmt) if prefix == "uniform" else None
    except FormatError:
        return None
