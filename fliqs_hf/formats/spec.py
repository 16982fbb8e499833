"""Names of formats, and the format that a name means."""

from __future__ import annotations

import re

from fliqs_hf.errors import FormatError
from fliqs_hf.formats.block import GROUPS, NAMED, BlockFormat, integer_blocks
from fliqs_hf.formats.packing import MAX_BITS
from fliqs_hf.formats.plain import BF16, FloatFormat, IntFormat

Format = IntFormat | FloatFormat | BlockFormat

#: Names people use -> layout. `intK` and `eXmY` (also `fpN_eXmY`, `float8_e4m3fn`) need no entry.
ALIASES: dict[str, FloatFormat] = {
    "fp3": FloatFormat(2, 0),
    "fp4": FloatFormat(2, 1),
    "fp5": FloatFormat(2, 2),
    "fp6": FloatFormat(3, 2),
    "fp7": FloatFormat(3, 3),
    "fp8": FloatFormat(4, 3),
    "fp16": FloatFormat(5, 10),
    "float16": FloatFormat(5, 10),
    "half": FloatFormat(5, 10),
    "bf16": BF16,
    "bfloat16": BF16,
}

#: The formats that tables and error messages list. Any other eXmY of at most 16 bits works as well.
COMMON: tuple[Format, ...] = (
    *(IntFormat(bits) for bits in range(2, 9)),
    *(FloatFormat(e, m) for e, m in ((2, 0), (3, 0), (2, 1), (2, 2), (3, 1), (3, 2), (2, 3), (3, 3), (4, 2))),
    *(FloatFormat(e, m) for e, m in ((4, 3), (5, 2), (3, 4), (8, 7))),
)

#: What cannot be unregistered.
_OWN = frozenset(NAMED)

#: Digits that do not end would be a ValueError of `int`.
_NUMBER = r"(\d{1,9})"
_INT = re.compile(rf"int_?{_NUMBER}(?:_g{_NUMBER})?(_zp)?")
_FLOAT = re.compile(rf"(?:(?:fp|float)_?{_NUMBER}_?)?e{_NUMBER}m{_NUMBER}(fn)?")


def parse(name: str | Format) -> Format:
    """The format called `name`: `int4`, `E2M1`, `fp4`, `fp8_e4m3`, `FP8-E4M3`, `float8_e4m3fn`, `bf16`, ...

    The ending `fn` ("finite") is accepted where it is true; E4M3 is the finite one with or without it.

    Raises: FormatError: no such format, a bit count that contradicts the layout (`fp8_e2m1`), or `fn` on a format
        with infinities (`float8_e5m2fn`).
    """
    if isinstance(name, (IntFormat, FloatFormat, BlockFormat)):
        return name
    if not isinstance(name, str):
        raise FormatError(f"a format is given by its name, not by {name!r} ({type(name).__name__})")
    key = name.strip().lower().removeprefix("torch.").replace("-", "_")
    if key in ALIASES:
        return ALIASES[key]
    if key in NAMED:
        return NAMED[key]
    if match := _INT.fullmatch(key):
        if match[2] is None and match[3] is None:
            return IntFormat(int(match[1]))
        return integer_blocks(int(match[1]), None if match[2] is None else int(match[2]), match[3] is not None)
    if match := _FLOAT.fullmatch(key):
        fmt = FloatFormat(int(match[2]), int(match[3]))
        if match[1] and int(match[1]) != fmt.bits:
            raise FormatError(f"{name!r} says {match[1]} bits, but E{match[2]}M{match[3]} has {fmt.bits}")
        if match[4] and fmt.specials == "ieee":
            raise FormatError(f"{name!r}: {fmt.name} has infinities, a finite-only variant does not exist here")
        return fmt
    raise FormatError(
        f"unknown format {name!r}. Known: {', '.join(f.name for f in COMMON)}; "
        f"in blocks {', '.join(NAMED)}; intK_gN of groups of {', '.join(map(str, GROUPS))}; intK_zp and intK_gN_zp, "
        f"with a zero point, for inputs; "
        f"aliases {', '.join(ALIASES)}; any other eXmY with 2 to 8 exponent bits and at most {MAX_BITS} bits"
    )


def register_format(fmt: BlockFormat) -> BlockFormat:
    """Make a block format known by its name: to `parse`, and so to searches, configurations, checkpoints and commands.

    Returns: `fmt`. Raises: FormatError: its name means another format, or is no word of small letters.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", fmt.name):
        raise FormatError(f"a format is called {fmt.name!r}, and not by small letters, digits and _ as in 'mxfp4'")
    try:
        known = parse(fmt.name)
    except FormatError:
        known = NAMED[fmt.name] = fmt
    if known != fmt:
        raise FormatError(f"{fmt.name!r} is a format already: choose another name")
    return fmt


def unregister_format(name: str) -> None:
    """Forget a registered format. Raises: FormatError: it is none, or one of the package's own."""
    if name not in NAMED or name in _OWN:
        raise FormatError(f"{name!r} is no format that was registered from outside")
    del NAMED[name]
