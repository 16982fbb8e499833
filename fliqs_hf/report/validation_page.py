"""A validation as Markdown and as one self-contained HTML page, from the templates beside this file."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import jinja2

from fliqs_hf.report import statistics, validation_figures
from fliqs_hf.report.comparison import MODELS

if TYPE_CHECKING:
    from fliqs_hf.report.validate import ValidationResult


def markdown(result: ValidationResult) -> str:
    return _environment().get_template("validate.md.j2").render(**_context(result))


def html(result: ValidationResult) -> str:
    drop = result.top1_drop
    figures = {
        "drop_figure": validation_figures.drop_figure(drop.value, (drop.low, drop.high), result.gate),
        "calibration_figures": [
            (model, validation_figures.calibration_figure(getattr(result, model).calibration, model))
            for model in MODELS
        ],
    }
    return _environment().get_template("validate.html.j2").render(**_context(result), **figures)


def _context(result: ValidationResult) -> dict[str, Any]:
    changed = [change for change in result.class_changes if change.broken or change.repaired]
    return {
        "r": result,
        "models": [(name, getattr(result, name)) for name in MODELS],
        "changed": changed,
        "significant": [change for change in changed if change.p_corrected < 1 - result.confidence],
        "detectable": statistics.smallest_detectable_loss(len(result.class_changes), result.confidence),
        "bins": statistics.BINS,
    }


def points(fraction: float) -> str:
    """Percentage points of a fraction, with a proper minus sign and no negative zero."""
    return f"{round(fraction * 100, 2) + 0.0:.2f}".replace("-", "−")


def _size(count: float | None) -> str:
    if count is None:
        return "not measured"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fliqs_hf.report"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda fraction: f"{fraction * 100:.2f} %",
        points=points,
        size=_size,
        p_value=_p_value,
        data_uri=lambda jpeg: "data:image/jpeg;base64," + base64.b64encode(jpeg).decode(),
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    return environment
