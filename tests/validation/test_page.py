"""The validation page in a real browser: nothing loaded, nothing logged, readable on a phone, printable."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fliqs_hf.validation.validate import validate

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--window-size=1000,1600",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many classes with long names, models that differ, an undecided gate."""

    class Fixed(nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.logits[pixels.long()]

    count, classes = 120, 30
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator)
    names = [f"class {i} with a name much longer than a column of a table on a phone" for i in range(classes)]
    models = Fixed(logits), Fixed(logits + 0.1 * torch.randn(count, classes, generator=generator))
    rows = [
        {"image": Image.new("RGB", (160, 120), (i, 90, 200)), "label": names[label]}
        for i, label in enumerate(logits.argmax(1).tolist())
    ]
    for model in models:
        model.config = type("Config", (), {"id2label": dict(enumerate(names)), "num_labels": classes})()

    def process(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])}

    result = validate(*models, rows, image_processor=process, batch_size=8, max_drop=8.0, resamples=100)
    assert len(result.worst_classes) > 3  # else the page has too little on it to be a test
    path = tmp_path_factory.mktemp("validation") / "page.html"
    path.write_text(result.to_html(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def test_nothing_is_logged_or_loaded(browser: Any) -> None:
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in loaded)
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    assert browser.execute_script("return document.images.length") > 3


def test_figures_are_drawn(browser: Any) -> None:
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')]"
        ".map(svg => [svg.clientWidth, svg.querySelectorAll('path').length])"
    )
    assert len(sizes) == 3
    assert all(width > 200 and paths > 5 for width, paths in sizes)
    identifiers = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    clips = [name for name in identifiers if name.startswith("p") and len(name) > 8]  # matplotlib's clip paths
    assert len(clips) == len(set(clips)) > 0


@pytest.mark.parametrize("width", [360, 1000])
def test_the_page_never_scrolls_sideways(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_on_a_few_pages(browser: Any) -> None:
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 6
