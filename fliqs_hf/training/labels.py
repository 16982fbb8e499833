"""Which class of a model a label of a data set is. One set of rules for search, calibration, comparison, validation.

1. The same names, in any order; a subset will do. Case and outer blanks count only where they tell classes apart, and
   a name that occurs more than once, such as ImageNet's "crane", is matched in its order.
2. Names that are one prefix with numbers ("0", "class_07", "LABEL_3") have the class with the same number in the
   model's names: sorting such names as text, as image folders do, puts 10 before 2.
3. Where the model's names are words, such numbers are its classes if they are just those from 0 on.
4. Anything else says nothing. A given model refuses it, but words for a model without names (`LABEL_0`, …) and with as
   many classes, which are taken in their order; so does a head that is trained on, with a warning.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from fliqs_hf.errors import DataError

logger = logging.getLogger(__name__)

MatchLabels = Literal["name", "index"]

#: More classes than any model here has. Whole numbers beyond are ids of something else.
MOST_CLASSES = 100_000

INDEX_HINT = "pass match_labels='index' (--match_labels index) if its numbers mean the same classes"


@dataclass(frozen=True)
class Match:
    """The model's class `ids[i]` of the data set's class i, and what it was found by."""

    ids: tuple[int, ...]
    by: Literal["name", "number", "order", "index"]


def find_match(theirs: Sequence[str], own: Sequence[str]) -> Match | None:
    """By the first three rules; None where they say nothing.

    Args:
        theirs: names of the data set's classes. own: of the model's.
    """
    if (ids := _by_name(theirs, own)) is not None:
        return Match(tuple(ids), "name")
    numbers, places = _numbers(theirs), _places(own)
    if numbers is None or len(set(numbers)) < len(numbers):
        return None
    if places is None and set(numbers) == set(range(len(own))):
        return Match(tuple(numbers), "number")
    if places is not None and places.keys() >= set(numbers):
        return Match(tuple(places[number] for number in numbers), "number")
    return None


def match_given(theirs: Sequence[str], own: Sequence[str] | None, classes: int | None, match: MatchLabels) -> Match:
    """For a model that stays what it is.

    Args:
        own: names of the model's classes, or None. classes: how many, None if unknown.
    Raises: DataError: the data set's names are not the model's; it says why.
    """
    order = Match(tuple(range(len(theirs))), "order")
    if match == "index":
        return Match(order.ids, "index")
    own = None if own is None or list(own) == generic_names(len(own)) else own
    names = [str(name) for name in own] if own else generic_names(_count(theirs) if classes is None else classes)
    if (found := find_match(theirs, names)) is not None:
        return found
    if not own and _numbers(theirs) is None:
        if classes is not None and len(theirs) != classes:
            raise DataError(
                f"the data set has {len(theirs)} classes, the models {classes}, and no names to match them by; "
                + INDEX_HINT
            )
        logger.warning(
            "the model's classes have no names and are matched with the data set's in their order: class 0 is %r",
            theirs[0] if theirs else "",
        )
        return order
    raise DataError(f"{_difference(theirs, names)}; use a data set with the models' names, or {INDEX_HINT}")


def match_trained(theirs: Sequence[str], own: Sequence[str]) -> Match:
    """For a head with as many classes that is trained on: what nothing is known of is taken in its order, that of the
    numbers where names are numbered."""
    if (found := find_match(theirs, own)) is not None:
        return found
    keys: Sequence[Any] = _numbers(theirs) or range(len(theirs))
    rank = {index: place for place, index in enumerate(sorted(range(len(theirs)), key=lambda i: keys[i]))}
    return Match(tuple(rank[index] for index in range(len(theirs))), "order")


def generic_names(count: int) -> list[str]:
    """What Transformers calls classes that have no names."""
    return [f"LABEL_{index}" for index in range(count)]


def names_of(config: Any) -> list[str]:
    """Of the classes of a model, by number."""
    table = config.id2label or {}
    return [str(table.get(i, table.get(str(i), f"LABEL_{i}"))) for i in range(len(table))]


def are_numbered(names: Sequence[str]) -> bool:
    """Whether the names are one prefix with numbers: "0", "n01440764", "LABEL_0"."""
    return _numbers(names) is not None


def checked_label(label: Any, classes: int | None, name: object, owner: str = "the model's") -> int:
    """`label` as a whole number. Raises: DataError: it is not one of `owner` classes, 0 … `classes` − 1."""
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise DataError(f"{name} has the label {label!r}, which is not a class number; choose another label column")
    number = int(label)
    if number < 0 or (classes is not None and number >= classes):
        hint = "; negative labels mark images without one: choose another split" if number < 0 else ""
        count = "" if classes is None else f"{classes} "
        raise DataError(f"{name} has the label {number}, which is not one of {owner} {count}classes{hint}")
    return number


class LabelReader:
    """(label as the data set has it, name of its image) -> label as the models have it.

    `by` says what classes were matched by; "index" where the data set has plain numbers, which are taken as they are.
    """

    def __init__(
        self,
        feature: Any,
        names: Sequence[str] | None,
        classes: int | None,
        match: MatchLabels = "name",
        words: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            feature: what the data set says about its label column, or None.
            names: of the models' classes, or None. classes: how many, or None where unknown.
            words: the values of a column of text, where they are known beforehand.
        Raises: DataError: here, or on reading: a label that is no class of the models.
        """
        self.names = None if names is None or list(names) == generic_names(len(names)) else list(names)
        self.classes = classes
        own = words if words is not None else getattr(feature, "names", None)
        own = None if own is None else [str(name) for name in own]
        match = match if words is None else "name"  # text has no numbers that could be taken as they are
        self._ids = None if own is None else match_given(own, self.names, classes, match)
        self._words = {} if words is None or self._ids is None else dict(zip(words, self._ids.ids, strict=True))
        self.by: str = "index" if self._ids is None else self._ids.by

    def __call__(self, value: Any, name: object) -> int:
        if isinstance(value, str):
            return self._word(value, name)
        if self._ids is None:
            return checked_label(value, self.classes, name, "the models'")
        label = self._ids.ids[checked_label(value, len(self._ids.ids), name, "the data set's own")]
        return checked_label(label, self.classes, name, "the models'")

    def _word(self, value: str, name: object) -> int:
        """Text, of which nothing is known but what has been read: by the rules that hold whatever else comes."""
        if value not in self._words:
            known = [*self._words, value]
            own = self.names or (None if self.classes is None else generic_names(self.classes))
            if own is None or (self.names is None and not are_numbered(known)):
                raise DataError(f"{name} has the label {value!r}, but the models' config has no id2label names")
            found = find_match(known, own)
            if found is None or list(found.ids[:-1]) != list(self._words.values()):
                raise DataError(f"{name}: {_difference(known, own)}; use a data set with the models' names")
            self._words[value], self.by = found.ids[-1], found.by
        return self._words[value]


