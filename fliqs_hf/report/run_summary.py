"""The top of a run's report: the answer in words, and the four figures that it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fliqs_hf import wording
from fliqs_hf.cost.target import described
from fliqs_hf.hf.private import last_part
from fliqs_hf.hf.results import FP32, SEARCHED, MeasuredAccuracy

if TYPE_CHECKING:
    from fliqs_hf.report.run_report import RunReport

#: What `fliqs-hf validate` needs; the report has no names to fill in that the reader does not know.
VALIDATE = "fliqs-hf validate ORIGINAL THIS_FOLDER --dataset_name IMAGES --max_drop 0.5"


def banner(report: RunReport) -> tuple[str, str, str, str, str]:
    """(class of the style sheet, a few words, what they rest on, the command that decides if nothing has, advice)."""
    found = report.validation
    if found is not None and found.gate is not None:
        gate = found.gate
        drop, images = found.drop.value, found.images
        return gate.verdict, gate.word, gate.explanation(drop, images), "", gate.advice(drop, images)
    if found is not None:
        loss, low, high = (wording.points(value) for value in (found.drop.value, found.drop.low, found.drop.high))
        text = (
            f"On {wording.count(found.images)} images the loss of {found.measure} is {loss} points "
            f"({wording.level(found.confidence)} interval {low} to {high}). Say which loss is acceptable to get a "
            "decision:"
        )
        return "none", "Compared, but not decided", text, VALIDATE, ""
    known = "The accuracy below is that on the search's own test images" if _accuracy(report, SEARCHED) else (
        "Its accuracy is not known yet"
    )  # fmt: skip
    return (
        "none",
        "Not validated yet",
        f"{known}. Whether the model may take the original's place decides",
        VALIDATE,
        "",
    )


def tiles(report: RunReport) -> list[tuple[str, str, str]]:
    """(name, figure, explanation): accuracy, size, speed, cost; what was not measured says so."""
    return [_accuracy_tile(report), _size_tile(report), _speed_tile(report), _cost_tile(report)]


def measured_on(report: RunReport) -> str:
    """Where the accuracies in the table of results come from: "on …" or "in …"."""
    if SEARCHED in report.run.results.accuracy:
        return "at the end of the run, on its own test images"
    dataset = report.validation.dataset if report.validation else None
    return f"in the validation{f' on {last_part(dataset)}' if dataset else ''}"


def _accuracy(report: RunReport, name: str) -> MeasuredAccuracy | None:
    return next((result.accuracy for result in report.results if result.name == name), None)


def _accuracy_tile(report: RunReport) -> tuple[str, str, str]:
    found, name = report.validation, "Accuracy"
    if found is not None:
        top1 = found.quantized.top1
        where = f" of {last_part(found.dataset)}" if found.dataset else ""
        return name, wording.percent(top1.value), (
            f"right on {wording.count(found.images)} images{where} ({wording.level(found.confidence)} interval "
            f"{wording.percent(top1.low)} to {wording.percent(top1.high)}), the original "
            f"{wording.percent(found.original.top1.value)}"
        )  # fmt: skip
    searched, fp32 = _accuracy(report, SEARCHED), _accuracy(report, FP32)
    if searched is None:
        return name, "unknown", "not measured yet"
    text = f"{searched.measure} over {wording.count(searched.images)} images"
    if searched.low is not None and searched.high is not None:
        text = (
            f"right on {wording.count(searched.images)} images (95 % interval {wording.percent(searched.low)} to "
            f"{wording.percent(searched.high)})"
        )
    if fp32 is not None:
        change = wording.change(searched.value - fp32.value)
        text += f", {change} points against the original in fp32 ({wording.percent(fp32.value)})"
    return name, wording.percent(searched.value), text


def _size_tile(report: RunReport) -> tuple[str, str, str]:
    now = sum(file.stat().st_size for file in report.run.weight_files)
    before = report.validation.original.checkpoint_bytes if report.validation else None
    before = before or report.run.results.fp32_bytes
    if before is None:
        return "Size", wording.size(now), "weight files"
    return (
        "Size",
        wording.smaller(before / now),
        f"weight files: {wording.size(now)} instead of {wording.size(before)}",
    )


def _speed_tile(report: RunReport) -> tuple[str, str, str]:
    found = report.validation
    if found is None:
        return "Speed", "unknown", "not measured yet"
    if found.speedup is None or found.quantized.image_ms is None or found.original.image_ms is None:
        return "Speed", "unknown", f"too few images to time batches of {found.batch_size}"
    return "Speed", wording.speed(found.speedup), (
        f"{wording.milliseconds(found.quantized.image_ms)} per image instead of "
        f"{wording.milliseconds(found.original.image_ms)}, on {found.device} in batches of {found.batch_size}"
    )  # fmt: skip


def _cost_tile(report: RunReport) -> tuple[str, str, str]:
    costs = {result.name: result.bops for result in report.results}
    now, before = costs.get(SEARCHED), costs.get(FP32)
    if not now or not before:
        return "Cost", "unknown", "no layer shapes on record"
    text = f"bit operations per image: {wording.engineering(now)} instead of {wording.engineering(before)}"
    used = report.run.results.cost.get("target_ratio")
    if used is not None:
        aim = report.run.results.target
        text += f"; {wording.percent(used)} of the target{f' ({described(aim)})' if aim else ''}"
    return "Cost", f"{wording.factor(before / now)} less", text
