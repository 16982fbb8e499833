"""Options that were given and would have no effect beside the others: they are refused, before any work."""

from __future__ import annotations

import argparse

from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import parse
from fliqs_hf.formats.spaces import with_zero_point


def check_unused(args: argparse.Namespace, why: str, *names: str) -> None:
    """
    Args:
        why: the options `names` have no effect, after "--name ".
    Raises: ConfigError: one of them was given.
    """
    for name in names:
        if name in args.given:
            raise ConfigError(f"--{name} {why}")


def check_quantize(args: argparse.Namespace, chosen: bool, floor: bool) -> None:
    """
    Args:
        chosen: formats are chosen, not given. floor: of accuracy.
    Raises: ConfigError: an option of `fliqs-hf quantize` that would have no effect.
    """
    if floor and not chosen:
        check_unused(args, "is about formats that are chosen: those that are given are tested alone", "floor_steps")
    if not (chosen or floor):
        is_for = "is about labels, which only a target or a floor asks for: leave it out"
        check_unused(args, is_for, "label_column", "match_labels")
    if args.activation_format == "none":
        check_unused(args, "is about inputs in formats: give another --activation_format than none", "activations")
    if args.zero_points == "true" and (reason := _no_zero_points(args, chosen)):
        raise ConfigError(f"--zero_points true has no effect {reason}")


def _no_zero_points(args: argparse.Namespace, chosen: bool) -> str | None:
    """Why no input would have one."""
    if args.activations not in (None, "dynamic"):
        return f"with --activations {args.activations}: they are for dynamic input scales"
    if chosen:
        return "with --activation same: weights have none" if args.activation == "same" else None
    if args.allocation is not None:
        return "with --allocation, which says all formats"
    name = args.activation_format or "int8"
    if name == "none" or with_zero_point(fmt := parse(name)) == fmt:
        return f"with --activation_format {name}: they are for integers of less than 8 bits"
    return None
