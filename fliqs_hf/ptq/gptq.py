"""GPTQ: round a weight column by column, and let the columns that follow make up for the error so far.

Of all weights on the grid it looks for one that keeps the layer's *output* on the calibration inputs, where rounding
to nearest keeps the weight. Nothing in it asks what the grid is: a column is rounded by the routine that serves every
format, integer or float, on the scale that its row has had from the start.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Differs: float64 (a search ends in minutes anyway, and the
result does not depend on the order of a sum), columns in the order of falling Hessian diagonal always, and damping
that leaves inputs that are zero throughout alone: their columns are rounded to nearest. The size of the inputs does
not matter: they are brought to about 1 by a power of two, so that inputs of 1e-22 and 1e20 give the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fliqs_hf.checks import is_number
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.formats import Format
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.quant.grid import grid_params, round_to_grid
from fliqs_hf.quant.scale import unit_factor

#: Added to the Hessian's diagonal, as a part of its mean (the paper's 1 %).
DAMPING = 0.01
#: Columns after which an error reaches the columns beyond its block, as one matrix product (the paper's lazy batch).
BLOCK = 128
#: On the scale of least squared error in the weight.
SCALE_FACTORS = (1.0, 0.76, 0.84, 0.92, 1.08, 1.18, 1.3)
#: Elements of a layer's input that are in work at once while the Hessian is summed.
_CHUNK = 2**24


def input_hessian(layer: nn.Module, x: Tensor) -> Tensor:
    """Hessian of the squared output error in one row of the weight, mean over inputs: 2·XᵀX / n.

    Args:
        layer: of a kind whose `input_rows` are known; a convolution's are its patches.
        x: what the layer reads.
    Returns: float64 on the device of `x`, [k, k], k the weights of an output channel; [groups, k, k] of a convolution
        with groups, whose output channels read the patches of their own group alone. Summed in float32, of inputs that
        a power of two brings to about 1: exact scaling, so that neither 1e-22 nor 1e20 is lost in a square.
    """
    kind = kind_of(layer)
    x = kind.tokens_of(x)
    elements_per_token = x[0].numel() * kind.copies(layer) if len(x) else 1
    hessian = torch.zeros(0, 0, dtype=torch.float64, device=x.device)
    unit = unit_factor(x, None).view(()) if x.numel() else 1.0
    count = 0
    for chunk in x.split(max(1, _CHUNK // elements_per_token)):
        chunk = ((chunk if chunk.dtype == torch.float64 else chunk.float()) * unit).float()
        rows = kind.input_rows(layer, chunk)
        # The sum of a chunk in float32 is off by 1e-5 of its value at most: far less than the damping.
        product = (rows.mT @ rows).double()
        hessian = product if not count else hessian.add_(product)
        count += rows.shape[-2]
    return hessian.mul_(2 / max(count, 1)) / unit / unit


def gptq_round(weight: Tensor, scale: Tensor, fmt: Format, hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight on the grid `fmt` × `scale`, rounded so that the error in the output stays small.

    Ties go to even, overflow saturates at ±max_value × scale, zeros come out as +0. With a diagonal Hessian this is
    rounding to nearest, bit for bit.

    Args:
        weight: [out, k], floating-point, finite.
        scale: float32 [out, 1], [1, 1] or, of blocks, [out, k], positive; real value = code value × scale.
        hessian: [k, k] of the inputs, or [groups, k, k], of which each serves its part of the rows in turn, as
            `input_hessian` gives it; its scale does not matter.
        damping: added to the diagonal, as a part of its mean.
    Returns: float32 [out, k], on the grid.
    Raises: DataError: a Hessian that is not finite, of another shape, or not positive definite even with damping.
        ConfigError: damping that is not a positive number.
    """
    check_damping(damping)
    columns = weight.shape[1]
    groups = len(hessian) if hessian.dim() == 3 else 1
    fits = hessian.dim() in (2, 3) and hessian.shape[-2:] == (columns, columns) and groups and not len(weight) % groups
    if not fits or not bool(hessian.isfinite().all()):
        raise DataError(
            f"the Hessian is {list(hessian.shape)} and must be [{columns}, {columns}], or one such for each of groups "
            f"that divide the {len(weight)} output channels, without NaN or infinity: check the calibration images"
        )
    hessian = hessian.double().view(groups, columns, columns)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    sorted_rows = hessian.take_along_dim(order[:, :, None], 1)
    factor = _inverse_factor(sorted_rows.take_along_dim(order[:, None, :], 2), damping)
    data = grid_params(fmt)
    left = weight.view(groups, -1, columns).take_along_dim(order[:, None], 2).double()
    rounded = torch.empty_like(left, dtype=torch.float32)
    scale = scale.float().expand(len(weight), -1).reshape(groups, -1, scale.shape[1])
    if scale.shape[2] > 1:  # each column has its own
        scale = scale.take_along_dim(order[:, None], 2)
    with _one_thread():
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            errors = torch.empty(*left.shape[:2], end - start, dtype=torch.float64, device=left.device)
            for j in range(start, end):
                column = left[:, :, j : j + 1]
                step = scale if scale.shape[2] == 1 else scale[:, :, j : j + 1]
                nearest = round_to_grid(column.float(), step, data, saturate=True, integer=fmt.is_integer)
                rounded[:, :, j : j + 1] = nearest
                error = (column - nearest) / factor[:, j, j, None, None]
                left[:, :, j + 1 : end] -= error * factor[:, j, None, j + 1 : end]
                errors[:, :, j - start] = error[:, :, 0]
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
    place = order[:, None].expand_as(rounded)
    return torch.empty_like(rounded).scatter_(2, place, rounded).view(len(weight), columns)


