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
from tests.models import tiny

FORMATS = ("int4", "e2m1", "int3", "e4m3", "bf16")


def write_run(folder: Path, *, seed: int = 0, shard_size: str = "50GB", formats: tuple[str, ...] = FORMATS) -> Any:
    """Write a run folder with everything in it that a card can show. Returns: the packed model.

    Args: formats: given to the layers in turn, the next one to the activations.
    """
    model = tiny("vit", seed)
    layers = trace_layers(model)
    allocation = mixed(model, formats)
    packed = quantize(model, allocation)
    packed.save_pretrained(folder / "checkpoint", max_shard_size=shard_size)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "checkpoint")

    allocation.save(folder / "allocation.json")
    write(folder / "layers.json", [dataclasses.asdict(layer) for layer in layers])
    write(folder / "search_space.json", {"formats": list(formats), "decisions": []})
    settings = {"model_name_or_path": "google/vit-tiny", "dataset_name": "uoft-cs/cifar10", "preset": "default"}
    command = ["recipes/vit.py", "--model_name_or_path", "google/vit-tiny", "--dataset_name", "uoft-cs/cifar10"]
    versions = {"torch": "2.13.0", "fliqs_hf": "0.1.0"}
    write(folder / "config.json", {**settings, "seed": seed, "command": command, "versions": versions})
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
    write(folder / "results.json", results)
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 2.3}\n')
    (folder / "policy.jsonl").write_text('{"step": 0, "probabilities": {}}\n')
    (folder / "report.html").write_text("<!doctype html><title>report</title>")
    (folder / "figures").mkdir()
    Image.fromarray(np.full((4, 4, 3), seed, np.uint8)).save(folder / "figures" / "allocation.png")
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.bin").write_bytes(b"not to be published")
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
