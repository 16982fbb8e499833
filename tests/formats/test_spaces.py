"""Named search spaces."""

from __future__ import annotations

import pytest

from fliqs_hf.errors import FormatError
from fliqs_hf.formats import parse
from fliqs_hf.formats.spaces import SPACES, parse_formats


@pytest.mark.parametrize(
    ("name", "bits", "integer"),
    [
        ("fliqs-s-int", {4, 8, 16}, True),
        ("fliqs-s-fp", {4, 8, 16}, False),
        ("fliqs-l-int", {4, 5, 6, 7, 8, 16}, True),
        ("fliqs-l-fp", {4, 5, 6, 7, 8, 16}, False),
    ],
)
def test_the_spaces_of_the_paper_have_its_bits_and_one_family(name: str, bits: set[int], integer: bool) -> None:
    formats = parse_formats(name)
    assert {fmt.bits for fmt in formats} == bits
    assert {fmt.is_integer for fmt in formats if fmt.bits < 16} == {integer}


def test_mixed_has_both_families_and_lists_and_strings_are_spaces() -> None:
    assert {fmt.is_integer for fmt in parse_formats("mixed")} == {True, False}
    assert [fmt.bits for fmt in parse_formats("mixed") if fmt.is_integer] == list(range(2, 9))
    assert parse_formats("MIXED") == tuple(map(parse, SPACES["mixed"]))
    assert parse_formats("int4, fp8_e4m3") == parse_formats(["int4", "e4m3"]) == (parse("int4"), parse("e4m3"))
    assert parse_formats("fp4") == (parse("e2m1"),)


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ("fliqs-xl", "fliqs-xl.*named spaces: fliqs-s-int"),
        ([], "at least one"),
        (["fp4", "e2m1"], "e2m1 more than once"),
        ("int4,x9", "x9"),
    ],
)
def test_bad_spaces_are_named(space: str | list[str], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        parse_formats(space)
