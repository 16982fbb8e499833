"""What leaves this machine holds no paths of it: each is reduced to its last part."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import escape

from fliqs_hf.errors import CheckpointError
from fliqs_hf.json_file import parse_json

#: Classes may have names like paths ("/m/01g317" in Open Images), and a model answers with them; the formats of a
#: checkpoint are bound to its weights.
_KEPT = ("class_names", "id2label", "label2id", "quantization_config")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: How a path begins that is one wherever it stands: /…, ~/…, ./…, ../…, $HOME/…, %TEMP%\…, C:\…, \\server\…. A single
#: backslash is none: regular expressions have them.
_ROOT = (
    r"(?:(?:file:)?(?:~[\w.-]*|\.{1,2}|\$\w+|\$\{\w+\})?/+"
    r"|(?:~[\w.-]*|\.\.|%\w+%|(?<!\w)[A-Za-z]:)[/\\]+|\\\\(?=\w))"
)
_IN_TEXT = re.compile(
    r"(?P<address>\b(?!file:)[A-Za-z][\w+.-]+://[^\s'\"]*)"
    rf"|(?P<quote>['\"`])(?P<quoted>{_ROOT}[^'\"`\n]+)(?P=quote)"
    rf"|(?<![\w.~/\\$%}}*)\]-])(?P<path>{_ROOT}[^\s'\"`<>|:;,*?=()\[\]{{}}]+)"
)
_WHOLE = re.compile(rf"{_ROOT}[^\n]*")
#: More slashes than an id on the Hub has.
_LONG = re.compile(r"[\w.@+-]+(?:/[\w.@+ -]+){2,}/?")


def is_hub_id(name: str) -> bool:
    """Whether `name` is `namespace/name` and no folder of this machine. Names without a namespace are not trusted:
    they are as likely a local name as an old id."""
    return bool(_HUB_ID.fullmatch(name)) and not _exists(name)


def last_part(name: str) -> str:
    """Of a path in the spelling of any system; an id on the Hub or an address on the web as it is."""
    if is_hub_id(name) or re.match(r"(?!file:)[A-Za-z][\w+.-]+://", name):
        return name
    parts = [part for part in re.split(r"[/\\]+", name) if part]
    return parts[-1] if parts else name


def without_paths(text: str) -> str:
    """A value of a record, or a sentence: every path in it reduced to its last part."""
    whole = _WHOLE.fullmatch(text) and (": " not in text or _exists(text))
    if whole or _LONG.fullmatch(text) or (re.search(r"[/\\]", text) and _exists(text)):
        return last_part(text)
    return _IN_TEXT.sub(_last, text)


def _last(found: re.Match[str]) -> str:
    if found["address"] is not None:
        return found[0]
    if found["quoted"] is not None:
        return f"{found['quote']}{last_part(found['quoted'])}{found['quote']}"
    return last_part(found["path"])


def without_private(value: Any, key: str = "") -> Any:
    """A record as it may be published: the values and keys of a JSON document, names of classes excepted."""
    if key in _KEPT:
        return value
    if isinstance(value, str):
        return command_line(value) if key == "command" else without_paths(value)
    if isinstance(value, list) and key == "command":
        return [_word(str(word)) for word in value]
    if isinstance(value, Mapping):
        return {without_paths(str(name)): without_private(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_private(entry) for entry in value]
    return value


def command_line(command: str | list[str]) -> str:
    """As one would type it, without the folders of this machine."""
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except ValueError:  # no shell would take it either
        return without_paths(str(command))
    return shlex.join(map(_word, words))


def _word(word: str) -> str:
    """Of a command line."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{without_paths(value)}"


def published_json(text: str) -> str:
    """A JSON record, or one JSON document per line, as it may be published; unchanged where nothing is private.

    Raises: CheckpointError: no JSON, or nested too deeply.
    """
    try:
        return _published(text, 2)
    except CheckpointError:
        return "".join(_published(line, None) + "\n" for line in text.splitlines() if line)


def _published(text: str, indent: int | None) -> str:
    data = parse_json(text, "it")
    shown = without_private(data)
    return text if shown == data else json.dumps(shown, indent=indent, ensure_ascii=False)


def published_page(text: str, records: Iterable[Any], folder: Path) -> str:
    """An HTML page: without what `records` hold that is private, and without paths under the places of this user."""
    known = {value: shown for record in records for value, shown in _reduced(record) if shown != value}
    for value in sorted(known, key=len, reverse=True):
        for spelling in {str(escape(value)), str(escape(json.dumps(value)[1:-1]))}:
            # Not in the middle of a word, and no closing tag. A pattern would read what it puts there as one.
            found = re.split(rf"(?<![<\w/]){re.escape(spelling)}(?!\w)", text)
            text = str(escape(known[value])).join(found)
    places = {str(place) for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.resolve().parent)}
    for place in sorted(places - {Path("/").anchor}, key=len, reverse=True):
        text = re.sub(rf"(?<![<\w/]){re.escape(place)}[/\\][^\s'\"<>&]*", lambda found: last_part(found[0]), text)
    return text


def _reduced(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a record, and as it may be published."""
    if isinstance(value, str):
        yield value, without_private(value, key)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _reduced(entry, str(name))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _reduced(entry)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
