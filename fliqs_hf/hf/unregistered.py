"""Stopping a process that loads a packed checkpoint without this package.

Transformers only warns about a quantization method that it does not know, and goes on with random weights if it is
told to ignore mismatched sizes. It does refuse, whatever it is told, a fusion that it does not know, and quotes its
name. So the config of a packed checkpoint asks for one whose name says what is missing; where this package is
imported, the quantizer takes the entry away before Transformers reads it. (A wrong `transformers_weights` is refused
as well, but removed whenever a config is saved.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HINT = (
    "this checkpoint is packed by fliqs_hf: `pip install fliqs-hf`, `import fliqs_hf` before loading it, "
    "and load it with a class of the whole model"
)


def stop_others(config: Any) -> None:
    """Mark the config of a packed model, and those of its parts: loaded alone, they know of no quantization."""
    for part in _parts(config):
        part.fusion_config = {**(getattr(part, "fusion_config", None) or {}), HINT: True}


def let_through(config: Any) -> None:
    """Undo `stop_others`."""
    for part in _parts(config):
        fusions = getattr(part, "fusion_config", None)
        if isinstance(fusions, dict) and HINT in fusions:
            others = {name: value for name, value in fusions.items() if name != HINT}
            if others:
                part.fusion_config = others
            else:
                del part.fusion_config


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)
