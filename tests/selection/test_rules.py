"""Rules as texts and as `SearchSpace` takes them."""

from __future__ import annotations

from typing import Any

import pytest

from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import parse
from fliqs_hf.selection.rules import parse_rules, rule_texts


def test_rules_come_back_from_their_texts() -> None:
    require = {"classifier": ["int8", parse("e4m3")], "*=odd": "int4"}
    assert rule_texts(require) == ["classifier=int8,e4m3", "*=odd=int4"]
    assert rule_texts({"*embed*": 6}) == ["*embed*=6"] and rule_texts({}) is None and rule_texts(None) is None
    found = parse_rules(rule_texts(require), ["*embed*=6.5"])
    assert found == {"require": {"classifier": ["int8", "e4m3"], "*=odd": ["int4"]}, "min_bits": {"*embed*": 6.5}}
    assert parse_rules(None, None) == {"require": {}, "min_bits": {}}


@pytest.mark.parametrize(("require", "min_bits", "words"), [
    (["classifier"], None, "require: 'classifier': give PATTERN=VALUE"),
    (["=int8"], None, "require: '=int8'"),
    (None, ["classifier="], "min_bits: 'classifier='"),
    (None, ["classifier=many"], "'many' is no number of bits"),
    (["a=int8", "a=int4"], None, "require has 'a' more than once"),
    (None, ["a=4", "a=5"], "min_bits has 'a' more than once"),
])  # fmt: skip
def test_texts_that_are_no_rules(require: Any, min_bits: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_rules(require, min_bits)
