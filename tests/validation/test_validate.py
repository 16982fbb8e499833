"""`validate` on models whose answers are known in advance, and on a tiny quantized Transformer."""

from __future__ import annotations

import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTImageProcessorPil

from fliqs_hf import Allocation, quantize
from fliqs_hf.errors import CheckpointError, ConfigError, DataError
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.validation.comparison import peak_memory
from fliqs_hf.validation.validate import ValidationResult, validate
from tests.helpers.models import tiny
from tests.hf.test_templating import render

CLASSES = 7
NAMES = ("[ant](javascript:x)", "`bee`", "<script>alert(1)</script>", "dog|cat", "{{ emu }}", "_fox_ *gnu*", "# ibis")


class Scripted(nn.Module):
    """Answers image number i with row i of `logits`; records the batches it saw."""

    def __init__(self, logits: torch.Tensor, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(id2label=dict(enumerate(NAMES)), num_labels=len(NAMES))
        self.log, self.name = log, name

    def forward(self, pixels: torch.Tensor) -> Any:
        assert not self.training
        if self.log is not None:
            self.log.append(self.name)
        return SimpleNamespace(logits=self.logits[pixels[:, 0, 0, 0].long()])


def process(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
    """The number of an image is its colour: red + 256 × green."""
    arrays = np.stack([np.asarray(image) for image in images]).astype(np.float32)
    return {"pixel_values": torch.from_numpy(arrays[..., 0] + 256 * arrays[..., 1])[:, None]}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (number % 256, number // 256, 0))


def data(labels: list[int]) -> list[dict[str, Any]]:
    return [{"image": picture(i), "label": label} for i, label in enumerate(labels)]


@pytest.fixture(scope="module")
def case() -> SimpleNamespace:
    """103 images, random answers of two models that are right about half the time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (103,), generator=generator)
    truth = 3.0 * nn.functional.one_hot(labels, CLASSES)
    logits = [truth + 1.5 * torch.randn(103, CLASSES, generator=generator) for _ in range(2)]
    log: list[str] = []
    original, quantized = Scripted(logits[0], log, "o").train(), Scripted(logits[1], log, "q").train()
    result = validate(
        original, quantized, data(labels.tolist()), image_processor=process, batch_size=10, max_drop=1.0,
        resamples=500, examples_per_class=2,
    )  # fmt: skip
    return SimpleNamespace(labels=labels, logits=logits, log=log, models=(original, quantized), result=result)


def test_accuracies_and_agreement_are_those_of_the_logits(case: SimpleNamespace) -> None:
    result, labels = case.result, case.labels
    right = [logits.argmax(1) == labels for logits in case.logits]
    top5 = [(logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1) for logits in case.logits]
    for model, first, five, logits in zip((result.original, result.quantized), right, top5, case.logits, strict=True):
        assert (model.top1.count, model.top1.total) == (int(first.sum()), 103)
        assert model.top5.count == int(five.sum())
        assert model.calibration.mean_confidence == pytest.approx(float(logits.double().softmax(1).amax(1).mean()))
    assert result.broken == int((right[0] & ~right[1]).sum())
    assert result.repaired == int((right[1] & ~right[0]).sum())
    assert result.top1_drop.value == pytest.approx((result.broken - result.repaired) / 103)
    assert result.agreement.count == int((case.logits[0].argmax(1) == case.logits[1].argmax(1)).sum())
    assert sum(change.images for change in result.class_changes) == 103
    assert sum(change.lost for change in result.class_changes) == result.broken - result.repaired


def test_each_model_sees_each_batch_once_in_alternating_order(case: SimpleNamespace) -> None:
    assert "".join(case.log) == "oqqo" * 5 + "oq"


def test_full_batches_after_the_warm_up_are_timed(case: SimpleNamespace) -> None:
    for model in (case.result.original, case.result.quantized):
        assert model.latency.batches == 8  # ten full ones, two warm up
        assert 0 < model.latency.low_ms <= model.latency.batch_ms <= model.latency.high_ms
        assert model.latency.image_ms == model.latency.batch_ms / 10
    assert case.result.speedup > 0


def test_models_keep_their_mode(case: SimpleNamespace) -> None:
    assert all(model.training for model in case.models)


def test_examples_show_what_broke(case: SimpleNamespace) -> None:
    shown = [example for worst in case.result.worst_classes for example in worst.examples]
    assert shown
    for worst in case.result.worst_classes:
        assert worst.change.lost > 0
        assert 1 <= len(worst.examples) <= 2
    for example in shown:
        label = int(case.labels[example.index])
        answers = tuple(int(logits[example.index].argmax()) for logits in case.logits)
        assert (example.label, example.predictions) == (label, answers)
        assert answers[0] == label != answers[1]
        image = Image.open(io.BytesIO(example.jpeg))
        assert image.size == (4, 4)
        # JPEG keeps a flat colour to a few levels
        assert abs(image.getpixel((0, 0))[0] - example.index % 256) < 8


def test_json_holds_everything_but_the_pictures(case: SimpleNamespace) -> None:
    found = json.loads(case.result.to_json())
    assert found["original"]["top1"]["count"] == case.result.original.top1.count
    assert found["gate"]["max_drop"] == 0.01
    assert found["exit_code"] == case.result.exit_code
    assert found["conditions"]["batch_size"] == 10
    assert "jpeg" not in found["worst_classes"][0]["examples"][0]
    assert len(found["class_changes"]) == CLASSES


def test_html_is_one_file_and_escapes_names(case: SimpleNamespace) -> None:
    page = case.result.to_html()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    links: list[str] = re.findall(r"url\((.*?)\)", page)
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, found: links.extend(  # type: ignore[method-assign]
        value or "" for name, value in found if name in ("src", "href", "xlink:href", "srcset", "action")
    )
    parser.feed(page)
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    pictures = sum(len(worst.examples) for worst in case.result.worst_classes)
    assert page.count("data:image/jpeg;base64,") == pictures
    assert page == case.result.to_html()


def test_markdown_tables_and_lists_hold_together(case: SimpleNamespace) -> None:
    text = case.result.to_markdown()
    assert "bins of equal width.\n- Latency: " in text
    assert f"**{case.result.verdict}**" in text
    assert "dog\\|cat" in text
    shown = render(text)
    assert not {"script", "a", "img"} & set(shown.tags)
    for name in NAMES:
        assert name in shown.text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line.rstrip())) for line in table.splitlines()}
        assert len(columns) == 1, table


def outcome(broken: int, repaired: int, both: int, **settings: Any) -> ValidationResult:
    """Two classes; the models differ on `broken` + `repaired` images."""
    right, wrong = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])
    original = torch.stack([right] * broken + [wrong] * repaired + [right] * both)
    quantized = torch.stack([wrong] * broken + [right] * repaired + [right] * both)
    models = Scripted(original), Scripted(quantized)
    for model in models:
        model.config = None
    settings = {"image_processor": process, "batch_size": 500, "resamples": 100, **settings}
    return validate(*models, data([0] * len(original)), **settings)


@pytest.mark.parametrize(
    ("broken", "repaired", "limit", "verdict", "code"),
    [(0, 0, 1.0, "Pass", 0), (100, 0, 1.0, "Fail", 1), (5, 3, 0.5, "Undecided", 1), (3, 30, 0, "Pass", 0)],
)
def test_gate_decides_the_exit_code(broken: int, repaired: int, limit: float, verdict: str, code: int) -> None:
    result = outcome(broken, repaired, 900, max_drop=limit)
    assert result.verdict.startswith(verdict)
    assert result.exit_code == code
    assert f"{limit:.2f} points" in result.verdict
    assert result.verdict in result.to_markdown()
    assert result.gate is not None
    drop, page = result.top1_drop.value, html.unescape(result.to_html()).replace("\u00a0", " ")
    for text in (
        result.gate.word,
        result.gate.explanation(drop, result.images),
        result.gate.advice(drop, result.images),
    ):
        assert text in page


def test_undecided_says_how_many_more_images() -> None:
    result = outcome(0, 0, 100, max_drop=0.5)
    z = 1.6448536269514722
    needed = math.floor(z**2 * (1 / 0.005 - 1)) + 1  # closed form of the bound where nothing differs
    assert result.more_images == needed - 100
    assert f"takes about {needed - 100:,} more images ({needed:,} in all)" in result.verdict
    at_limit = outcome(10, 0, 990, max_drop=1.0)
    assert at_limit.more_images is None
    assert "more images would not help" in at_limit.verdict


def test_without_a_gate_there_is_no_decision() -> None:
    result = outcome(50, 0, 50)
    assert (result.gate, result.exit_code, result.more_images) == (None, 0, None)
    assert "max_drop was not set" in result.to_markdown()


def test_equal_models_and_few_classes() -> None:
    result = outcome(0, 0, 40, max_drop=10.0)
    assert result.agreement.value == 1
    assert (result.top1_drop.value, result.top1_drop.low, result.top1_drop.high) == (0, 0, 0)
    assert result.p_value == 1
    assert result.worst_classes == ()
    # two classes: top-5 would always be right; one batch: nothing to time; no Transformers model: no files
    assert result.top5_drop is result.original.top5 is result.original.latency is result.speedup is None
    assert result.original.checkpoint_bytes is None
    assert "not measured" in result.to_html()
    assert "Both models are right on the same images" in result.to_markdown()


def test_no_pictures_where_none_are_wanted() -> None:
    result = outcome(5, 0, 5, examples_per_class=0)
    assert result.worst_classes[0].change.lost == 5
    assert "data:image" not in result.to_html()


def test_result_is_the_same_again() -> None:
    first, second = (outcome(9, 4, 30, max_drop=20.0, seed=3) for _ in range(2))
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize(
    "settings",
    [{"max_drop": -0.1}, {"max_drop": math.nan}, {"max_drop": 101}, {"confidence": 1.0}, {"confidence": 95},
     {"batch_size": 0}, {"resamples": 10}, {"examples_per_class": -1}, {"match_labels": "order"},
     {"max_drop": "0.5"}, {"max_drop": True}, {"confidence": None}, {"batch_size": 2.5}, {"batch_size": True},
     {"resamples": 150.5}, {"seed": -1}, {"seed": 1.5}, {"examples_per_class": "a"},
     {"device": "nowhere"}, {"device": torch.device("meta")}],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"{name}="):
        outcome(1, 1, 1, **settings)


def test_images_that_the_processor_does_not_take_are_named() -> None:
    def refuse(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        raise ValueError("too narrow")

    model = Scripted(torch.zeros(3, CLASSES))
    for processor, message in ((refuse, "too narrow"), (lambda images, return_tensors: {}, "pixel_values")):
        with pytest.raises(DataError, match=f"images 0 to 2 are not taken by .*{message}"):
            validate(model, model, data([0, 1, 2]), image_processor=processor)


def test_too_few_images() -> None:
    with pytest.raises(DataError, match="no images"):
        outcome_of_rows([])
    with pytest.raises(DataError, match="one image"):
        outcome_of_rows(data([0]))


def outcome_of_rows(rows: list[dict[str, Any]], logits: torch.Tensor | None = None) -> ValidationResult:
    plain = torch.zeros(4, len(NAMES))
    other = Scripted(plain if logits is None else logits)
    return validate(Scripted(plain), other, rows, image_processor=process, resamples=100)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"\(2, 7\), the quantized model \(2, 3\)"):
        outcome_of_rows(data([0, 1]), torch.zeros(4, 3))
    with pytest.raises(CheckpointError, match="quantized model returns NaN or infinity for image 1"):
        outcome_of_rows(data([0, 1]), torch.zeros(4, 7).index_fill(0, torch.tensor([1]), math.nan))
    with pytest.raises(DataError, match="image 1 has the label 7"):
        outcome_of_rows(data([0, 7]))


def test_labels_beyond_the_output_of_models_without_a_config() -> None:
    models = Scripted(torch.zeros(4, 2)), Scripted(torch.zeros(4, 2))
    for model in models:
        model.config = None
    with pytest.raises(DataError, match="image 1 has the label 2, which is not one of the models' 2 classes"):
        validate(*models, data([0, 2]), image_processor=process)


def test_a_quantized_transformer(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    original, quantized = tiny("vit"), tiny("vit")
    quantize(quantized, Allocation.uniform(quantizable_layers(quantized), "int4"))
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    rows = [{"image": image, "label": i % 5} for i, image in enumerate(noise)]
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    result = validate(original, quantized, rows, image_processor=processor, batch_size=4, max_drop=50, resamples=100)
    assert result.original.formats is None
    assert "W int4 / A int4" in result.quantized.formats
    with torch.inference_mode():
        pixels = processor(list(noise), return_tensors="pt")["pixel_values"]
        expected = [model(pixels).logits.argmax(1) for model in (original, quantized)]
    assert result.agreement.count == int((expected[0] == expected[1]).sum())
    for model, found in ((original, result.original), (quantized, result.quantized)):
        model.save_pretrained(tmp_path / found.top1.__class__.__name__)
        assert found.checkpoint_bytes == (tmp_path / "Proportion" / "model.safetensors").stat().st_size
    parameters = sum(parameter.numel() for parameter in original.parameters())
    assert result.original.weights_bytes == 4 * parameters
    assert result.quantized.weights_bytes < result.original.weights_bytes / 3
    assert "W int4 / A int4" in result.to_markdown()


def test_peak_memory_sees_what_a_block_takes() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(2**24)  # 64 MB
        held.sum()
    del held
    if peak.working_bytes is None:
        pytest.skip("this system does not let a process reset its memory high-water mark")
    # the allocator and the kernel add pages of their own; another test's garbage cannot be freed inside the block
    assert 64 * 2**20 * 0.98 < peak.working_bytes < 64 * 2**20 * 1.1
    with peak_memory(torch.device("cpu")) as small:
        torch.ones(2**10)
    assert small.working_bytes < 8 * 2**20
