"""How many images may go through a model at once, by the memory that is free."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from fliqs_hf.cost import trace_layers

#: At most so much of the memory that is free is taken.
SHARE_OF_MEMORY = 0.5
#: A pass that looks at what layers read and give takes so many times the largest input and output of a layer, in
#: float32 (measured on ViTs: DeiT-Tiny).
WORKING = 6


def room(device: torch.device) -> int:
    """Bytes on `device` that may be taken."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(SHARE_OF_MEMORY * free)


def fitting_images(model: Any, image: Tensor | None = None) -> int:
    """How many images there is room for beside `model`, on its device; at least one.

    Args: image: one, as the model takes it, [1, channels, height, width]; default: of the size that its config names.
    Raises: ConfigError: the model cannot be run on it.
    """
    largest = max((layer.input_numel + layer.output_numel for layer in trace_layers(model, image)), default=0)
    device = next(model.parameters()).device
    return max(1, room(device) // (WORKING * 4 * max(1, largest)))
