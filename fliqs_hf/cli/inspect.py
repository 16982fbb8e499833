"""`fliqs-hf inspect`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.hardware import share_of
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cost.hardware import load_profile
from fliqs_hf.errors import ConfigError, HubError
from fliqs_hf.hf.integrity import integrity_wanted
from fliqs_hf.nn import packed_layers
from fliqs_hf.nn.kernels import kernels_of
from fliqs_hf.pipeline.checkpoints import load_model, traced
from fliqs_hf.runs.finished import FinishedRun


def inspect(args: argparse.Namespace) -> int:
    """Reads every weight: what it says about integrity is what loading found."""
    run = FinishedRun.read(_folder(args.checkpoint, args.revision))
    model = load_model(str(run.path))
    packed, kernels = packed_layers(model), kernels_of(model)
    layers: list[dict[str, Any]] = []
    for name, formats in run.allocation.items():
        layer = packed[name]
        stored = (layer.weight_codes, layer.weight_scale, layer.weight_scale_codes)
        layers.append(
            {
                "name": name, "weight": formats.weight.name, "activation": str(formats.activation or "fp32"),
                "shape": list(layer.weight_shape), "bytes": sum(part.nbytes for part in stored if part is not None),
                "kernel": kernels[name].kernel, "why": kernels[name].reason,
            }
        )  # fmt: skip
    packed_bytes = sum(layer["bytes"] for layer in layers)
    parameters = sum(layer.weight_shape.numel() for layer in packed.values())
    file_bytes = sum(file.stat().st_size for file in run.weight_files)
    counts = Counter((layer["weight"], layer["activation"]) for layer in layers)
    run_by = Counter((layer["kernel"], layer["why"]) for layer in layers)
    data = {
        "checkpoint": args.checkpoint, "model": type(model).__name__, "intact": True,
        "digests": None if run.quantization.digests is None else run.quantization.checksum,
        "files": [file.name for file in run.weight_files], "file_bytes": file_bytes,
        "quantized": {"layers": len(layers), "parameters": parameters, "bytes": packed_bytes},
        "other_bytes": file_bytes - packed_bytes,
        "formats": [{"weight": w, "activation": a, "layers": n} for (w, a), n in counts.most_common()],
        "kernels": [{"kernel": k, "why": why, "layers": n} for (k, why), n in run_by.most_common()],
        "scales": {
            "weight_granularity": run.quantization.weight_granularity, "weight_scale": run.quantization.weight_scale,
            "activation_granularity": run.quantization.activation_granularity,
        },
        **({"layers": layers} if args.layers else {}),
    }  # fmt: skip
    text = (
        f"{type(model).__name__}: {len(layers)} quantized layers, {parameters:,} weights in {packed_bytes:,} bytes "
        f"({8 * packed_bytes / max(parameters, 1):.2f} bits each, scales included)\n"
        f"{', '.join(data['files'])}: {file_bytes:,} bytes, {file_bytes - packed_bytes:,} of them not quantized\n"
        f"intact: {_intact(run)}\n\n"
        + table(("weights", "inputs", "layers"), [(w, a, n) for (w, a), n in counts.most_common()])
        + "\n\n"
        + table(("kernel on this machine", "layers", "why"), [(k, n, why) for (k, why), n in run_by.most_common()])
    )
    data["hardware"] = hardware = _hardware(args.hardware, model, run.allocation)
    if "share" in hardware:
        share = ", ".join(f"{part:.1%} {state}" for state, part in hardware["share"].items())
        text += f"\n\nbit operations on {hardware['profile']}: {share}"
    if args.layers:
        rows = [
            (x["name"], x["weight"], x["activation"], "×".join(map(str, x["shape"])), f"{x['bytes']:,}", x["kernel"])
            for x in layers
        ]
        text += "\n\n" + table(("layer", "weights", "inputs", "shape", "bytes", "kernel"), rows)
    answer(args.json, data, text)
    return 0


def _intact(run: FinishedRun) -> str:
    """What loading it has shown."""
    intact = "complete, header as the config says, every number finite, "
    if run.quantization.digests is None:
        return intact + "but written before checkpoints had digests"
    if not integrity_wanted():
        return intact + "but its digests were not compared"
    return intact + "tensors and settings as they were saved"


def _hardware(name: str, model: Any, allocation: Allocation) -> dict[str, Any]:
    """Where the bit operations run, by a hardware profile; or why that is not known."""
    try:
        profile = load_profile(name)
        return {"profile": profile.name, "share": share_of(profile, traced(model)[0], allocation)}
    except ConfigError as error:  # a device without a profile, or a model that cannot be run on an image
        if name != "auto":
            raise
        return {"unknown": str(error)}


def _folder(name: str, revision: str | None) -> str:
    """The folder itself, or a download of what a checkpoint consists of."""
    if Path(name).is_dir():
        return name
    try:
        return snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise HubError(f"{name!r} is no folder, and cannot be had from the Hub: {error}") from error
