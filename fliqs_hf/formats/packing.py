"""Bit packing: codes of 1 to 16 bits <-> bytes, with no bit wasted but the padding of the last byte of each plane.

A code of k bits is cut into *planes* whose widths are powers of two, widest first from the low bits up: 3 = 2 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1, 8 = 8, 11 = 8 + 2 + 1, 16 = 8 + 8. The planes follow each other in memory. Inside a plane
of w bits a byte holds c = 8 / w codes, and the layout is planar: the plane has n = ceil(numel / c) bytes, and byte i
holds codes i, n + i, 2n + i, ... in its bits 0...w-1, w...2w-1, 2w...3w-1, ... (the last ones are zero where numel is
no multiple of c). Unpacking is then a shift and a mask of whole contiguous runs; interleaved codes or a bit stream
would need a strided or per-bit copy, which is 5 to 30 times slower.

The size is the sum over the planes, sum_w ceil(numel * w / 8) bytes: numel * k / 8 exactly where numel is a multiple
of 8. Byte order plays no part, so files are portable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fliqs_hf.checks import is_whole
from fliqs_hf.errors import FormatError

MAX_BITS = 16  # of a code

_CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that `pack` makes of `numel` codes of `bits` bits.

    Raises: FormatError: `bits` outside 1...16, or `numel` below 0; or no whole number.
    """
    if not is_whole(numel, 0):
        raise FormatError(f"numel={numel!r}: the number of codes is a whole number of at least 0")
    return sum(_plane_bytes(numel, width) for _, width in _planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, in the layout of the module's docstring.

    Args:
        codes: any shape (taken in row-major order), uint8 or a signed integer dtype, each 0 <= code < 2**bits.
        bits: 1 to 16.
    Returns: uint8 [packed_bytes(codes.numel(), bits)], on the device of `codes`.
    Raises: FormatError: another dtype, a code out of range, or `bits` out of range.
    """
    planes = _planes(bits)
    if codes.dtype not in _CODE_DTYPES:
        raise FormatError(f"codes are {codes.dtype}: pack takes uint8, int16, int32 or int64")
    flat = codes.detach().reshape(-1)
    if flat.numel():
        low, high = (int(value) for value in torch.aminmax(flat))
        if low < 0 or high >= 2**bits:
            bad = low if low < 0 else high
            raise FormatError(f"code {bad} does not fit {bits} bits: codes are 0 to {2**bits - 1}")
    packed = torch.zeros(packed_bytes(flat.numel(), bits), dtype=torch.uint8, device=flat.device)
    start = 0
    for offset, width in planes:
        size = _plane_bytes(flat.numel(), width)
        plane = packed.narrow(0, start, size)
        values = ((flat >> offset) & (2**width - 1)).to(torch.uint8)
        for shift, run in zip(range(0, 8, width), values.split(size) if size else (), strict=False):
            plane.narrow(0, 0, run.numel()).bitwise_or_(run << shift)
        start += size
    return packed


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 [packed_bytes(numel, bits)].
        bits, numel: as given to `pack` (`codes.numel()`).
    Returns: codes [numel], uint8 (int32 above 8 bits), on the device of `packed`.
    Raises: FormatError: `packed` is not 1-D uint8 of exactly that length.
    """
    planes, expected = _planes(bits), packed_bytes(numel, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != expected:
        raise FormatError(
            f"packed codes are {packed.dtype} {list(packed.shape)}: {numel} codes of {bits} bits are "
            f"torch.uint8 [{expected}]; the tensor is truncated, or belongs to another layer or format"
        )
    # Whole runs are written, up to 7 codes beyond `numel`.
    codes = torch.empty(numel + 7, dtype=torch.uint8 if bits <= 8 else torch.int32, device=packed.device)
    start = 0
    for offset, width in planes:
        size = _plane_bytes(numel, width)
        plane = packed.narrow(0, start, size)
        start += size
        for index, position in enumerate(range(0, 8, width)):
            run = codes.narrow(0, index * size, size)
            if offset == 0:
                _move(plane, position, 0, width, out=run)
            elif bits <= 8:
                run.bitwise_or_(_move(plane, position, offset, width))
            else:  # the plane is bytes, the codes are wider
                run.bitwise_or_(_move(plane, position, 0, width).to(torch.int32) << offset)
    return codes.narrow(0, 0, numel)


def _planes(bits: int) -> list[tuple[int, int]]:
    """(position of the plane's lowest bit in the code, width), widest first."""
    if not is_whole(bits, 1, MAX_BITS):
        raise FormatError(f"bits={bits!r}: codes have 1 to {MAX_BITS} bits")
    planes, offset = [], 0
    while offset < bits:
        width = next(width for width in (8, 4, 2, 1) if width <= bits - offset)
        planes.append((offset, width))
        offset += width
    return planes


def _plane_bytes(numel: int, width: int) -> int:
    return -(-numel * width // 8)


def _move(plane: Tensor, source: int, target: int, width: int, *, out: Tensor | None = None) -> Tensor:
    """Bits `source`...`source + width - 1` of every byte, moved to `target`; as few passes as the positions allow."""
    shift = source - target
    mask = (2**width - 1) << target
    if shift == 0:
        return torch.bitwise_and(plane, mask, out=out)
    moved = torch.bitwise_right_shift(plane, shift, out=out) if shift > 0 else plane << -shift
    # A run at the top (or bottom) of the byte has nothing beside it after the shift.
    alone = source + width == 8 and target == 0
    return moved if alone else moved.bitwise_and_(mask)
