"""Every code, neighbour and midpoint of every format against the rational oracle, `ml_dtypes` and `gfloat`."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fliqs_hf.errors import FormatError
from fliqs_hf.formats import COMMON, code_values, decode, encode, parse, round_to_format
from tests.helpers.reference import Oracle

OTHERS = ("int9", "int12", "int16", "e4m1", "e5m0", "e5m1", "e6m0", "e2m4", "e2m5", "e6m1", "e7m0", "e8m0", "e4m4")
WIDE = ("e5m10", "e2m13", "e4m11", "e7m8", "e8m3", "e5m6")
NAMES = (*(fmt.name for fmt in COMMON), *OTHERS, *WIDE)
F32_MAX = torch.finfo(torch.float32).max


@cache
def oracle(name: str) -> Oracle:
    return Oracle(name)


@cache
def float32_points(name: str) -> Tensor:
    """Ascending non-negative float32: values, midpoints, their float32 neighbours, and what lies beyond the range."""
    values = oracle(name).values
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    # Half a step beyond the largest value is where rounding without saturation would overflow.
    beyond = [values[-1] + (values[-1] - values[-2]) / 2, 2 * values[-1], 3 * values[-1], 2**20 * values[-1]]
    exact = [*values, *middles, *(min(value, Fraction(F32_MAX)) for value in beyond)]
    points = torch.tensor([float(value) for value in exact], dtype=torch.float64).float()
    assert [Fraction(point) for point in points.tolist()] == exact  # so that a midpoint is the midpoint
    infinity = torch.tensor(torch.inf)
    edges = torch.tensor([2.0**-149, 2.0**-126, F32_MAX])
    points = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity), edges])
    return points[(points >= 0) & points.isfinite()].unique()


def expect(name: str, magnitudes: list[Fraction]) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest values (float64), and codes of the positive and negative ones, by the oracle."""
    reference = oracle(name)
    floats = [float(value) for value in reference.values]
    indices = reference.nearest(magnitudes)
    positive = torch.tensor([reference.code(index, negative=False) for index in indices])
    negative = torch.tensor([reference.code(index, negative=True) for index in indices])
    return torch.tensor([floats[index] for index in indices], dtype=torch.float64), positive, negative


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal values and equal signs, also of zeros."""
    return torch.equal(actual.double(), expected.double()) and torch.equal(actual.signbit(), expected.signbit())


def is_integer(name: str) -> bool:
    return name.startswith("int")


@pytest.mark.parametrize("name", NAMES)
def test_values_neighbours_and_midpoints_in_float32(name: str) -> None:
    fmt, x = parse(name), float32_points(name)
    expected, positive, negative = expect(name, [Fraction(value) for value in x.tolist()])
    assert same(round_to_format(x, fmt), expected)
    assert same(round_to_format(-x, fmt), -expected + 0.0 if is_integer(name) else -expected)
    assert torch.equal(encode(x, fmt).long(), positive)
    assert torch.equal(encode(-x, fmt).long(), negative)


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [
        *((name, torch.bfloat16, "bf16") for name in NAMES),
        *((n, torch.float16, "e5m10") for n in ("int4", "int16", "e2m0", "e4m3", "e5m10", "bf16", "e8m3", "e2m13")),
    ],
)
def test_every_finite_16_bit_input(name: str, dtype: torch.dtype, layout: str) -> None:
    fmt, inputs, reference = parse(name), oracle(layout).values, oracle(name)
    x = torch.arange(len(inputs), dtype=torch.int16).view(dtype)
    assert same(x, torch.tensor([float(value) for value in inputs], dtype=torch.float64))  # torch and oracle agree
    expected, positive, negative = expect(name, inputs)
    assert torch.equal(encode(x, fmt).long(), positive)
    assert torch.equal(encode(-x, fmt).long(), negative)
    # A format with a wider range or more digits than the input saturates at the largest value that both hold.
    common = float(max(set(inputs) & set(reference.values)))
    expected = expected.clamp(max=common)
    actual = round_to_format(x, fmt)
    assert actual.dtype == dtype
    assert same(actual, expected)
    assert same(round_to_format(-x, fmt), -expected + 0.0 if is_integer(name) else -expected)


@pytest.mark.parametrize("name", NAMES)
def test_random_float32_bit_patterns(name: str) -> None:
    bits = torch.randint(0, 0x7F80_0000, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32).sort().values
    # Most bit patterns lie outside a narrow format; as many again within the range.
    within = torch.rand(4000, generator=torch.Generator().manual_seed(1)) * parse(name).max_value
    x = torch.cat([x, within]).sort().values
    expected, positive, _ = expect(name, [Fraction(value) for value in x.tolist()])
    assert same(round_to_format(x, parse(name)), expected)
    assert torch.equal(encode(x, parse(name)).long(), positive)


@pytest.mark.parametrize("name", NAMES)
def test_every_code(name: str) -> None:
    fmt = parse(name)
    expected = torch.tensor(oracle(name).all_codes(), dtype=torch.float64)
    actual = code_values(fmt)
    assert actual.dtype == torch.float32 and actual.shape == (2**fmt.bits,)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert same(actual[~actual.isnan()], expected[~expected.isnan()])
    codes = torch.arange(2**fmt.bits)
    finite = actual.isfinite()
    assert torch.equal(encode(actual[finite], fmt).long(), codes[finite])
    valid = codes if not is_integer(name) else codes[finite]
    assert torch.equal(decode(valid, fmt).nan_to_num(nan=0.5), actual[valid].nan_to_num(nan=0.5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_infinity_saturates_and_nan_propagates(name: str, dtype: torch.dtype) -> None:
    fmt, finest = parse(name), torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, finest, -finest], dtype=dtype)
    rounded = round_to_format(x, fmt)
    assert rounded[2].isnan()
    assert torch.equal(rounded[:2], rounded[3:])
    top = oracle(name).code(len(oracle(name).values) - 1, negative=False)
    assert encode(x[:2], fmt).tolist() == [top, oracle(name).code(top, negative=True)]
    has_nan = not is_integer(name) and any(math.isnan(value) for value in oracle(name).specials)
    assert (fmt.nan_code is not None) == has_nan
    if has_nan:
        assert encode(x[2:3], fmt).item() == fmt.nan_code
        assert decode(encode(x[2:3], fmt), fmt).isnan().all()
    else:
        with pytest.raises(FormatError, match=f"1 of 5 values are NaN, which {fmt.name} cannot hold"):
            encode(x, fmt)


ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
    "e5m10": np.float16,
}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_against_ml_dtypes(name: str) -> None:
    fmt, dtype = parse(name), np.dtype(ML_DTYPES[name])
    as_codes = np.uint8 if dtype.itemsize == 1 else np.uint16
    x = float32_points(name)
    x = x[x <= fmt.max_value]  # beyond it these dtypes go to infinity or NaN, ours saturate (tested above)
    x = torch.cat([x, -x])
    theirs = x.numpy().astype(dtype)
    assert same(round_to_format(x, fmt), torch.from_numpy(theirs.astype(np.float32)))
    assert np.array_equal(encode(x, fmt).numpy().astype(np.int64), theirs.view(as_codes).astype(np.int64))
    every = np.arange(2**fmt.bits).astype(as_codes).view(dtype).astype(np.float32)
    assert np.array_equal(code_values(fmt).numpy(), every, equal_nan=True)
    if fmt.nan_code is not None:
        assert fmt.nan_code == np.array([np.nan], dtype=np.float32).astype(dtype).view(as_codes)[0]


@pytest.mark.parametrize("name", ["int2", "int4"])
def test_integer_codes_against_ml_dtypes(name: str) -> None:
    fmt = parse(name)
    x = torch.arange(-int(fmt.max_value), int(fmt.max_value) + 1).float()
    theirs = x.numpy().astype({"int2": ml_dtypes.int2, "int4": ml_dtypes.int4}[name]).view(np.uint8)
    assert np.array_equal(encode(x, fmt).numpy(), theirs & (2**fmt.bits - 1))


# `ml_dtypes` has no FP5 and no FP7. Formats without mantissa bits are left out: gfloat breaks their ties by the code.
@pytest.mark.parametrize("name", ["e2m2", "e3m1", "e3m3", "e4m2", "e2m4"])
def test_against_gfloat(name: str) -> None:
    fmt = parse(name)
    theirs = gfloat.FormatInfo(
        name=name,
        k=fmt.bits,
        precision=fmt.mantissa_bits + 1,
        bias=2 ** (fmt.exponent_bits - 1) - 1,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )
    x = torch.cat([float32_points(name), -float32_points(name), torch.tensor([torch.inf, -torch.inf])])
    expected = [gfloat.round_float(theirs, value, sat=True) for value in x.tolist()]
    assert same(round_to_format(x, fmt), torch.tensor(expected))
    assert code_values(fmt).tolist() == [gfloat.decode_float(theirs, code).fval for code in range(2**fmt.bits)]


def test_float64_is_not_rounded_twice() -> None:
    just_above_the_tie = torch.tensor([0.5 + 2.0**-50, -0.5 - 2.0**-50, 0.5], dtype=torch.float64)
    assert round_to_format(just_above_the_tie, parse("int4")).tolist() == [1.0, -1.0, 0.0]
    assert encode(just_above_the_tie, parse("int4")).tolist() == [1, 15, 0]
    tiny = torch.tensor([5e-324, -5e-324], dtype=torch.float64)
    assert same(round_to_format(tiny, parse("bf16")), torch.tensor([0.0, -0.0]))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 4)])
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    fmt = parse("e2m1")
    x = torch.linspace(-8, 8, 24)[: torch.Size(shape).numel()].reshape(shape)
    flat = round_to_format(x.reshape(-1), fmt)
    assert torch.equal(round_to_format(x, fmt), flat.reshape(shape))
    strided = x.movedim(0, -1) if x.ndim else x
    assert torch.equal(round_to_format(strided, fmt), round_to_format(strided.contiguous(), fmt))
    assert decode(encode(x, fmt), fmt).shape == shape


def test_input_is_left_alone_and_no_graph_is_kept() -> None:
    x = torch.tensor([0.3, 7.0], requires_grad=True)
    before = x.detach().clone()
    assert not round_to_format(x, parse("int3")).requires_grad
    assert not encode(x, parse("int3")).is_floating_point()
    assert torch.equal(x.detach(), before)


def test_tables_survive_their_callers() -> None:
    code_values(parse("e3m2")).zero_()
    with torch.device("meta"):  # `from_pretrained` builds models under it
        assert code_values(parse("e3m3")).device.type == "cpu"
    assert code_values(parse("e3m2")).max() == 28  # OCP MX v1.0, table of E3M2
    assert code_values(parse("e3m3")).device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_rounding_takes_floats_only(dtype: torch.dtype) -> None:
    x = torch.ones(2).to(dtype)
    with pytest.raises(FormatError, match=f"cannot round {dtype} to int4"):
        round_to_format(x, parse("int4"))
    with pytest.raises(FormatError, match=f"cannot round {dtype} to int4"):
        encode(x, parse("int4"))


@pytest.mark.parametrize("name", [fmt.name for fmt in COMMON if fmt.is_integer])
def test_decode_refuses_the_most_negative_integer(name: str) -> None:
    fmt = parse(name)
    with pytest.raises(FormatError, match=f"symmetric {name} does not have"):
        decode(torch.tensor([0, 2 ** (fmt.bits - 1)]), fmt)
    unchecked = decode(torch.tensor([1, 2 ** (fmt.bits - 1)]), fmt, check=False)
    assert unchecked[0] == 1 and unchecked[1].isnan()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([0, 16]), "16 is not a code of e2m1: codes are 0 to 15"),
        (torch.tensor([0, -1]), "-1 is not a code of e2m1"),
        (torch.tensor([0.0]), "codes are torch.float32: decode takes"),
    ],
)
def test_decode_refuses_foreign_codes(codes: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode(codes, parse("e2m1"))