def _fold(name: str) -> str:
    return name.strip().casefold()


def _by_name(theirs: Sequence[str], own: Sequence[str]) -> list[int] | None:
    ours, ids = _grouped(own), [-1] * len(theirs)
    for key, rows in _grouped(theirs).items():
        places = ours.get(key, [])
        exact = {own[place]: place for place in places}
        asked = {theirs[row] for row in rows}
        if len(exact) == len(places) and len(asked) == len(rows) and asked <= exact.keys():
            found = [exact[theirs[row]] for row in rows]
        elif len(rows) == len(places) and len(exact) == len(asked) == 1:
            found = places  # the same name as often: in its order
        else:
            return None
        for row, place in zip(rows, found, strict=True):
            ids[row] = place
    return ids


def _grouped(names: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        groups[_fold(name)].append(index)
    return groups


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers that the names end in, where all have one prefix."""
    parts = [re.fullmatch(r"(.*?)([0-9]{1,18})", _fold(name), re.DOTALL) for name in names]
    if not parts or len({part and part[1] for part in parts}) != 1 or parts[0] is None:
        return None
    return [int(part[2]) for part in parts if part is not None]


def _places(own: Sequence[str]) -> dict[int, int] | None:
    """Number -> class, where the model's names are numbered and each number occurs once."""
    numbers = _numbers(own)
    places = {number: index for index, number in enumerate(numbers or ())}
    return places if numbers is not None and len(places) == len(own) else None


def _count(theirs: Sequence[str]) -> int:
    """How many classes a model has, of which only this is known, that its data set has classes `theirs`."""
    numbers = _numbers(theirs)
    return len(theirs) if numbers is None or max(numbers) >= MOST_CLASSES else max(numbers) + 1


def _difference(theirs: Sequence[str], own: Sequence[str]) -> str:
    """Why `theirs` cannot be matched with `own`."""
    ours, groups = dict(_grouped(own)), _grouped(theirs)
    such = f"(such as {', '.join(map(repr, own[:3]))})"
    for name in theirs:
        rows, places = groups[_fold(name)], ours.get(_fold(name), [])
        if places and len(places) != len(rows):
            who, count = ("the data set", len(rows)) if len(rows) > 1 else ("the models", len(places))
            return f"label {name!r} is the name of {count} classes of {who}, apart from case and blanks"
    numbers = _numbers(theirs)
    if numbers is not None:
        known = _places(own)
        known = known if known is not None else dict.fromkeys(range(len(own)), 0)
        twice = next((n for i, n in enumerate(numbers) if n in numbers[:i]), None)
        if twice is not None:
            return f"two labels of the data set are number {twice}"
        odd = next((name for name, n in zip(theirs, numbers, strict=True) if n not in known), None)
        if odd is not None:
            return f"label {odd!r} has the number of no class of the models {such}"
        return f"the data set names {len(numbers)} classes by number, but the models' {len(own)} have names {such}"
    missing = next((name for name in theirs if not ours.get(_fold(name))), theirs[0])
    return f"label {missing!r} is no class of the models {such}"
