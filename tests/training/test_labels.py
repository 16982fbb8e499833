"""Which class of the model a label is: the same rules wherever labels are read, refusals where nothing is known."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from fliqs_hf.errors import DataError
from fliqs_hf.training.labels import (
    LabelReader,
    checked_label,
    find_match,
    generic_names,
    match_given,
    match_trained,
)

ANIMALS = ["cat", "dog", "emu"]
TWELVE = generic_names(12)
#: as an image folder sorts them
SORTED = sorted(str(number) for number in range(12))
WORDNET = ["n01440764", "n01443537", "n01484850"]


def given(theirs: list[str], own: list[str], match: Any = "name") -> list[int]:
    """What validation and calibration make of a data set's classes."""
    reader = LabelReader(datasets.ClassLabel(names=theirs), own, len(own), match)
    return [reader(label, "image 0") for label in range(len(theirs))]


@pytest.mark.parametrize(
    ("theirs", "own", "ids"),
    [
        (SORTED, TWELVE, [int(name) for name in SORTED]),
        ([f"class_{name}" for name in SORTED], TWELVE, [int(name) for name in SORTED]),
        ([f"LABEL_{name}" for name in SORTED], TWELVE, [int(name) for name in SORTED]),
        ([f"{number:03}" for number in range(12)], TWELVE, list(range(12))),
        (["10", "3"], TWELVE, [10, 3]),  # a subset, with gaps
        (["7"], TWELVE, [7]),
        (sorted(f"no. {n}" for n in range(1, 13)), [f"Grade-{n}" for n in range(1, 13)], [0, 9, 10, 11, *range(1, 9)]),
        (SORTED, [f"animal {chr(97 + i)}" for i in range(12)], [int(name) for name in SORTED]),  # from 0 on: indices
        (["emu", " CAT"], ANIMALS, [2, 0]),
        (["A", "a", "B"], ["a", "A", "b"], [1, 0, 2]),
        (["fox", "crane", "crane"], ["crane", "fox", "crane"], [1, 0, 2]),
        (["oak", "elm", "ash"], generic_names(3), [0, 1, 2]),  # no names: in order
    ],
)  # fmt: skip
def test_matched(theirs: list[str], own: list[str], ids: list[int]) -> None:
    # `ClassLabel` refuses names that occur twice: the rules are asked themselves
    assert list(match_given(theirs, own, len(own), "name").ids) == ids
    if len(set(theirs)) == len(theirs):
        assert given(theirs, own) == ids


@pytest.mark.parametrize(
    ("theirs", "own", "message"),
    [
        ([str(number) for number in range(1, 13)], TWELVE, "'12' has the number of no class"),
        (["1", "01"], TWELVE, "number 1"),
        (["1", "2"], ANIMALS, "names 2 classes by number, but the models' 3 have names"),
        ([str(number) for number in range(1, 4)], ANIMALS, "'3' has the number of no class"),
        (WORDNET, ANIMALS, "'n01440764' has the number of no class"),  # numbers, but not of classes
        (WORDNET, generic_names(3), "'n01440764' has the number of no class"),
        (["cat", "dog", "emu", "fox"], ANIMALS, "'fox' is no class of the models"),
        (["oak", "elm"], generic_names(3), "2 classes, the models 3, and no names"),
        (["cat", "Cat"], ANIMALS, "'cat' is the name of 2 classes of the data set"),
        (["crane"], ["crane", "fox", "crane"], "'crane' is the name of 2 classes of the models"),
        (["a1", "b2"], TWELVE, "2 classes, the models 12"),  # two prefixes are words
        (["ash", "elm"], ["0", "1"], "'ash' is no class"),
    ],
)
def test_refused_unless_the_index_is_meant(theirs: list[str], own: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        given(theirs, own)
    assert "match_labels='index'" in str(caught.value)
    if len(theirs) <= len(own):
        assert given(theirs, own, "index") == list(range(len(theirs)))


def test_a_head_that_is_trained_on_takes_what_is_unknown_in_order() -> None:
    assert match_trained(["iris", "rose", "lily"], ANIMALS).ids == (0, 1, 2)
    assert match_trained(WORDNET, ANIMALS) == match_trained(WORDNET, generic_names(3))
    assert match_trained(WORDNET, ANIMALS).ids == (0, 1, 2)
    from_one = sorted(str(number) for number in range(1, 13))
    assert list(match_trained(from_one, TWELVE).ids) == [int(name) - 1 for name in from_one]  # of their numbers
    assert match_trained(SORTED, TWELVE) == find_match(SORTED, TWELVE)


def test_text_is_matched_by_the_same_rules() -> None:
    reader = LabelReader(None, TWELVE, 12)
    assert [reader(word, "image 0") for word in ("class_10", "class_2", "class_10")] == [10, 2, 10]
    assert reader.by == "number"
    with pytest.raises(DataError, match="image 4"):
        reader("grade_3", "image 4")  # another prefix: these are words
    known = LabelReader(datasets.Value("string"), None, 12, "index", words=SORTED)
    assert [known(word, "") for word in SORTED] == [int(word) for word in SORTED]  # text has no index


def test_what_nothing_is_known_of_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fliqs_hf"):
        reader = LabelReader(SimpleNamespace(names=["oak", "elm"]), None, 2)
    assert reader.by == "order" and "in their order: class 0 is 'oak'" in caplog.text


@pytest.mark.parametrize("label", [True, None, 1.0, "1", -1, -100, 3])
def test_what_is_no_class(label: Any) -> None:
    with pytest.raises(DataError, match="image 5 has the label"):
        checked_label(label, 3, "image 5")
