"""The arguments of `fliqs-hf compare`; what it does is in `fliqs_hf/cli/compare.py`."""

from __future__ import annotations

HELP = "the search against its alternatives at equal cost (its own --help)"
GO_ON = "the same command goes on where it was"
EXAMPLES = """  fliqs-hf compare runs/digits/fliqs/fp32 --dataset_name digits --output compare.csv"""
