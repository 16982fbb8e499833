"""The arguments of `fliqs-hf search`; what it does is in `fliqs_hf/cli/search.py`."""

from __future__ import annotations

HELP = "search formats and train for them: the recipe (its own --help)"
GO_ON = "add --resume to go on"
EXAMPLES = """  fliqs-hf search digits
  fliqs-hf search settings.yaml --target_bits 4"""
