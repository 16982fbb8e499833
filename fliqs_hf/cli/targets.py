"""What formats are chosen for and from, by the arguments of commands that choose them without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import Target, target_kinds
from fliqs_hf.cost.choices import choices
from fliqs_hf.cost.latency import LatencyTable
from fliqs_hf.cost.target import given_targets
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.formats.spaces import with_zero_point


def targets(args: argparse.Namespace) -> list[Target]:
    """All that are given; several are to be met together, so each is a limit.

    Raises: ConfigError: a kind that is given twice.
    """
    found = []
    for kind, values in given_targets(vars(args)).items():
        if len(values) > 1:
            raise ConfigError(f"target_{kind} is given more than once, as {' and '.join(map(str, values))}")
        found.append(Target(kind, values[0], target_kinds()[kind].is_limit))
    return found


def settle(args: argparse.Namespace, named: Literal["same", "separate"]) -> None:
    """Put what is chosen from into the arguments, which are recorded: formats, whether weights and inputs are chosen
    apart (default: `named` where formats are named, else what the hardware runs), and the profile instead of "auto".
    Where inputs are chosen apart they may also have the same integers with zero points.

    Raises: ConfigError: no such profile, or it runs none of them. FormatError: bad formats."""
    asked = args.activation
    space = args.search_space and (args.search_space[0] if len(args.search_space) == 1 else args.search_space)
    found = choices(space, args.hardware, args.activation, named)
    profile, kept = found.profile, list(found.formats)
    args.activation, args.hardware = found.activation, found.hardware
    if found.activation == "separate" and zero_points(args):
        more = {with_zero_point(fmt): fmt for fmt in kept}
        if profile is not None:
            more = {new: old for new, old in more.items() if profile.runs(LayerFormats(old, new)).state != "simulated"}
        kept += [fmt for fmt in more if fmt not in kept]
    if args.latency_table and space is None:
        kept = _timed(args, kept, asked)
    args.search_space = [fmt.name for fmt in kept]


def _timed(args: argparse.Namespace, formats: Sequence[Format], asked: str | None) -> list[Format]:
    """Those of the default whose times the table has, in every pair where weights and inputs are chosen apart.

    Args: asked: how formats are to be chosen, where that was given.
    Raises: ConfigError: none, or not in every pair where they were to be chosen apart."""
    known = LatencyTable.load(args.latency_table).pairs
    kept = [fmt for fmt in formats if (fmt.name, fmt.name) in known]
    if args.activation == "separate" and not {(w.name, a.name) for w in kept for a in kept} <= known:
        if asked == "separate":
            raise ConfigError(
                f"{args.latency_table} lacks times of some pairs of {', '.join(fmt.name for fmt in kept)}: leave "
                "--activation separate out, or measure the pairs with fliqs-hf profile"
            )
        args.activation = "same"
    if not kept:
        raise ConfigError(
            f"{args.latency_table} has no times of {', '.join(fmt.name for fmt in formats)}, which are chosen from by "
            "default: name formats with --search_space, or measure these with fliqs-hf profile"
        )
    return kept


def zero_points(args: argparse.Namespace) -> bool:
    """Whether integer inputs may have one: where there are images and nothing else is asked for."""
    return bool(args.calibration) and args.zero_points != "false" and args.activations in (None, "dynamic")
