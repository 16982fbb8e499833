"""What formats are chosen for and from, by the arguments of commands that choose them without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import Target, target_kinds
from fliqs_hf.cost.hardware import Profile, restricted
from fliqs_hf.cost.target import given_targets
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.formats.spaces import parse_formats, with_zero_point


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


def formats(args: argparse.Namespace, profile: Profile | None) -> list[Format]:
    """To choose from: those that are given, and for inputs that are decided apart the same integers with zero points.

    Raises: ConfigError: the profile runs none of them."""
    space = args.search_space[0] if len(args.search_space) == 1 else args.search_space
    found = parse_formats(space) if profile is None else restricted(parse_formats(space), profile)
    if args.activation != "separate" or not zero_points(args):
        return list(found)
    more = {with_zero_point(fmt): fmt for fmt in found}
    if profile is not None:
        more = {new: old for new, old in more.items() if profile.runs(LayerFormats(old, new)).state != "simulated"}
    return [*found, *(fmt for fmt in more if fmt not in found)]


def zero_points(args: argparse.Namespace) -> bool:
    """Whether integer inputs may have one: where there are images and nothing else is asked for."""
    return bool(args.calibration) and args.zero_points != "false" and args.activations in (None, "dynamic")


def rules(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, float]]:
    """`require` and `min_bits` of layers by pattern, as `SearchSpace` takes them.

    Raises: ConfigError: no PATTERN=VALUE, or no number.
    """
    require = {pattern: value.split(",") for pattern, value in _pairs("require", args.require)}
    min_bits = {}
    for pattern, value in _pairs("min_bits", args.min_bits):
        try:
            min_bits[pattern] = float(value)
        except ValueError as error:
            raise ConfigError(f"--min_bits {pattern}={value}: {value!r} is no number of bits") from error
    return require, min_bits


def _pairs(name: str, texts: Sequence[str] | None) -> list[tuple[str, str]]:
    found = [text.rpartition("=")[::2] for text in texts or ()]
    if wrong := [value for pattern, value in found if not (pattern and value)]:
        raise ConfigError(f"--{name} {wrong[0]!r}: give PATTERN=VALUE, such as 'classifier=8'")
    return found