def gptq_round_scaled(
    weight: Tensor, scale: Tensor, fmt: Format, hessian: Tensor, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """`gptq_round` on the best of several scales for each row: the one with the least error in the layer's output.

    Args:
        scale: as for `gptq_round`, [out, 1]; those tried are `SCALE_FACTORS` times it, which are 1 for the first.
    Returns: the weight, float32 [out, k], on the grid of the scales, and these, float32 [out, 1].
    Raises: as `gptq_round`.
    Source: the objective of GPTQ, equation 1, for the scale as well as for the codes.
    """
    groups = len(hessian) if hessian.dim() == 3 else 1
    factors = torch.tensor(SCALE_FACTORS, device=weight.device)
    rows = weight.view(groups, 1, -1, weight.shape[1]).expand(-1, len(factors), -1, -1)
    scales = scale.float().view(groups, 1, -1, 1) * factors.view(-1, 1, 1)
    rounded = gptq_round(rows.reshape(-1, weight.shape[1]), scales.view(-1, 1), fmt, hessian, damping).view(rows.shape)
    error = (rounded - rows).double()
    change = error @ _damped(hessian.double().view(groups, *hessian.shape[-2:]).clone(), damping)[:, None]
    best = change.mul_(error).sum(-1).argmin(1, keepdim=True)[..., None]
    scales, rounded = scales.take_along_dim(best, 1), rounded.take_along_dim(best, 1)
    return rounded.reshape(weight.shape), scales.reshape(scale.shape)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For thousands of operators on a column each: to split them over threads gains nothing, and where another
    program has one of the cores each waits for it (DeiT-Tiny, two cores at a load of 8: 10 seconds instead of 41)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_damping(damping: float) -> None:
    """Raises: ConfigError: not a positive number."""
    if not (is_number(damping, 0) and damping):
        raise ConfigError(f"damping={damping!r}: give a positive number, such as {DAMPING}")


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [groups, k, k] with damping on its diagonals, in place."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # Inputs that are all zero have no Hessian at all: then every column is on its own.
    diagonal.add_(torch.where(mean > 0, damping * mean, 1.0))
    return hessian


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damping)⁻¹, [groups, k, k].

    Row j says how the columns after j answer an error in j.
    """
    # By a power of four, whose root is exact: the columns' answers are the same bits for a Hessian of any size.
    largest = hessian.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    hessian = torch.ldexp(hessian, -2 * (torch.frexp(largest).exponent // 2))
    _damped(hessian, damping)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not bool(failed.any()):  # nearly singular: there may be a factor, but none of the inverse
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed.any()) or not bool(upper.isfinite().all()):
        raise DataError(f"the Hessian is not positive definite with damping={damping:g}: raise it, to 0.1 say")
    return upper
