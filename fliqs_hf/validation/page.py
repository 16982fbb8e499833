"""A validation as Markdown and as one self-contained HTML page, from the templates beside this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fliqs_hf.hf import templating
from fliqs_hf.validation import figures, statistics
from fliqs_hf.validation.comparison import MODELS

if TYPE_CHECKING:
    from fliqs_hf.validation.validate import ValidationResult


def markdown(result: ValidationResult) -> str:
    return templating.markdown("fliqs_hf.validation", "validate.md.j2", _context(result))


def html(result: ValidationResult) -> str:
    drop = result.top1_drop
    drawn = {
        "drop_figure": figures.drop_figure(drop.value, (drop.low, drop.high), result.gate, _short(result)),
        "calibration_figures": [
            (model, figures.calibration_figure(found, model))
            for model in MODELS
            if (found := getattr(result, model).calibration) is not None
        ],
    }
    return (
        templating.environment("fliqs_hf.validation")
        .get_template("validate.html.j2")
        .render(**_context(result), **drawn)
    )


def _short(result: ValidationResult) -> str:
    """What is measured, as heads of columns have it: "top-1"."""
    return result.measure.removesuffix(" accuracy")


def _context(result: ValidationResult) -> dict[str, Any]:
    changed = [change for change in result.class_changes if change.broken or change.repaired]
    return {
        "r": result,
        "measure": _short(result),
        "models": [(name, getattr(result, name)) for name in MODELS],
        "changed": changed,
        "significant": [change for change in changed if change.p_corrected < 1 - result.confidence],
        "detectable": statistics.smallest_detectable_loss(len(result.class_changes), result.confidence),
        "bins": statistics.BINS,
    }
