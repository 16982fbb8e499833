"""The top of the report: a verdict and four figures, in words that fit what was done."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.hf.gate import Gate
from fliqs_hf.hf.provenance import Provenance
from fliqs_hf.report.run_report import RunReport, write_report
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.validation.statistics import gate
from tests.helpers.runs import change, write, write_run
from tests.hf.test_validation_record import pilot


def top_of(page: str) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """(class, word, text of the banner), (name, figure, text of each tile), and all words of the page."""
    page = html.unescape(page).replace("\u00a0", " ")
    verdicts = re.findall(r'<p class="verdict (\w+)"><b>(.*?)</b>(.*?)</p>', page)
    assert len(verdicts) == 1
    tiles = re.findall(r'<div class="card"><i>(.*?)</i><b>(.*?)</b><span>(.*?)</span></div>', page)
    body = page.split("<body>")[1]
    first = [body.index(mark) for mark in ('class="verdict', 'class="card"', "<h2>")]
    assert first == sorted(first), "the banner comes first, then the tiles"
    return verdicts[0], tiles, body.split("<script>")[0]


def test_the_pilots_report_has_the_verdict_and_what_it_rests_on(tmp_path: Path) -> None:
    run = pilot(tmp_path / "pilot")
    banner, tiles, words = top_of(write_report(run).read_text())
    report = RunReport.read(run)
    assert report.validation is not None
    assert report.validation.gate is not None
    assert banner == ("undecided", "Undecided, so not passed", report.validation.gate.explanation(0.004, 1000))
    assert report.validation.gate.advice(0.004, 1000) in words
    assert [tile[:2] for tile in tiles] == [
        ("Accuracy", "92.60 %"),
        ("Size", tiles[1][1]),
        ("Speed", "200 × slower"),
        ("Cost", tiles[3][1]),
    ]
    assert "right on 1,000 images of photos (95 % interval 90.00 % to 96.00 %), the original 93.00 %" in tiles[0][2]
    assert tiles[2][2] == "653 ms per image instead of 3.12 ms, on A processor in batches of 32"
    assert tiles[1][1].endswith("× smaller")
    assert tiles[1][2].endswith(" kB instead of 400 kB")
    assert tiles[3][1].endswith("× less")
    for word in ("trained", "training images", "policy", "The search", "a search", "Why each layer", "e+0"):
        assert word not in words, word


def test_without_a_limit_and_without_a_validation(tmp_path: Path) -> None:
    run = pilot(tmp_path / "pilot")
    change(run / "fliqs/validation.json", gate=None, speedup=None)
    banner, tiles, _ = top_of(write_report(run).read_text())
    assert banner[:2] == ("none", "Compared, but not decided")
    assert "the loss of top-1 accuracy is 0.40 points (95 % interval −0.10 to 0.90)" in banner[2]
    assert tiles[2] == ("Speed", "unknown", "too few images to time batches of 32")
    (run / "fliqs/validation.json").unlink()
    banner, tiles, _ = top_of(write_report(run).read_text())
    assert banner[1] == "Not validated yet"
    assert "<code>fliqs-hf validate " in banner[2]
    assert tiles[0] == ("Accuracy", "unknown", "not measured yet")


def test_a_searched_run_shows_what_the_search_measured(tmp_path: Path) -> None:
    write_run(tmp_path)
    banner, tiles, words = top_of(write_report(tmp_path).read_text())
    assert banner[:2] == ("none", "Not validated yet")
    assert "accuracy below is that on the search's own test images" in banner[2]
    assert tiles[0][1] == "91.70 %"
    assert "99.31 % of the target (the bit operations of a uniform 4-bit model)" in tiles[3][2]
    assert "A search chose the number format of every layer, and the weights were trained for it." in words


#: Settings and records of a run -> what is said of it.
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "searched": ({}, ("metrics.jsonl", "search_space.json"), "a search chose the number format of every layer, and "
                 "the weights were trained for it"),
    "allocated": ({"calibration": "photos"}, ("search_space.json",), "the number format of every layer was chosen by "
                  "how much it disturbs the model, and calibration images decided how to round the weights"),
    "calibrated": ({"calibration": "photos"}, (), "the number formats were given, and calibration images decided"),
    "rounded": ({"calibration": None}, (), "the weights were rounded, without calibration or training"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_words_fit_what_was_done(tmp_path: Path, kind: str) -> None:
    settings, records, said = KINDS[kind]
    write_run(tmp_path)
    change(tmp_path / "fliqs/settings.json", **settings)
    for name in ("metrics.jsonl", "search_space.json"):
        if name not in records:
            (tmp_path / "fliqs" / name).unlink()
    provenance = Provenance.of(FinishedRun.read(tmp_path))
    assert said in provenance.sentence.lower()
    assert provenance.sentence in html.unescape(write_report(tmp_path).read_text())


def test_uniform_formats_are_called_so_and_nothing_is_said_without_a_record(tmp_path: Path) -> None:
    write_run(tmp_path, formats=("int4",))
    for name in ("metrics.jsonl", "search_space.json"):
        (tmp_path / "fliqs" / name).unlink()
    assert Provenance.of(FinishedRun.read(tmp_path)).sentence.startswith(
        "All layers were given the same number formats"
    )
    shutil.rmtree(tmp_path / "fliqs")
    assert Provenance.of(FinishedRun.read(tmp_path)).sentence == ""


def test_a_record_of_another_type_is_named(tmp_path: Path) -> None:
    from fliqs_hf.errors import CheckpointError

    write_run(tmp_path)
    change(tmp_path / "fliqs/results.json", fp32_bytes="many")
    with pytest.raises(CheckpointError, match="a value of another type"):
        write_report(tmp_path)


def test_an_undecided_gate_names_its_limit_and_what_would_have_passed() -> None:
    """The figure that a user met: 296,532 more images, of which limit?"""
    found = gate(6, 2, 1000, 0.0045, 0.95)
    assert found.verdict == "undecided"
    text = found.sentence(0.004, 1000)
    assert "1,000 images cannot tell whether the quantized model loses less than the limit of 0.45 points" in text
    assert f"a limit of {100 * found.passing_limit:.2f} or more would have passed" in text
    assert found.images is not None
    assert (
        f"To decide a limit of 0.45 points when the observed loss is 0.40 takes about {found.images - 1000:,} more"
        in text
    )
    assert "If so many are out of reach" in text


@pytest.mark.parametrize(("broken", "repaired", "images"), [(6, 2, 1000), (0, 0, 100), (0, 5, 300), (40, 3, 77)])
def test_the_passing_limit_passes_and_no_smaller_hundredth_does(broken: int, repaired: int, images: int) -> None:
    found = gate(broken, repaired, images, 0.0, 0.95)
    hundredths = round(found.passing_limit * 1e4)
    assert gate(broken, repaired, images, hundredths / 1e4, 0.95).verdict == "pass"
    assert hundredths == 1 or gate(broken, repaired, images, (hundredths - 1) / 1e4, 0.95).verdict != "pass"


def test_a_bound_on_a_hundredth_asks_for_the_next_one() -> None:
    """The bound must be below the limit, not at it."""
    assert Gate(0.0, 0.95, 0.0, 0.0025, "undecided", None).passing_limit == 0.0026
    assert Gate(0.0, 0.95, -0.2, -0.1, "pass", None).passing_limit == 0.0001
    assert Gate(0.0, 0.95, 1.0, 1.0, "fail", None).passing_limit == 1.0


def test_names_in_the_banner_are_escaped(tmp_path: Path) -> None:
    run = pilot(tmp_path / "pilot")
    data = json.loads((run / "fliqs/validation.json").read_text())
    data["conditions"] |= {"dataset": "<script>alert(1)</script>", "device": "<img src=x>"}
    write(run / "fliqs/validation.json", data)
    page = write_report(run).read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
