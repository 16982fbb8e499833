"""Which formats exist, what they are called, and their constants."""

from __future__ import annotations

import pickle
import re

import ml_dtypes
import pytest
import torch

from fliqs_hf.errors import FormatError
from fliqs_hf.formats import COMMON, FloatFormat, Format, IntFormat, parse
from fliqs_hf.formats.spec import ALIASES
from tests.helpers.reference import Oracle


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("int4", "INT4", " int4 ", "int-4", "int_4", "Int4"), IntFormat(4)),
        (("int8", "torch.int8", str(torch.int8)), IntFormat(8)),
        (("e2m0", "E2M0", "fp3", "fp3_e2m0"), FloatFormat(2, 0)),
        (("e2m1", "E2M1", "fp4", "FP4", "fp4_e2m1", "float4_e2m1fn", "fp4-e2m1"), FloatFormat(2, 1)),
        (("fp5", "e2m2"), FloatFormat(2, 2)),
        (("fp6", "e3m2", "float6_e3m2fn"), FloatFormat(3, 2)),
        (("e2m3", "fp6_e2m3", "FP6-E2M3"), FloatFormat(2, 3)),
        (("fp7", "e3m3"), FloatFormat(3, 3)),
        (("fp7_e4m2", "e4m2"), FloatFormat(4, 2)),
        (("fp8", "e4m3", "fp8_e4m3", "FP8-E4M3", "fp8e4m3", "fp8_e4m3fn", "float8_e4m3fn"), FloatFormat(4, 3)),
        ((str(torch.float8_e4m3fn), "torch.float8_e4m3fn", "float8_e4m3", "E4M3FN"), FloatFormat(4, 3)),
        (("e5m2", "fp8_e5m2", str(torch.float8_e5m2)), FloatFormat(5, 2)),
        (("e3m4", "fp8_e3m4", "float8_e3m4"), FloatFormat(3, 4)),
        (("bf16", "BF16", "bfloat16", str(torch.bfloat16), "e8m7", "fp16_e8m7"), FloatFormat(8, 7)),
        (("fp16", "float16", "half", str(torch.float16), "e5m10"), FloatFormat(5, 10)),
        (("e4m11", "E4M11"), FloatFormat(4, 11)),
    ],
)
def test_names_people_use(names: tuple[str, ...], expected: Format) -> None:
    assert [parse(name) for name in names] == [expected] * len(names)


@pytest.mark.parametrize("fmt", [*COMMON, *ALIASES.values()], ids=str)
def test_a_format_is_found_by_its_own_name(fmt: Format) -> None:
    assert parse(fmt.name) == fmt
    assert parse(fmt) is fmt
    assert str(fmt) == fmt.name
    assert pickle.loads(pickle.dumps(fmt)) == fmt


@pytest.mark.parametrize(
    "name",
    ["fp9", "fp32", "uint4", "nf4", "", "e4m3fnuz", "int", "int4.5", "m3e4", "4", "em", "int-", "e2m1x", "mxfp5"],
)
def test_unknown_names_list_what_exists(name: str) -> None:
    with pytest.raises(FormatError, match=re.escape(f"unknown format {name!r}")) as caught:
        parse(name)
    assert all(fmt.name in str(caught.value) for fmt in COMMON)
    assert all(alias in str(caught.value) for alias in ALIASES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int1", "int1: an integer format has 2 to 16 bits"),
        ("int32", "int32: an integer format has 2 to 16 bits"),
        ("e1m2", "e1m2: a float format has 2 to 8 exponent bits"),
        ("e9m2", "e9m2: a float format has 2 to 8 exponent bits"),
        ("e8m8", "at most 16 bits including the sign"),
        ("fp8_e2m1", "'fp8_e2m1' says 8 bits, but E2M1 has 4"),
        ("float8_e5m2fn", "e5m2 has infinities"),
    ],
)
def test_impossible_formats_say_why(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(name)


@pytest.mark.parametrize("value", [None, 4, 4.0, torch.bfloat16, ["int4"]])
def test_a_format_is_named_by_a_string(value: object) -> None:
    with pytest.raises(FormatError, match="given by its name"):
        parse(value)  # type: ignore[arg-type]


EVERY = [
    *COMMON,
    *(FloatFormat(e, m) for e in range(2, 9) for m in range(11 - e)),
    FloatFormat(5, 10),
    IntFormat(16),
]


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_constants_follow_from_the_layout(fmt: Format) -> None:
    reference = Oracle(fmt.name)
    assert fmt.bits == reference.bits
    assert fmt.max_value == reference.values[-1]
    assert fmt.smallest == reference.values[1]
    assert fmt.is_integer == reference.is_integer
    if isinstance(fmt, FloatFormat):
        assert fmt.max_code == len(reference.values) - 1
        assert 2.0**fmt.min_exponent == reference.values[2**fmt.mantissa_bits]
        # A scale is needed wherever the format's range is not that of float32 (8 exponent bits).
        assert fmt.is_scaled == (fmt.max_value < 2.0**127)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e4m3", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("bf16", ml_dtypes.bfloat16),
    ],
)
def test_constants_against_ml_dtypes(name: str, dtype: type) -> None:
    info, fmt = ml_dtypes.finfo(dtype), parse(name)
    assert fmt.max_value == float(info.max)
    assert fmt.smallest == float(info.smallest_subnormal)
    assert 2.0**fmt.min_exponent == float(info.smallest_normal)
