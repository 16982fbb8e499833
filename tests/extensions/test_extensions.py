"""What others may add: each in one file of less than 60 lines, from outside, and it goes all the way."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from fliqs_hf import Allocation, quantize
from fliqs_hf.baselines import baselines, register_baseline, unregister_baseline
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.errors import ConfigError, FliqsError, FormatError
from fliqs_hf.formats import BlockFormat, FloatFormat, parse, register_format, unregister_format
from fliqs_hf.nn import packed_layers, unregister_kind
from fliqs_hf.nn.kinds import kinds
from fliqs_hf.pipeline import compare
from fliqs_hf.pipeline.export import export
from fliqs_hf.pipeline.search import main
from fliqs_hf.selection import SearchProblem, SearchSpace, unregister_score
from fliqs_hf.tasks import unregister_task
from fliqs_hf.validation.validate import validate
from fliqs_hf_cli import main as cli
from fliqs_hf_cli import main as command
from tests.helpers.models import images, tiny
from tests.recipes.test_vit import write

FILES = [file for file in sorted(Path(__file__).parent.glob("[a-z]*.py")) if file != Path(__file__)]
SHORT: dict[str, Any] = {"finetune_steps": 0, "max_steps": 4, "max_train_samples": 64, "max_eval_samples": 32}
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4}


@pytest.fixture(autouse=True)
def new_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def added(name: str, forget: Callable[[], None]) -> Iterator[None]:
    """What importing the extension registers, within this context."""
    sys.modules.pop(f"tests.extensions.{name}", None)  # which another test may have imported, and forgotten
    importlib.import_module(f"tests.extensions.{name}")
    try:
        yield
    finally:
        forget()


def searched(folder: Path, **settings: Any) -> tuple[dict[str, Any], Any, str]:
    """Search, pack, load, report. Returns: the result, the loaded model, the text of the report."""
    (result,) = main([str(write(folder, **SHORT | settings))])
    run = Path(result["run"])
    model = AutoModelForImageClassification.from_pretrained(run)
    assert (
        Allocation.from_dict(json.loads((run / "fliqs/allocation.json").read_text())).keys()
        == packed_layers(model).keys()
    )
    again = AutoModelForImageClassification.from_pretrained(run)
    x = images(2)[:, :, :8, :8] if model.config.model_type == "vit" else images(2)
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)
    return result, model, (run / "fliqs/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60


def test_a_block_format(tmp_path: Path) -> None:
    with added("block_format", lambda: unregister_format("fp4_g8")):
        result, model, report = searched(tmp_path, search_space=["fp4_g8", "int8"], target_bits=[7.0])
        used = {str(layer.formats.weight) for layer in packed_layers(model).values()}
        assert used == {"fp4_g8", "int8"} and "fp4_g8" in report
        assert parse("fp4_g8").effective_bits == 6 and 0.97 <= result["cost"]["target_ratio"] <= 1
    with pytest.raises(FormatError, match="unknown format 'fp4_g8'"):
        parse("fp4_g8")
    with pytest.raises(FliqsError, match="fp4_g8"):  # whoever has not registered it is told so
        AutoModelForImageClassification.from_pretrained(result["run"])


def test_a_layer_kind(tmp_path: Path) -> None:
    with added("layer_kind", lambda: unregister_kind("standardized_conv2d")):
        settings = {"model_type": "bit", "image_size": 32, "config_overrides": SMALL, "search_space": ["int4", "int8"]}
        result, model, report = searched(tmp_path, **settings, target_bits=[5.0])
        convolutions = [name for name, layer in packed_layers(model).items() if layer.kind.name != "linear"]
        assert convolutions and all(name in report for name in convolutions)
        assert result["cost"]["bops"] < result["cost"]["fp32_bops"] / 30  # all layers, and not the head alone
    assert all(kind.name != "standardized_conv2d" for kind in kinds())


def validated_and_exported(run: Path, folder: Path) -> None:
    """The commands that measure a finished model, for a task that they know nothing of."""
    given = ["--task", "image-regression", "--dataset_name", "digits", "--max_samples", "64"]
    page = folder / "page.json"
    status = command(
        ["validate", str(run / "fliqs/fp32"), str(run), *given, "--max_drop", "99", "--output", str(page)]
    )
    found = json.loads(page.read_text())
    assert (
        status == (0 if found["gate"]["verdict"] == "pass" else 1) and found["measure"] == "share of digits read right"
    )
    assert found["images"] == 64 and found["original"]["calibration"] is None and found["class_changes"] == []
    count = found["quantized"]["top1"]["count"]
    assert found["original"]["top1"]["count"] - count == found["broken"] - found["repaired"]
    for text in (run / "README.md", run / "fliqs/validation.html"):
        assert "hare of digits read right" in text.read_text() and "top-1" not in text.read_text()
    model = AutoModelForImageClassification.from_pretrained(run)
    with pytest.raises(ConfigError, match="match_labels='index' is for tasks with one class per image"):
        validate(model, model, None, image_processor=None, task="image-regression", match_labels="index")
    exported = export(run, folder / "exported", to="torch", task="image-regression")
    assert exported.agreement.percent == 100 and exported.agreement.rms == 0
    packed = folder / "packed"
    given = [
        "--task",
        "image-regression",
        "--calibration",
        "digits",
        "--calibration_images",
        "32",
        "--batch_size",
        "16",
    ]
    floor = ["--target_bits", "4", "--search_space", "int2,int8", "--max_drop", "100", "--held_out_images", "32"]
    assert command(["quantize", str(run / "fliqs/fp32"), str(packed), *given, *floor]) == 0
    assert json.loads((packed / "fliqs/results.json").read_text())["floor"]["trials"][-1]["images"] == 32


def compared(fp32: Path, folder: Path) -> None:
    table = folder / "compared.csv"
    given = [str(fp32), "--dataset_name", "digits", "--task", "image-regression", "--use_cpu", "--seeds", "0",
             "--target_bits", "4", "--max_steps", "2", "--batch_size", "8", "--max_train_samples", "32",
             "--max_eval_samples", "16", "--prior_images", "16", "--output", str(table)]  # fmt: skip
    rows = compare.main([*given, "--methods", "ptq-fisher", "uniform-int", "search"])
    assert len(rows) == 3 and all(0 <= row["value"] <= 1 for row in rows)
    assert "target_bits,seed,explained_variance,loss" in table.read_text()
    assert "explained variance %" in table.with_suffix(".md").read_text()


def test_a_task(tmp_path: Path) -> None:
    with added("task", lambda: unregister_task("image-regression")):
        result, model, report = searched(tmp_path, task="image-regression", finetune_steps=40, learning_rate=2e-3)
        assert model.config.num_labels == 1 and "explained variance" in report
        card = (Path(result["run"]) / "README.md").read_text(encoding="utf-8")
        assert (
            "pipeline_tag: image-regression" in card
            and "print(output)" in card
            and "model with one output with" in card
        )
        found = result["accuracy"]
        assert found["fp32"]["measure"] == "explained variance" and 0 <= found["searched"]["value"] <= 1
        validated_and_exported(Path(result["run"]), tmp_path)
        compared(Path(result["run"]) / "fliqs/fp32", tmp_path)
        with pytest.raises(ConfigError, match="augment is for tasks with one class per image"):
            main([str(write(tmp_path, **SHORT, task="image-regression", augment=["mixup"]))])
    with pytest.raises(ConfigError, match=r"task='image-regression' does not exist: use 'image-classification'"):
        main([str(write(tmp_path, **SHORT, task="image-regression"))])


def fp32(folder: Path) -> str:
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(vit).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def comparing(model: str, output: Path, *methods: str) -> list[str]:
    return [
        model, "--dataset_name", "digits", "--use_cpu", "--seeds", "0", "--target_bits", "4",
        "--max_steps", "2", "--batch_size", "8", "--max_train_samples", "32", "--max_eval_samples", "16",
        "--output", str(output), "--methods", *methods,
    ]  # fmt: skip


def test_a_baseline(tmp_path: Path) -> None:
    given = comparing(fp32(tmp_path / "fp32"), tmp_path / "out.csv", "first-layers", "ptq-first-layers", "uniform-int")
    with added("baseline", lambda: unregister_baseline("first-layers")):
        compare.main(given)
        lines = [line for line in (tmp_path / "out.csv").read_text().splitlines() if not line.startswith("#")]
        rows = {row["method"]: row for row in csv.DictReader(lines)}
        assert 0.97 <= float(rows["first-layers"]["cost_ratio"]) <= 1 and rows["ptq-first-layers"]["steps"] == "0"
        model = tiny("vit")
        layers = trace_layers(model)
        space = SearchSpace(layers, ["int2", "int8"])
        problem = SearchProblem(space, CostTable(layers, space.formats), Target.of(target_bits=4))
        allocation = baselines()["first-layers"](problem, 0)
        quantize(model, allocation).save_pretrained(tmp_path / "packed")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
        assert {name: layer.formats for name, layer in packed_layers(loaded).items()} == dict(allocation.items())
    with pytest.raises(ConfigError, match="unknown method 'first-layers'"):
        compare.main(given)
    for name in ("ptq-mine", "two words"):
        with pytest.raises(ConfigError, match="name of a baseline is a word"):
            register_baseline(name, lambda problem, seed: allocation)


def test_a_score(tmp_path: Path) -> None:
    """As the prior of a search, of `quantize`, and as a method of a comparison."""
    start = {"prior": "output-error", "prior_passes": 1, "prior_images": 32, "explore_fraction": 0.5}
    with added("score", lambda: unregister_score("output-error")):
        result, _, _ = searched(tmp_path, search_space=["int2", "int8"], search_overrides=start)
        record = json.loads((Path(result["run"]) / "fliqs/sensitivity.json").read_text())
        assert record["method"] == "output-error" and record["images"] == 32
        assert all(two > eight > 0 for two, eight in record["scores"].values())
        again = main(
            [str(write(tmp_path, **SHORT, search_space=["int2", "int8"], search_overrides=start)), "--resume"]
        )
        assert again[0]["cost"] == result["cost"]

        model = fp32(tmp_path / "fp32")
        options = ["--calibration", "digits", "--calibration_images", "16", "--target_bits", "4"]
        chosen = ["--score", "output-error", "--activation", "same", "--search_space", "int2", "int3", "int4", "int8"]
        assert cli(["quantize", model, str(tmp_path / "quantized"), *options, *chosen]) == 0
        record = json.loads((tmp_path / "quantized/fliqs/sensitivity.json").read_text())
        assert record["method"] == "output-error" and record["images"] == 16
        assert cli(["quantize", model, str(tmp_path / "apart"), *options, "--score", "output-error"]) == 2

        compare.main(comparing(model, tmp_path / "out.csv", "output-error", "ptq-output-error", "ptq-fisher"))
        lines = [line for line in (tmp_path / "out.csv").read_text().splitlines() if not line.startswith("#")]
        found = {row["method"]: row for row in csv.DictReader(lines)}
        assert 0.97 <= float(found["output-error"]["cost_ratio"]) <= 1
        assert found["ptq-output-error"]["allocation"] == found["output-error"]["allocation"]
    with pytest.raises(ConfigError, match="unknown method 'output-error'"):
        compare.main(comparing(model, tmp_path / "out.csv", "output-error"))
    with pytest.raises(ConfigError, match="prior='output-error' does not exist"):
        main([str(write(tmp_path, **SHORT, search_overrides=start))])


def test_names_of_formats_are_taken_once() -> None:
    element = FloatFormat(2, 1)
    for name in ("int4", "half", "mxfp4", "int4_g32"):
        with pytest.raises(FormatError, match="is a format already"):
            register_format(BlockFormat(name, element, 8, "bf16"))
    with pytest.raises(FormatError, match="small letters"):
        register_format(BlockFormat("FP4 of 8", element, 8, "bf16"))
    for name in ("mxfp4", "fp4_g8"):
        with pytest.raises(FormatError, match="no format that was registered"):
            unregister_format(name)
    assert parse("mxfp4").name == "mxfp4"
