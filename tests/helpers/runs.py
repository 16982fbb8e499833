"""A run folder of a tiny ViT, as a search leaves one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from fliqs_hf import Allocation, LayerFormats, quantize
from fliqs_hf.cost import trace_layers
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.runs.files import record_text
from tests.helpers.models import tiny

FORMATS = ("int4", "e2m1", "int3", "e4m3", "bf16")


def write_run(folder: Path, *, seed: int = 0, shard_size: str = "50GB", formats: tuple[str, ...] = FORMATS) -> Any:
    """Write a run folder with everything in it that a card can show. Returns: the packed model.

    Args: formats: given to the layers in turn, the next one to the activations.
    """
    model = tiny("vit", seed)
    layers = trace_layers(model)
    allocation = mixed(model, formats)
    packed = quantize(model, allocation)
    packed.save_pretrained(folder, max_shard_size=shard_size)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)

    (folder / "fliqs").mkdir()
    allocation.save(folder / "fliqs/allocation.json")
    write(folder / "fliqs/layers.json", [dataclasses.asdict(layer) for layer in layers])
    write(folder / "fliqs/search_space.json", {"formats": list(formats), "decisions": []})
    settings = {"model_name_or_path": "google/vit-tiny", "dataset_name": "uoft-cs/cifar10", "preset": "default"}
    command = ["recipes/vit.py", "--model_name_or_path", "google/vit-tiny", "--dataset_name", "uoft-cs/cifar10"]
    versions = {"torch": "2.13.0", "fliqs_hf": "0.1.0"}
    write(folder / "fliqs/settings.json", {**settings, "seed": seed, "command": command, "versions": versions})
    results = {
        "target": {"bits": 4},
        "cost": {"target_ratio": 0.9931},
        "accuracy": {
            "fp32": {"top1": 0.93, "top5": 0.99, "correct": 930, "n": 1000},
            "uniform_int4": {"top1": 0.88, "top5": 0.98, "correct": 880, "n": 1000},
            "searched": {"top1": 0.917, "top5": 0.985, "correct": 917, "n": 1000},
        },
        "seconds": 321.5,
        "repaired": True,
    }
    write(folder / "fliqs/results.json", results)
    (folder / "fliqs/metrics.jsonl").write_text('{"step": 0, "loss": 2.3}\n')
    (folder / "fliqs/policy.jsonl").write_text('{"step": 0, "probabilities": {}}\n')
    (folder / "fliqs/report.html").write_text("<!doctype html><title>report</title>")
    (folder / "fliqs/figures").mkdir()
    Image.fromarray(np.full((4, 4, 3), seed, np.uint8)).save(folder / "fliqs/figures" / "allocation.png")
    (folder / "fliqs/state").mkdir()
    (folder / "fliqs/state" / "optimizer.bin").write_bytes(b"not to be published")
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    entries = {"fliqs/state/" if "/state/" in name else name for name in written}
    (folder / "fliqs/written.json").write_text(record_text(entries))
    return packed


def mixed(model: nn.Module, formats: tuple[str, ...]) -> Allocation:
    names = quantizable_layers(model)
    pairs = ((formats[i % len(formats)], formats[(i + 1) % len(formats)]) for i in range(len(names)))
    return Allocation({name: LayerFormats.of(*pair) for name, pair in zip(names, pairs, strict=True)})


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def change(path: Path, **values: Any) -> None:
    """Replace entries of a JSON object; those set to None go."""
    data = {**json.loads(path.read_text()), **values}
    write(path, {key: value for key, value in data.items() if value is not None})
