"""The run folder: everything about one search in one place, in files that people and later commands read."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo, bops, weight_bytes

PACKAGES = ("fliqs-hf", "torch", "transformers", "accelerate", "datasets", "safetensors", "scipy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the hardware."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.path / "checkpoint"
        self.state = self.path / "state"
        self.policy = self.path / "policy.jsonl"
        self.metrics = self.path / "metrics.jsonl"

    def write(self, name: str, data: Any) -> None:
        (self.path / name).write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write_config(self, settings: dict[str, Any]) -> None:
        self.write("config.json", {**settings, "command": " ".join([Path(sys.executable).name, *sys.argv]), "versions": versions()})

    def write_layers(self, layers: Sequence[LayerInfo]) -> None:
        self.write("layers.json", [asdict(layer) for layer in layers])

    def append(self, entry: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop recorded steps beyond `step`, which a resumed run will record again."""
        for file in (self.metrics, self.policy):
            if file.exists():
                lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
                file.write_text("".join(line + "\n" for line in lines))


def cost_summary(layers: Sequence[LayerInfo], allocation: Allocation, other_bytes: int) -> dict[str, float]:
    """Costs of an allocation beside those of fp32. Bytes include everything in the checkpoint but its header."""
    return {
        "bops": bops(layers, allocation),
        "fp32_bops": bops(layers, {}),
        "bytes": weight_bytes(layers, allocation, other_bytes=other_bytes),
        "fp32_bytes": weight_bytes(layers, {}, other_bytes=other_bytes),
        "macs": sum(layer.macs for layer in layers),
    }


def layer_table(layers: Sequence[LayerInfo], allocation: Allocation) -> str:
    """Layer, MACs, weight format, activation format and bits, as text."""
    rows = [("layer", "MACs", "weight", "activation", "bits")]
    for layer in layers:
        formats = allocation.get(layer.name)
        if formats is None:
            rows.append((layer.name, f"{layer.macs:,}", "fp32", "fp32", "32 × 32"))
            continue
        activation = formats.activation
        bits = f"{formats.weight.bits} × {activation.bits if activation else 32}"
        rows.append((layer.name, f"{layer.macs:,}", formats.weight.name, activation.name if activation else "fp32", bits))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]:>{widths[4]}}"
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
