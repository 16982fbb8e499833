"""`fliqs-hf hardware`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.unused import check_unused
from fliqs_hf.cost import LayerInfo
from fliqs_hf.cost.hardware import Profile, load_profile, native_share, profile_names, run_anywhere
from fliqs_hf.errors import ConfigError
from fliqs_hf.pipeline.checkpoints import empty_model, read_config, traced


def hardware(args: argparse.Namespace) -> int:
    """Raises: ConfigError: a profile or checkpoint that does not exist, one that is not quantized, or arguments that
    mean nothing here."""
    if args.what != "list" and args.name is None:
        raise ConfigError(f"hardware {args.what}: name a {'profile' if args.what == 'show' else 'checkpoint'}")
    if args.what == "list" and args.name is not None:
        raise ConfigError(f"hardware list takes no name: leave {args.name!r} out, or say show or check")
    if args.what != "check":
        check_unused(args, f"is for hardware check, not for hardware {args.what}", "hardware", "revision")
    if args.what == "list":
        return _list(args)
    return _show(args, load_profile(args.name)) if args.what == "show" else _check(args)


def _list(args: argparse.Namespace) -> int:
    profiles = [load_profile(name) for name in profile_names()]
    rows = [{"name": profile.name, "title": profile.title, "runs": _runs(profile)} for profile in profiles]
    text = table(("name", "hardware", "runs"), [tuple(row.values()) for row in rows])
    answer(args.json, rows, f"{text}\n\nThis machine: {load_profile('auto').name}")
    return 0


def _runs(profile: Profile) -> str:
    codes = (
        [] if profile.largest_weight_code is None else [f"8-bit integers, weights to {profile.largest_weight_code}"]
    )
    return ", ".join([*codes, *(_pair_text(pair.weights, pair.inputs) for pair in profile.pairs)])


def _pair_text(weights: Any, inputs: Any) -> str:
    return " × ".join("/".join(fmt.name for fmt in side) for side in (weights, inputs))


def _show(args: argparse.Namespace, profile: Profile) -> int:
    data: dict[str, Any] = {
        "name": profile.name, "title": profile.title, "source": profile.source,
        "pairs": [
            {"weights": [f.name for f in p.weights], "inputs": [f.name for f in p.inputs], "rate": p.rate}
            for p in profile.pairs
        ],
        "largest_weight_code": profile.largest_weight_code, "bandwidth_gb_s": profile.bandwidth_gb_s,
        "bf16_tflops": profile.bf16_tflops, "bf16_source": profile.bf16_source,
        "bandwidth_source": profile.bandwidth_source, "fallback": profile.fallback, "note": profile.note,
    }  # fmt: skip
    shown = {**data, "pairs": "; ".join(
        _pair_text(p.weights, p.inputs) + (f" at {p.rate:g} × bf16" if p.rate else "") for p in profile.pairs
    )}  # fmt: skip
    answer(args.json, data, "\n".join(f"{key:<20}{value}" for key, value in shown.items() if value not in (None, "")))
    return 0


def _check(args: argparse.Namespace) -> int:
    profile = load_profile(args.hardware or "auto")
    config, quantization = read_config(args.name, args.revision)
    if quantization is None:
        raise ConfigError(f"{args.name} is not quantized: there is nothing to check")
    model = empty_model(config)
    allocation = quantization.resolve(model)
    layers = traced(model)[0]
    rows = [_row(profile, layer, allocation[layer.name]) for layer in layers if layer.name in allocation]
    share = share_of(profile, layers, allocation)
    text = table(("layer", "weights", "inputs", "runs", "why"), [tuple(row.values()) for row in rows])
    text += f"\n\nOf the bit operations on {profile.title}: " + ", ".join(
        f"{part:.1%} {state}" for state, part in share.items()
    )
    answer(args.json, {"hardware": profile.name, "share": share, "layers": rows}, text)
    return 0


def share_of(profile: Profile, layers: Sequence[LayerInfo], allocation: Allocation) -> dict[str, float]:
    """`native_share` of all that was traced, layers in fp32 included; the allocation may name others, never called."""
    called = {layer.name for layer in layers}
    return native_share(profile, layers, {name: formats for name, formats in allocation.items() if name in called})


def _row(profile: Profile, layer: LayerInfo, formats: Any) -> dict[str, str]:
    run = profile.runs(formats)
    state = run.state if run.state != "simulated" or run_anywhere(formats) else "nowhere known"
    return {
        "layer": layer.name, "weights": formats.weight.name, "inputs": str(formats.activation or "fp32"),
        "runs": state, "why": run.reason,
    }  # fmt: skip
