"""Number formats: what exists, exact rounding, and bit packing."""

from fliqs_hf.formats.block import BlockFormat
from fliqs_hf.formats.packing import pack, packed_bytes, unpack
from fliqs_hf.formats.plain import FloatFormat, IntFormat
from fliqs_hf.formats.rounding import code_values, decode, encode, round_to_format
from fliqs_hf.formats.spec import COMMON, Format, parse, register_format, unregister_format

__all__ = [
    "COMMON",
    "BlockFormat",
    "FloatFormat",
    "Format",
    "IntFormat",
    "code_values",
    "decode",
    "encode",
    "pack",
    "packed_bytes",
    "parse",
    "register_format",
    "round_to_format",
    "unpack",
    "unregister_format",
]
