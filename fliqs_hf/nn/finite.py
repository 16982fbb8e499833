"""Finding NaN and infinities in weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fliqs_hf.errors import FormatError


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. In one pass, and without the overflow that a sum of valid values has."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.is_meta:  # of "meta" tensors nothing is known
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def not_finite(model: nn.Module) -> str | None:
    """The first parameter or stored buffer that holds NaN or infinity, by its name in `state_dict`."""
    return next((name for name, tensor in model.state_dict().items() if not all_finite(tensor)), None)


def check_finite(model: nn.Module) -> None:
    """Raises: FormatError: `model`, which is about to be quantized, holds NaN or infinity; it names the tensor."""
    if name := not_finite(model):
        raise FormatError(
            f"cannot quantize a model that holds NaN or infinity in {name}; check the checkpoint that it comes from"
        )
