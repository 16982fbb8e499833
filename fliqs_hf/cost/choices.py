"""What formats are chosen from where nobody says which: those that run somewhere, and on the hardware at hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost.hardware import Profile, load_profile, profile_names, restricted
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.formats.plain import IntFormat
from fliqs_hf.formats.spaces import parse_formats

#: Wider formats are not what a model is quantized for.
_MOST_BITS = 8


@dataclass(frozen=True)
class Choices:
    """What formats are chosen from.

    Attributes:
        activation: weights and inputs have the "same" format, or "separate" ones.
        profile: they were chosen for; None where they were named and no hardware was.
        hardware: how to name it again, on any machine: the profile, or its file.
    """

    formats: tuple[Format, ...]
    activation: Literal["same", "separate"]
    profile: Profile | None = None
    hardware: str | None = None


def choices(
    search_space: str | Sequence[str | Format] | None = None,
    hardware: str | None = None,
    activation: Literal["same", "separate"] | None = None,
    named: Literal["same", "separate"] = "same",
) -> Choices:
    """From the arguments of a search.

    Args:
        search_space: as it is without `hardware`, else what that runs of it; None: all formats of at most 8 bits that
            some known hardware multiplies as they are and that this one runs, natively or exactly as others of at
            most 8 bits.
        hardware: of a profile, "auto" for this machine, or a .yaml file; None with a space that is named: any.
        activation: default: `named` with a space that is named; else "separate" where every pair of the formats runs
            so.
    Raises: ConfigError: no such profile, or none of the formats runs there. FormatError: bad formats.
    """
    if search_space is not None and hardware is None:
        return Choices(parse_formats(search_space), activation or named)
    profile = load_profile(hardware or "auto")
    name = profile.name if hardware in (None, "auto") else hardware
    if search_space is not None:
        return Choices(tuple(restricted(parse_formats(search_space), profile)), activation or named, profile, name)
    kept = tuple(fmt for fmt in _known(profile) if _runs(profile, fmt, fmt))
    if not kept:
        raise ConfigError(
            f"{profile.title} runs no format of at most {_MOST_BITS} bits for weights and inputs alike: name formats "
            "with search_space"
        )
    pairs = all(_runs(profile, *pair) for pair in itertools.product(kept, repeat=2))
    return Choices(kept, activation or ("separate" if pairs else "same"), profile, name)


def _known(profile: Profile) -> list[Format]:
    """Formats that this or a profile of the package multiplies as they are, by bits, integers first."""
    found = {*_anywhere(), *_multiplied(profile)}
    if profile.largest_weight_code == 64:
        found.add(IntFormat(7))  # of whose products its sums are exact, unlike those of INT8
    return sorted(found, key=lambda fmt: (fmt.effective_bits, not fmt.is_integer, fmt.name))


@cache
def _anywhere() -> frozenset[Format]:
    return frozenset().union(*(_multiplied(load_profile(name)) for name in profile_names()))


def _multiplied(profile: Profile) -> frozenset[Format]:
    found = {fmt for pair in profile.pairs for fmt in (*pair.weights, *pair.inputs)}
    return frozenset(fmt for fmt in found if fmt.bits <= _MOST_BITS and not fmt.for_inputs_only)


def _runs(profile: Profile, weight: Format, inputs: Format) -> bool:
    """Natively, or exactly as others of so few bits: what runs as BF16 saves no more than being decoded does."""
    run = profile.runs(LayerFormats(weight, inputs))
    return run.state == "native" or (run.state == "carried" and max(run.carrier_bits) <= _MOST_BITS)
