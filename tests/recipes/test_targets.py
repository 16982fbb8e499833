"""Targets of the recipe: several make a front, and what they limit is the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForImageClassification

import fliqs_hf
from fliqs_hf.cost import bops, trace_layers
from fliqs_hf.errors import ConfigError
from fliqs_hf.pipeline import search as recipe
from fliqs_hf.pipeline.search import main
from tests.recipes.test_vit import SETTINGS, write


def test_several_targets_give_a_front(tmp_path: Path) -> None:
    main([str(write(tmp_path)), "--target_bits", "3", "5", "--max_steps", "10"])
    costs = [json.loads((tmp_path / "run" / f"bits-{b}" / "fliqs/results.json").read_text())["cost"] for b in (3, 5)]
    assert costs[0]["bops"] < costs[1]["bops"]
    assert all(0.97 <= cost["target_ratio"] <= 1 for cost in costs)


def test_targets_share_the_uniform_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    original = recipe.train_formats
    monkeypatch.setattr(recipe, "train_formats", lambda *a, **k: trained.append(a[5]) or original(*a, **k))
    file = write(tmp_path, finetune_steps=0, max_steps=4, target_bits=[3.0, 5.0], compare_uniform=["int4"])
    results = main([str(file)])
    assert trained == ["search for bits 3", "uniform int4", "search for bits 5"]
    assert results[0]["accuracy"]["uniform_int4"] == results[1]["accuracy"]["uniform_int4"]
    assert (tmp_path / "run" / "fliqs/uniform_int4" / "model.safetensors").exists()
    front = (tmp_path / "run" / "fliqs/front.csv").read_text().splitlines()
    assert front[0] == "target,gbops,megabytes,top1" and len(front) == 3
    assert (tmp_path / "run" / "fliqs/front.png").read_bytes().startswith(b"\x89PNG")


def test_trackers_get_every_training_of_a_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under a name of its own, at steps that never go back, which some trackers drop."""
    logged: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    file = write(tmp_path, finetune_steps=10, max_steps=10, target_bits=[3.0, 5.0], report_to="tensorboard, ")
    with pytest.raises(ConfigError, match="report_to=''"):
        main([str(file)])
    main([str(file), "--report_to", "tensorboard"])
    steps = [step for step, _ in logged]
    assert steps == [5, 10, 15, 20, 20, 25, 30, 30]
    assert [next(iter(values)).split("/")[0] for _, values in logged] == ["fp32"] * 2 + ["bits-3"] * 3 + ["bits-5"] * 3
    results = json.loads((tmp_path / "run" / "bits-5" / "fliqs/results.json").read_text())
    assert logged[-1][1]["bits-5/eval/top1"] == results["accuracy"]["searched"]["top1"]


@pytest.mark.parametrize("kind", ["target_bops", "target_ratio", "target_bits"])
def test_layers_that_stay_in_fp32_count(tmp_path: Path, kind: str) -> None:
    """A limit is one of the whole model, as `fliqs-hf estimate` and the card count it."""
    layers = trace_layers(AutoModelForImageClassification.from_config(small_config()), torch.zeros(1, 3, 8, 8))
    kept = [layer for layer in layers if "patch_embeddings" in layer.name]
    fixed, whole = bops(kept, {}), bops(layers, {})
    limit = fixed + (sum(layer.macs for layer in layers) - kept[0].macs) * 16
    value = {"target_bops": limit, "target_ratio": limit / whole, "target_bits": 4.0}[kind]
    changes = {"target_bits": None, kind: [value], "cap": True, "modules_to_not_convert": ["*patch_embeddings*"]}
    (result,) = main([str(write(tmp_path, finetune_steps=0, max_steps=4, **changes))])
    allocation = fliqs_hf.Allocation.load(tmp_path / "run" / "fliqs/allocation.json")
    assert kept[0].name not in allocation
    assert 0.97 * limit <= bops(layers, allocation) == result["cost"]["bops"] <= limit
    assert result["cost"]["fp32_bops"] == whole
    assert "patch_embeddings" in (tmp_path / "run" / "fliqs/report.html").read_text()


@pytest.mark.parametrize("granularity", ["per_token", "per_token_clipped"])
def test_a_size_is_that_of_the_file(tmp_path: Path, granularity: str) -> None:
    changes = {"target_bits": None, "target_size_mb": [0.026], "activation_granularity": granularity}
    (result,) = main([str(write(tmp_path, finetune_steps=0, max_steps=4, **changes))])
    assert 0.95 * 26_000 <= result["checkpoint_bytes"] <= 26_000


def small_config() -> Any:
    return AutoConfig.for_model("vit", image_size=8, num_labels=10, **SETTINGS["config_overrides"])
