"""Number formats: what exists, exact rounding, and bit packing."""

from fliqs_hf.formats.spec import COMMON, FloatFormat, Format, IntFormat, parse

__all__ = ["COMMON", "FloatFormat", "Format", "IntFormat", "parse"]
