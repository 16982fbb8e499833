"""The report of a run: what it says is what the records say; in a browser it works without a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import ENERGY, LayerInfo, bops, weight_bytes
from fliqs_hf.errors import CheckpointError
from fliqs_hf.formats import parse
from fliqs_hf.report.explain import explain
from fliqs_hf.report.run_report import RunReport, write_report
from fliqs_hf.selection import SearchSpace
from tests.helpers.runs import FORMATS, write, write_run
from tests.validation.test_page import CHROMIUM, DRIVER, OPTIONS

LAYERS = (
    LayerInfo("a.q", "linear", 100, 64, 8, 0),
    LayerInfo("a.k", "linear", 100, 64, 8, 0),
    LayerInfo("head", "linear", 30, 50, 5, 1),
)
CHOICES = ["int2", "int4", "e2m1", "int8"]


def of(name: str, explanations: list[Any]) -> Any:
    return next(e for e in explanations if e.name == name)


@pytest.mark.parametrize("activation", ["same", "separate"])
def test_counterfactuals_are_differences_of_whole_allocations(activation: Any) -> None:
    """Every step equals the cost of the whole model with that one decision changed, minus its cost now."""
    space = SearchSpace(LAYERS, CHOICES, activation)
    count = len(space.decisions)
    scores = {d.name: [0.9 - 0.1 * i, 0.3, 0.2 + i, 0.01] for i, d in enumerate(space.decisions)}
    choice = [1 + i % 2 for i in range(count)]
    import torch

    allocation = space.allocation(torch.tensor(choice))
    found = explain(space.to_dict(), LAYERS, allocation, scores, {})
    assert [e.name for e in found] == [d.name for d in space.decisions]
    for index, entry in enumerate(found):
        for way in ("down", "same", "up"):
            step = getattr(entry, way)
            other = list(choice)
            other[index] = space.formats.index(step.format)
            changed = space.allocation(torch.tensor(other))
            assert step.costs["bops"] == bops(LAYERS, changed) - bops(LAYERS, allocation)
            assert step.costs["weight_bytes"] == weight_bytes(LAYERS, changed) - weight_bytes(LAYERS, allocation)
            energy = ENERGY.of(LAYERS, changed) - ENERGY.of(LAYERS, allocation)
            assert step.costs["energy_uj"] == pytest.approx(energy, abs=1e-9)  # sums over all layers, and over some
            row = scores[entry.name]
            assert step.signal == row[other[index]] - row[choice[index]]
        assert (entry.down.format.name, entry.up.format.name) == ("int2", "int8")
        assert entry.score == scores[entry.name][choice[index]]


def test_the_best_of_equal_bits_and_no_excluded_format() -> None:
    space = SearchSpace(LAYERS, CHOICES, exclude={"head": ["int8"]})
    allocation = Allocation.uniform([layer.name for layer in LAYERS], "int2")
    scores = {d.name: [0.5, 0.3, 0.2, 0.0] for d in space.decisions}
    found = explain(space.to_dict(), LAYERS, allocation, scores, {})
    assert of("a.{q,k}", found).up.format == parse("e2m1")  # the better of two with four bits
    assert of("a.{q,k}", found).down is None is of("a.{q,k}", found).same
    wide = Allocation.uniform([layer.name for layer in LAYERS], "int4")
    assert of("head", explain(space.to_dict(), LAYERS, wide, scores, {})).up is None
    # Without scores the policy's odds are the signal: ln(0.6 / 0.3).
    probabilities = {d.name: [0.6, 0.3, 0.1, 0.0] for d in space.decisions}
    up = of("head", explain(space.to_dict(), LAYERS, allocation, {}, probabilities)).up
    assert up.format == parse("int4")
    assert up.signal == pytest.approx(0.6931471805599453, abs=1e-12)  # float64 rounding


def test_records_that_do_not_belong_together_are_refused() -> None:
    space = SearchSpace(LAYERS, CHOICES).to_dict()
    allocation = Allocation.uniform([layer.name for layer in LAYERS], "int4")
    with pytest.raises(CheckpointError, match="do not belong together"):
        explain(space, LAYERS[:2], allocation, {}, {})
    with pytest.raises(CheckpointError, match="do not belong together"):
        explain(space, LAYERS, Allocation.uniform([layer.name for layer in LAYERS], "int5"), {}, {})
    unknown = {decision["name"]: {"int2": {"value": 1.0}} for decision in space["decisions"]}
    with pytest.raises(CheckpointError, match="do not belong together"):
        explain(space, LAYERS, allocation, {}, {}, unknown)
    torn = Allocation({**allocation, "a.k": LayerFormats.of("int8", "int8")})
    with pytest.raises(CheckpointError, match="different formats"):
        explain(space, LAYERS, torn, {}, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on record; weight and input of each layer are decided apart."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    layers = [LayerInfo(**entry) for entry in json.loads((folder / "fliqs/layers.json").read_text())]
    names = [layer.name for layer in layers]
    decisions = [
        {"name": f"{name}:{kind}", "kind": kind, "layers": [name], "choices": list(FORMATS)}
        for name in names
        for kind in ("weight", "activation")
    ]
    write(
        folder / "fliqs/search_space.json",
        {"formats": list(FORMATS), "activation": "separate", "decisions": decisions},
    )
    scores = {d["name"]: [0.004, 0.003, 0.01, 0.0002, 1e-6] for d in decisions}
    write(
        folder / "fliqs/sensitivity.json",
        {"method": "fisher", "images": 64, "passes": 2, "seconds": 1.5, "scores": scores},
    )
    lines = []
    for step in (10, 20, 30):
        change = step / 500
        rows = {d["name"]: [0.2, 0.2 + change, 0.2 - change, 0.2, 0.2] for d in decisions}
        lines.append({"step": step, "probabilities": rows})
    (folder / "fliqs/policy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    searching = {"phase": "search", "cost_ratio": 1.1, "entropy": 1.2}
    metrics = [{"step": step, "loss": 2 / step, "reward": -2 / step, **searching} for step in (10, 20)]
    metrics += [{"step": 30, "loss": 0.01, "phase": "final"}]
    (folder / "fliqs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    shutil.rmtree(folder / "fliqs/figures")
    write_report(folder)
    return folder


def test_the_page_holds_the_measured_figures(run: Path) -> None:
    text = (run / "fliqs/report.html").read_text()
    report = RunReport.read(run)
    assert "91.70 %" in text  # top-1 of results.json
    assert "−1.30 points against the original in fp32 (93.00\u00a0%)" in text
    assert "uniform int4" in text
    assert "on the fp32 model and once more on the quantized one with 64 training images" in text
    assert text.count("<tr>\n<td data-v=") == len(report.rows) == len(report.run.layers)
    assert not re.search(r"(?:src|href)=\"http|url\(http|@import|<link", text)
    settings = re.search(r'<pre id="settings">(.*?)</pre>', text, re.S)
    assert settings
    assert "google/vit-tiny" in settings[1]
    assert sorted(path.name for path in (run / "fliqs/figures").iterdir()) == [
        "accuracy_against_cost.png", "allocation.png", "search.png",
    ]  # fmt: skip


def test_what_was_not_recorded_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in ("results.json", "metrics.jsonl", "policy.jsonl", "search_space.json", "settings.json"):
        (tmp_path / "fliqs" / name).unlink()
    text = write_report(tmp_path).read_text()
    for word in ("How the search went", "The policy over time", "How to repeat it", "one step down", "fp32 ("):
        assert word not in text
    assert "The allocation along the network" in text
    assert [path.name for path in (tmp_path / "fliqs/figures").iterdir()] == ["allocation.png"]


def test_a_checkpoint_alone_has_no_report(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "fliqs/layers.json").rename(tmp_path / "layers.json")
    with pytest.raises(CheckpointError, match="needs the run folder"):
        write_report(tmp_path)
    (tmp_path / "layers.json").rename(tmp_path / "fliqs/layers.json")
    (tmp_path / "fliqs/metrics.jsonl").write_text("{half a li")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_names_and_settings_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    write_run(folder)
    settings = json.loads((folder / "fliqs/settings.json").read_text())
    write(folder / "fliqs/settings.json", {**settings, "command": "</pre><script>alert(1)</script>"})
    text = write_report(folder).read_text()
    assert "<script>alert" not in text
    assert "<b>run" not in text


@pytest.fixture(scope="module")
def browser(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get((run / "fliqs/report.html").as_uri())
    yield driver
    driver.quit()


def column(browser: Any, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#layers tbody tr')].filter(r => !r.hidden).map(r => r.cells[%d].%s)"
    )
    return browser.execute_script(script % (number, "textContent"))


def test_nothing_is_loaded_or_logged_and_figures_are_drawn(browser: Any) -> None:
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    sizes = browser.execute_script("return [...document.querySelectorAll('figure svg')].map(s => s.clientWidth)")
    assert len(sizes) == 4
    assert min(sizes) > 200
    names = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    clips = [name for name in names if name.startswith("p") and len(name) > 8]
    assert len(clips) == len(set(clips)) > 0


def test_sorting_and_filtering_work(browser: Any, run: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    report = RunReport.read(run)
    macs = sorted(row.macs for row in report.rows)
    heads = browser.find_elements(By.CSS_SELECTOR, "#layers th button")
    by_name = {head.text.strip(): head for head in heads}
    values = "return [...document.querySelectorAll('#layers tbody tr')].map(r => Number(r.cells[2].dataset.v))"
    by_name["MACs"].click()
    assert browser.execute_script(values) == macs
    by_name["MACs"].click()
    assert browser.execute_script(values) == macs[::-1]
    by_name["#"].click()
    assert column(browser, 0) == [str(i + 1) for i in range(len(report.rows))]

    box = browser.find_element(By.ID, "text")
    box.send_keys("MLP")
    wanted = [row.name for row in report.rows if "mlp" in row.name]
    assert [cell.strip() for cell in column(browser, 1)] == wanted
    assert browser.find_element(By.ID, "count").text == f"{len(wanted)} of {len(report.rows)} layers"
    box.clear()
    box.send_keys(" ")
    box.send_keys("\b")
    Select(browser.find_element(By.ID, "format")).select_by_visible_text("INT3")
    expected = [r for r in report.rows if "int3" in (r.formats.weight.name, r.formats.activation.name)]
    assert len(column(browser, 1)) == len(expected) < len(report.rows)
    Select(browser.find_element(By.ID, "format")).select_by_index(0)


@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_never_scrolls_sideways(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints(browser: Any) -> None:
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert 2 <= pdf.count(b"/Type /Page\n") <= 12
