"""What rounding changes, for many formats of one tensor: made for sums over errors, not for the rounded values.

All scaled formats of a tensor share its absolute maximum, the peak, so the tensor is divided by it once. With z = x /
peak a format's codes are y = z · max_value, and the error of x is (round(y) − y) · peak / max_value. A caller that
sums the products of errors with something else moves the factor there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fliqs_hf.formats import Format
from fliqs_hf.quant.grid import EXPONENT_MASK, grid_params


def code_errors(z: Tensor, fmt: Format, out: Tensor, scratch: Tensor) -> Tensor:
    """round(y) − y into `out`, three passes over memory for integers and six for floats.

    y = z · max_value, or z itself for a format that is not scaled. As y may be one float32 rounding off x / scale, a
    value on the midpoint of two codes may be rounded to the other one than `quantize_activation` rounds it to.

    Args:
        z: float32, |z| at most 1 where `fmt` is scaled.
        out, scratch: of the shape of `z`, float32 and int32; both are overwritten.
    """
    data, factor = grid_params(fmt), fmt.max_value if fmt.is_scaled else 1.0
    torch.mul(z, factor, out=out)
    if fmt.is_integer:
        out.round_()
    else:  # see `quant.grid`; K · p is exact, so nothing is lost where it is multiplied within the addition
        torch.bitwise_and(out.view(torch.int32), EXPONENT_MASK, out=scratch)
        p = scratch.view(torch.float32).clamp_(min=data.min_normal)
        torch.add(out, p, alpha=data.magic, out=out)  # type: ignore[arg-type]
        torch.sub(out, p, alpha=data.magic, out=out)  # type: ignore[arg-type]
    return torch.add(out, z, alpha=-factor, out=out)
