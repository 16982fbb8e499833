"""Number formats: what exists, exact rounding, and bit packing."""

from fliqs_hf.formats.packing import pack, packed_bytes, unpack
from fliqs_hf.formats.rounding import code_values, decode, encode, round_to_format
from fliqs_hf.formats.spec import COMMON, FloatFormat, Format, IntFormat, parse

__all__ = [
    "COMMON",
    "FloatFormat",
    "Format",
    "IntFormat",
    "code_values",
    "decode",
    "encode",
    "pack",
    "packed_bytes",
    "parse",
    "round_to_format",
    "unpack",
]
