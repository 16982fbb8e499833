"""Exact rounding to a format, and values <-> codes. The reference that every faster path must equal bit for bit.

How every case is rounded:
    ties       to the even significand (IEEE 754-2019, roundTiesToEven). Where a format has no mantissa bits both
               neighbours can have significand 1; then the larger in magnitude, as section 4.3.1 of the standard says
               (E2M0: 1.5 -> 2, 3 -> 4). Libraries that take the even code instead, as gfloat does, differ (3 -> 2).
    overflow   saturates at +-max_value, infinities too
    underflow  gradual, to the nearest subnormal or zero
    zero       keeps its sign in float formats, also where a negative value rounds to it; integers have only +0
    NaN        stays NaN in `round_to_format`; in `encode` see there

All arithmetic is in float64, where the scaling by powers of two is exact for every float32, float16 and bfloat16
value, subnormals included.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fliqs_hf.errors import FormatError
from fliqs_hf.formats.block import BlockFormat
from fliqs_hf.formats.plain import IntFormat
from fliqs_hf.formats.spec import Format

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
_F64_FRACTION_BITS = 52
_F64_BIAS = 1023


def round_to_format(x: Tensor, fmt: Format) -> Tensor:
    """Round every element to the nearest value of `fmt` (see the module's docstring for ties, overflow, zero, NaN).

    The result is exactly a value of `fmt` in the dtype of `x`. Where that dtype holds fewer digits or a smaller range
    than `fmt` (bfloat16 input to E5M10 or INT16), saturation stops at the largest value that both hold (65280 instead
    of 65504); every other result is representable, because rounding never adds significant digits.

    Args:
        x: any shape, float32, bfloat16, float16 or float64, already divided by its scale.
    Returns: shape, dtype and device of `x`; detached (the straight-through gradient is `quant.fake`'s job).
    Raises: FormatError: `x` is not floating-point.
    """
    if x.dtype not in _FLOAT_DTYPES:
        raise FormatError(f"cannot round {x.dtype} to {fmt.name}: pass float32, bfloat16, float16 or float64")
    limit = _largest_common(fmt, x.dtype)
    significand, step = _split(x.detach().double().clamp(-limit, limit), fmt)
    rounded: Tensor = significand * step
    if fmt.is_integer:
        rounded = rounded + 0.0  # -0 + 0 = +0
    return rounded.to(x.dtype)


def encode(values: Tensor, fmt: Format) -> Tensor:
    """Codes of the nearest values of `fmt`: rounds first, as `round_to_format` does, so any value is accepted.

    Float formats: sign, exponent and mantissa fields, from the top bit down. Integers: two's complement in `fmt.bits`
    bits. Infinities saturate, so the code of an infinity is never produced; NaN becomes `fmt.nan_code`.

    Args:
        values: any shape, a floating-point dtype.
    Returns: codes in the shape of `values`, uint8 for formats of at most 8 bits, else int32.
    Raises: FormatError: NaN in a format that has none, or `values` is not floating-point.
    """
    # Not in the dtype of `values`: a narrow one would lower the value at which saturation stops.
    rounded = round_to_format(values.double() if values.dtype in _FLOAT_DTYPES else values, fmt)
    nan = rounded.isnan()
    if fmt.nan_code is None and bool(nan.any()):
        raise FormatError(f"{int(nan.sum())} of {nan.numel()} values are NaN, which {fmt.name} cannot hold")
    rounded = rounded.masked_fill(nan, 0.0)
    if fmt.is_integer:
        codes: Tensor = rounded.long() & (2**fmt.bits - 1)
    else:
        significand, step = _split(rounded.abs(), fmt)
        # `significand` has its leading 1 at bit `mantissa_bits` in normal numbers: it carries into the exponent field.
        binade = _exponent(step) + fmt.mantissa_bits - fmt.min_exponent
        codes = significand.long() + (binade << fmt.mantissa_bits)
        codes = codes | (rounded.signbit().long() << (fmt.bits - 1))
        if fmt.nan_code is not None:
            codes = codes.masked_fill(nan, fmt.nan_code)
    return codes.to(torch.uint8 if fmt.bits <= 8 else torch.int32)


def decode(codes: Tensor, fmt: Format, *, check: bool = True) -> Tensor:
    """Values of codes; the inverse of `encode`. The codes of NaN and infinity decode to NaN and infinity.

    Args:
        codes: any shape, uint8 or a signed integer dtype.
        check: refuse damaged codes, which waits for the device. False suits codes that were checked before, such as
            those of a layer at every forward pass: nothing is raised, and the integer code of -2**(bits-1) gives NaN.
    Returns: float32, in the shape of `codes`, on its device.
    Raises: FormatError: not an integer dtype; and with `check` a code outside 0...2**bits - 1, or the integer code
        that stands for -2**(bits-1), which the symmetric formats do not have.
    """
    if codes.dtype not in _CODE_DTYPES:
        raise FormatError(f"codes are {codes.dtype}: decode takes uint8, int16, int32 or int64")
    flat = codes.reshape(-1)
    check = check and flat.numel() > 0
    if check:
        low, high = (int(value) for value in torch.aminmax(flat))
        if low < 0 or high >= 2**fmt.bits:
            bad = low if low < 0 else high
            raise FormatError(f"{bad} is not a code of {fmt.name}: codes are 0 to {2**fmt.bits - 1}")
    table = torch.from_numpy(_code_values(fmt)).to(codes.device, non_blocking=True)
    values = table.index_select(0, flat.to(torch.int32))
    # The one NaN of an integer's table makes the sum NaN: one fast pass, where `isnan().any()` takes three.
    if check and fmt.is_integer and bool(values.sum().isnan()):
        raise FormatError(
            f"code {2 ** (fmt.bits - 1)} stands for {-(2 ** (fmt.bits - 1))}, which symmetric {fmt.name} does not "
            f"have (it ends at {-fmt.max_value:.0f}): the codes are damaged or of another format"
        )
    return values.reshape(codes.shape)


def code_values(fmt: Format) -> Tensor:
    """The value of every code, in the order of the codes.

    Returns: float32 [2**bits] on the CPU, a fresh copy. NaN and infinity where the format has them, and NaN for the
        integer code of -2**(bits-1), which stands for nothing.
    """
    return torch.from_numpy(_code_values(fmt).copy())


@lru_cache(maxsize=64)
def _code_values(fmt: Format) -> NDArray[np.float32]:
    # NumPy: a tensor cached while a meta device or fake tensors are active would stay one.
    if isinstance(fmt, BlockFormat):
        return _code_values(fmt.element)
    codes = np.arange(2**fmt.bits)
    half = 2 ** (fmt.bits - 1)
    table: NDArray[np.float32] = np.empty(codes.shape, dtype=np.float32)
    if isinstance(fmt, IntFormat):
        table[:] = np.where(codes < half, codes, codes - 2**fmt.bits)
        table[half] = math.nan
        return table
    magnitude = codes % half
    field, fraction = np.divmod(magnitude, 2**fmt.mantissa_bits)
    significand = np.where(field > 0, fraction + 2**fmt.mantissa_bits, fraction).astype(np.float64)
    values = np.ldexp(significand, np.maximum(field, 1) - 1 + fmt.min_exponent - fmt.mantissa_bits)
    values[magnitude > fmt.max_code] = math.nan
    if fmt.specials == "ieee":
        values[magnitude == fmt.max_code + 1] = math.inf
    table[:] = np.where(codes < half, values, -values)
    return table


def _split(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Significand (an integer after rounding) and step of every element: float64, nearest value = product.

    `x` is float64 and within the format's range, or NaN.
    """
    exponent = _exponent(x).clamp(min=fmt.min_exponent)
    step = _power_of_two(exponent - fmt.mantissa_bits)
    return (x / step).round(), step


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|) of normal float64 values, read off the exponent bits: int64; less for zero and subnormals."""
    return ((x.view(torch.int64) >> _F64_FRACTION_BITS) & 0x7FF) - _F64_BIAS


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent, exact, for exponents of normal float64 values: int64 -> float64."""
    return ((exponent + _F64_BIAS) << _F64_FRACTION_BITS).view(torch.float64)


@lru_cache(maxsize=256)
def _largest_common(fmt: Format, dtype: torch.dtype) -> float:
    """Largest value that both `fmt` and `dtype` hold: `fmt.max_value`, but for formats finer than `dtype`."""
    info = torch.finfo(dtype)
    bound = min(fmt.max_value, info.max)
    digits = 1 + min(fmt.mantissa_bits, round(-math.log2(info.eps)))
    fraction, exponent = math.frexp(bound)  # bound = fraction * 2**exponent, 0.5 <= fraction < 1
    return math.ldexp(math.floor(math.ldexp(fraction, digits)), exponent - digits)
