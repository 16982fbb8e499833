"""The templates of card and pages: one way to fill them, in which no name from a record can become markup.

In a Markdown template *every* `{{ … }}` is escaped unless it went through `code`, `fence`, `url` or `literal`; in an
HTML template Jinja does the same. So a template cannot forget it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jinja2

from fliqs_hf import wording
from fliqs_hf.cost.target import described

_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SPECIAL = re.compile(
    r"[\\`*\[\]<>|~&$@#]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word an underscore is one
    r"|(?<=www)\.|:(?=//|[\w+-]+:)"  # autolinks, :names: of pictures
    r"|(?:^|(?<=^ ))[+\-=:]",  # the beginning of a block
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"^( ?\d{1,9})([.)])(?=\s|$)")
_FENCE = re.compile(r"`{3,}")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escape(text: object) -> Markdown:
    """As one line of Markdown that shows `text` as it is, also in a cell of a table; blanks become single spaces."""
    if isinstance(text, Markdown):
        return text
    line = _SPECIAL.sub(lambda found: "\\" + found[0], _BLANK.sub(" ", str(text)))
    return Markdown(_NUMBERED.sub(r"\1\\\2", line))


def code(text: object) -> Markdown:
    """A code span; escaped text where one would not show it as it is."""
    plain = str(text)
    if not plain.strip() or re.search(r"[`|]", plain) or _BLANK.sub(" ", plain) != plain or plain != plain.strip():
        return escape(plain)
    return Markdown(f"`{plain}`")


def fence(text: object, language: str = "") -> Markdown:
    """A fenced block, with a fence that `text` does not hold."""
    lines = "\n".join(str(text).splitlines())
    marks = "`" * max([3, *(len(found) + 1 for found in _FENCE.findall(lines))])
    return Markdown(f"{marks}{language}\n{lines}\n{marks}")


def url(path: object) -> Markdown:
    """A relative address in a link or picture."""
    return Markdown(quote(str(path)))


def literal(text: object) -> Markdown:
    """A string of Python or JSON, in its quotes."""
    return Markdown(json.dumps(str(text)))


def environment(package: str) -> jinja2.Environment:
    """For the HTML templates of a package and those here; Markdown ones are filled by `markdown`."""
    return _environment(package, autoescape=True)


def markdown(package: str, template: str, values: Mapping[str, Any]) -> str:
    """Fill a Markdown template. Raises: jinja2.UndefinedError: a value that it needs is not there."""
    filled = _environment(package, autoescape=False, finalize=_shown)
    filled.filters.update(code=code, fence=fence, url=url, literal=literal)
    return filled.get_template(template).render(values)


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float) else escape(value)


def _environment(package: str, **settings: Any) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in (package, "fliqs_hf.hf")]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )
    made.filters.update(wording.FILTERS, target=described)
    made.filters["data_uri"] = lambda jpeg: "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return made
