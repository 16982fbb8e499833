"""What a run folder's `validation.json` says, checked value by value before anything is shown of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fliqs_hf.errors import CheckpointError
from fliqs_hf.hf.gate import ACCURACY, NOT_ASKED, Gate


@dataclass(frozen=True)
class Estimate:
    """A fraction and the two-sided interval [low, high] of it, at the confidence of the validation."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ValidatedModel:
    """One of the two models. `batch_ms`, `image_ms`: median forward pass of a batch, and of that per image; None where
    it was not timed. `checkpoint_bytes`: its weight files; None where unknown."""

    correct: int
    top1: Estimate
    top5: float | None
    batch_ms: float | None
    image_ms: float | None
    checkpoint_bytes: int | None


@dataclass(frozen=True)
class Validation:
    """What is shown of a validation; fractions between 0 and 1.

    Attributes:
        dataset: name of the images, as the user gave it; None where it was not recorded.
        speedup: median of (time of the original / time of the quantized model); None where it was not timed.
        gate: None where no limit was set. measure: what is measured, in words.
    """

    images: int
    confidence: float
    original: ValidatedModel
    quantized: ValidatedModel
    drop: Estimate
    agreement: Estimate
    p_value: float
    speedup: float | None
    gate: Gate | None
    dataset: str | None
    device: str
    threads: int
    batch_size: int
    measure: str = ACCURACY

    @property
    def verdict(self) -> str:
        return NOT_ASKED if self.gate is None else self.gate.sentence(self.drop.value, self.images)

    @classmethod
    def of(cls, record: Mapping[str, Any], formats: str) -> Validation | None:
        """Of the record of a run folder; None where there is none.

        Args: formats: summary of the allocation of the model in that folder.
        Raises: CheckpointError: a value that is missing, of another type or impossible; a record of another model.
        """
        if not record:
            return None
        top, conditions = _Reader(record), _Reader(record).part("conditions")
        validated = top.part("quantized").text("formats", optional=True)
        # Formats of equally many layers have no order of their own.
        if validated is not None and sorted(validated.split(", ")) != sorted(formats.split(", ")):
            raise CheckpointError(
                f"validation.json is of a model in other formats ({validated}) than this one ({formats}); "
                "validate the model again"
            )
        images = top.whole("images", 1)
        return cls(
            images=images,
            confidence=top.number("confidence", 0, 1),
            original=_model(top.part("original"), images),
            quantized=_model(top.part("quantized"), images),
            drop=_estimate(top.part("top1_drop"), -1),
            agreement=_estimate(top.part("agreement"), 0),
            p_value=top.number("p_value", 0, 1),
            speedup=top.number("speedup", 0) if record.get("speedup") is not None else None,
            gate=_gate(top.part("gate")) if record.get("gate") is not None else None,
            dataset=conditions.text("dataset", optional=True),
            device=conditions.text("device") or "",
            threads=conditions.whole("threads", 1),
            batch_size=conditions.whole("batch_size", 1),
            measure=top.text("measure", optional=True) or ACCURACY,
        )


@dataclass(frozen=True)
class _Reader:
    """Values of a JSON object by name and type."""

    data: Mapping[str, Any]
    where: str = ""

    def _bad(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"validation.json: {self.where}{name} is {self.data.get(name)!r:.60}, not {wanted}; "
            "validate the model again"
        )

    def part(self, name: str) -> _Reader:
        value = self.data.get(name)
        if not isinstance(value, Mapping):
            raise self._bad(name, "an object")
        return _Reader(value, f"{self.where}{name}.")

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or (
            not math.isfinite(value)
        ):  # fmt: skip
            raise self._bad(name, "a number" + (f" from {low:g} to {high:g}" if high < math.inf else ""))
        return float(value)

    def whole(self, name: str, low: int, high: float = math.inf) -> int:
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._bad(name, f"a whole number from {low}" + (f" to {high:.0f}" if high < math.inf else ""))
        return value

    def text(self, name: str, optional: bool = False) -> str | None:
        value = self.data.get(name)
        if not isinstance(value, str) and not (optional and value is None):
            raise self._bad(name, "text")
        return value


def _model(data: _Reader, images: int) -> ValidatedModel:
    top1 = data.part("top1")
    correct = top1.whole("count", 0, images)
    estimate = _estimate(top1, 0)
    if top1.whole("total", 1) != images or abs(estimate.value - correct / images) > 1e-9:
        raise CheckpointError(
            f"validation.json: {data.where}top1 contradicts itself: {correct} right of {images} images is not "
            f"{estimate.value}; validate the model again"
        )
    latency = data.part("latency") if data.data.get("latency") is not None else None
    return ValidatedModel(
        correct=correct,
        top1=estimate,
        top5=data.part("top5").number("value", 0, 1) if data.data.get("top5") is not None else None,
        batch_ms=latency.number("batch_ms", 0) if latency else None,
        image_ms=latency.number("image_ms", 0) if latency else None,
        checkpoint_bytes=data.whole("checkpoint_bytes", 1) if data.data.get("checkpoint_bytes") is not None else None,
    )


def _estimate(data: _Reader, least: float) -> Estimate:
    return Estimate(*(data.number(name, least, 1) for name in ("value", "low", "high")))


def _gate(data: _Reader) -> Gate:
    limit, confidence = data.number("max_drop", 0, 1), data.number("confidence", 0, 1)
    lower, upper = data.number("lower", -1, 1), data.number("upper", -1, 1)
    verdict = "pass" if upper < limit else "fail" if lower > limit else "undecided"
    if data.text("verdict") != verdict:
        raise CheckpointError(
            f"validation.json: the verdict {data.data.get('verdict')!r:.60} contradicts the bounds {lower} and "
            f"{upper} at the limit {limit}; validate the model again"
        )
    images = data.whole("images", 1) if data.data.get("images") is not None else None
    measure = data.text("measure", optional=True) or ACCURACY
    return Gate(limit, confidence, lower, upper, verdict, images, measure)  # type: ignore[arg-type]
