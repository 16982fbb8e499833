"""`fliqs-hf estimate`."""

from __future__ import annotations

import argparse
from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cost import bops, registered, unlisted_bytes, weight_bytes
from fliqs_hf.cost.choices import choices
from fliqs_hf.cost.hardware import Profile, load_profile, native_share, profile_here
from fliqs_hf.cost.models import BOPS, WEIGHT_BYTES
from fliqs_hf.formats import Format
from fliqs_hf.formats.spaces import parse_formats
from fliqs_hf.hf import FLIQSConfig
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.pipeline.checkpoints import empty_model, read_config, traced
from fliqs_hf.training.scratch import check_patches


def estimate(args: argparse.Namespace) -> int:
    profile, formats = _formats(args)
    config, quantization = read_config(args.model, args.revision)
    if args.image_size is not None:
        check_patches(config, args.image_size)
        sized = config.vision_config if hasattr(config, "vision_config") else config
        sized.image_size = args.image_size
    model = empty_model(config)
    layers, on = traced(model)
    chosen = quantizable_layers(model, args.modules_to_not_convert)
    other = unlisted_bytes(model, layers)
    models = {"fp32": Allocation({})}
    models.update({fmt.name: Allocation.uniform(chosen, fmt) for fmt in formats})
    if quantization is not None:
        models["this checkpoint"] = quantization.resolve(model)
    if args.allocation is not None:
        models[args.allocation] = FLIQSConfig(allocation=args.allocation).resolve(model)
    called_names = {layer.name for layer in layers if layer.quantizable}
    others = [cost for cost in registered() if cost not in (BOPS, WEIGHT_BYTES)]
    rows: list[dict[str, Any]] = []
    for label, allocation in models.items():
        called = Allocation({layer: formats for layer, formats in allocation.items() if layer in called_names})
        size = weight_bytes(layers, called, other_bytes=other)
        own = {cost.name: cost.known(layers, called) for cost in others}
        own |= {cost.name: known + other for cost in others if cost.of_file and (known := own[cost.name]) is not None}
        runs = {} if profile is None else {"hardware": native_share(profile, layers, called)}
        rows.append({"formats": label, "bops": bops(layers, called), "bytes": size, **own, **runs})
    fp32 = rows[0]
    lines = [
        (
            row["formats"], f"{row['bops'] / 1e9:.3f}", f"{fp32['bops'] / row['bops']:.1f} ×",
            f"{row['bytes'] / 1e6:.3f}", f"{fp32['bytes'] / row['bytes']:.1f} ×",
            *(cost.shown(row[cost.name]) for cost in others),
            *([] if profile is None else ["–" if row is fp32 else _mostly(row["hardware"])]),
        )
        for row in rows
    ]  # fmt: skip
    head = ["formats", "G bit operations", "fewer", "MB", "smaller", *(cost.unit for cost in others)]
    head += [] if profile is None else [f"on {profile.name}"]
    macs = sum(layer.macs for layer in layers)
    fixed = sum(layer.macs for layer in layers if not layer.quantizable)
    text = (
        f"{type(model).__name__}: {len(chosen)} layers, {macs / 1e9:.3f} G MACs per {on}\n\n"
        + table(head, lines)
        + "\n\nWeights and inputs in the same format; bit operations are MACs × weight bits × input bits. Everything "
        "else\n(biases, norms, embeddings) stays in fp32. Bytes are those of the checkpoint less its header."
    )
    if fixed:
        text += f"\n{fixed / macs:.1%} of the MACs are of weights that no format reaches; they count as fp32."
    if args.layers:
        per_layer = [(layer.name, layer.kind, f"{layer.macs:,}", f"{layer.weight_numel:,}") for layer in layers]
        text += "\n\n" + table(("layer", "kind", "MACs", "parameters"), per_layer)
    data: dict[str, Any] = {"model": type(model).__name__, "macs": macs, "fp32_macs": fixed, "models": rows}
    if args.layers:
        data["layers"] = [
            {"name": x.name, "kind": x.kind, "macs": x.macs, "parameters": x.weight_numel} for x in layers
        ]
    answer(args.json, data, text)
    return 0


def _formats(args: argparse.Namespace) -> tuple[Profile | None, tuple[Format, ...]]:
    """The hardware, if that of this machine is known or one is named, and the formats of the uniform models."""
    if args.formats is None:
        found = choices(None, args.hardware)
        return found.profile, found.formats
    named = parse_formats(args.formats[0] if len(args.formats) == 1 else args.formats)
    return (profile_here() if args.hardware is None else load_profile(args.hardware)), named


def _mostly(share: dict[str, float]) -> str:
    """How most of the bit operations run, and what part that is."""
    state = max(share, key=lambda state: share[state])
    return f"{share[state]:.0%} {state}"
