"""What card and report take from `validation.json` was checked; a record that is damaged or foreign is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.errors import CheckpointError
from fliqs_hf.hf.card import model_card
from fliqs_hf.hf.validation_record import Validation
from fliqs_hf.report.run_report import write_report
from fliqs_hf.runs.finished import FinishedRun
from tests.helpers.runs import change, write, write_run


def record(formats: str | None, **changes: Any) -> dict[str, Any]:
    """As `validate` writes one, with what card and report show."""

    def model(correct: int, milliseconds: float, size: int) -> dict[str, Any]:
        top1 = {"count": correct, "total": 1000, "value": correct / 1000, "low": 0.9, "high": 0.96}
        latency = {
            "batch_ms": milliseconds,
            "low_ms": 1.0,
            "high_ms": 3e4,
            "image_ms": milliseconds / 32,
            "batches": 9,
        }
        return {"top1": top1, "top5": {"value": 0.99}, "latency": latency, "checkpoint_bytes": size, "formats": None}

    gate = {
        "max_drop": 0.005, "confidence": 0.95, "lower": -0.0012, "upper": 0.00913, "verdict": "undecided",
        "images": 297_532,
    }  # fmt: skip
    return {
        "images": 1000, "confidence": 0.95, "original": model(930, 100.0, 400_000),
        "quantized": {**model(926, 20_900.0, 50_000), "formats": formats},
        "top1_drop": {"value": 0.004, "low": -0.001, "high": 0.009},
        "agreement": {"value": 0.98, "low": 0.97, "high": 0.99},
        "broken": 6, "repaired": 2, "p_value": 0.00001, "speedup": 0.005, "gate": gate,
        "conditions": {"dataset": "photos", "device": "A processor", "threads": 2, "batch_size": 32}, **changes,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A pilot: quantized and validated, never trained."""
    return pilot(tmp_path / "pilot")


def pilot(folder: Path) -> Path:
    write_run(folder)
    for name in ("metrics.jsonl", "policy.jsonl", "search_space.json", "report.html"):
        (folder / "fliqs" / name).unlink()
    shutil.rmtree(folder / "fliqs/figures")
    change(folder / "fliqs/results.json", accuracy=None, repaired=None, seconds=None)
    change(
        folder / "fliqs/settings.json", model_name_or_path="/models/vit", dataset_name=None, preset=None, command=None
    )
    write(folder / "fliqs/validation.json", record(FinishedRun.read(folder).allocation.summary()))
    return folder


def test_a_true_record_is_read(run: Path) -> None:
    found = Validation.of(FinishedRun.read(run).validation, FinishedRun.read(run).allocation.summary())
    assert found is not None
    assert (found.images, found.quantized.correct, found.dataset) == (1000, 926, "photos")
    assert Validation.of({}, "anything") is None


def bad(path: str, value: Any) -> Any:
    """(place, value): the record with one value replaced, or removed (None)."""
    return pytest.param(path, value, id=f"{path}={value!r:.20}")


@pytest.mark.parametrize(("path", "value"), [
    bad("images", "1000"), bad("images", 0), bad("images", True), bad("images", 1e3), bad("images", 999),
    bad("confidence", 95), bad("original", []), bad("quantized.top1", None), bad("quantized.top1.count", 1001),
    bad("quantized.top1.value", 0.5), bad("quantized.top1.low", "0.9"), bad("quantized.latency", 3),
    bad("quantized.latency.batch_ms", -1), bad("quantized.latency.image_ms", "<b>"), bad("top1_drop", None),
    bad("top1_drop.low", -2), bad("agreement.value", 1.1), bad("p_value", 2), bad("speedup", "fast"),
    bad("gate", "pass"), bad("gate.verdict", "pass"), bad("gate.upper", None), bad("gate.images", 1.5),
    bad("conditions", 0), bad("conditions.device", None), bad("conditions.threads", 0), bad("conditions.dataset", 5),
    bad("quantized.checkpoint_bytes", 0), bad("quantized.formats", 7),
])  # fmt: skip
def test_a_damaged_record_is_refused_by_name(run: Path, path: str, value: Any) -> None:
    data = json.loads((run / "fliqs/validation.json").read_text())
    *way, last = path.split(".")
    place = data
    for name in way:
        place = place[name]
    place[last] = value
    write(run / "fliqs/validation.json", data)
    for show in (model_card, write_report):
        with pytest.raises(CheckpointError, match=r"validation\.json.*validate the model again"):
            show(run)


def test_numbers_that_are_none_in_json_are_refused(run: Path) -> None:
    text = (run / "fliqs/validation.json").read_text()
    (run / "fliqs/validation.json").write_text(text.replace('"p_value": 1e-05', '"p_value": NaN'))
    with pytest.raises(CheckpointError, match=r"p_value is nan|cannot read"):
        model_card(run)


def test_a_record_of_another_model_is_refused(run: Path) -> None:
    write(run / "fliqs/validation.json", record("14 × W int8 / A int8"))
    with pytest.raises(CheckpointError, match="of a model in other formats"):
        model_card(run)


def test_the_pilots_card_has_what_was_measured_and_contradicts_nothing(run: Path) -> None:
    card = model_card(run, "user/pilot")
    table = card.text.split("## Results\n")[1].split("\n## ")[0]
    assert "| **this model** | 92.60 % (90.81 % to 94.06 %) | 926 / 1000 | 99.00 % |" in table
    assert "| original (fp32) | 93.00 % (" in table
    assert "Accuracy on `photos`, with Wilson intervals" in table
    assert "Drop of top-1 accuracy: 0.40 points" in card.text
    assert "Top-1 accuracy on `photos`: 92.60 % (95 % interval 90.00 % to 96.00 %), original 93.00 %" in card.text
    assert "Time of a batch of 32 images: 20.9 s, original 100 ms (medians; A processor, 2 threads)" in card.text
    assert "was not measured" not in card.text
    assert "Accuracy was measured on 1,000 images of `photos`" in card.text
    assert "**Undecided, so not passed: 1,000 images cannot tell" in card.text
    assert "The weights were" in card.text or "rounded, without calibration or training" in card.text
    assert "search" not in card.text.split("## Formats")[0]
    (result,) = card.data.eval_results[:1]
    assert (result.metric_value, result.dataset_name, result.dataset_type) == (0.926, "photos", "custom")


def test_results_of_the_run_and_of_the_validation_stand_side_by_side(run: Path) -> None:
    entry = {"top1": 0.917, "correct": 917, "n": 1000}
    change(run / "fliqs/results.json", accuracy={"searched": entry})
    text = model_card(run).text
    assert "917 / 1000" in text.split("### Original against")[0]
    assert "Top-1 accuracy on `photos`: 92.60 %" in text
