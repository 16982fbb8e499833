"""Sets of formats to search over, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fliqs_hf.errors import FormatError
from fliqs_hf.formats.block import integer_blocks
from fliqs_hf.formats.plain import IntFormat
from fliqs_hf.formats.spec import ALIASES, Format, parse

#: The paper's spaces: S has {4, 8, 16} bits, L has {4 … 8, 16}, each in an integer and a float version, with BF16 for
#: 16 bits in both (Dotzel et al. 2024, section 4). `mixed` is ours: both families in one space, from 2 bits up.
SPACES: dict[str, tuple[str, ...]] = {
    "fliqs-s-int": ("int4", "int8", "bf16"),
    "fliqs-s-fp": ("e2m1", "e4m3", "bf16"),
    "fliqs-l-int": ("int4", "int5", "int6", "int7", "int8", "bf16"),
    "fliqs-l-fp": ("e2m1", "e2m2", "e2m3", "e3m2", "e3m3", "e4m2", "e4m3", "e5m2", "e3m4", "bf16"),
    "mixed": (
        *(f"int{bits}" for bits in range(2, 9)),
        *("e2m0", "e2m1", "e2m2", "e2m3", "e3m2", "e3m3", "e4m3"),
    ),
}


def with_zero_point(fmt: Format) -> Format:
    """Of a plain integer of at most 7 bits the same with a zero point, for inputs; any other format itself.

    With 8 bits the codes less their zero point would need 9, and no kernel of 8-bit integers takes them.
    """
    plain = isinstance(fmt, IntFormat) and fmt.bits < 8
    return integer_blocks(fmt.bits, None, zero_point=True) if plain else fmt


def parse_formats(space: str | Sequence[str | Format]) -> tuple[Format, ...]:
    """The formats of a named space, or of a list of formats (also one string with commas).

    Raises: FormatError: an unknown name, an empty list, a format that is given twice, or neither a name nor a list.
    """
    if not isinstance(space, (str, Sequence)):
        raise FormatError(f"a search space is a name or a list of formats, not {space!r}; named: {', '.join(SPACES)}")
    if isinstance(space, str):
        names = SPACES.get(space.strip().lower(), tuple(part for part in space.split(",") if part.strip()))
        if len(names) == 1 and names[0].lower() not in ALIASES and not any(map(str.isdigit, names[0])):
            raise FormatError(f"unknown search space {space!r}; named spaces: {', '.join(SPACES)}; or list formats")
        space = names
    if isinstance(space, (Mapping, bytes)) or not isinstance(space, Iterable):
        raise FormatError(f"search space {space!r}: give a list of formats, or the name of a space")
    formats = tuple(parse(name) for name in space)
    if not formats:
        raise FormatError("a search space needs at least one format")
    twice = {fmt.name for fmt in formats if formats.count(fmt) > 1}
    if twice:
        raise FormatError(f"the search space has {', '.join(sorted(twice))} more than once")
    return formats
