"""Names in Markdown: whatever they hold, a renderer shows them as they are and makes no markup of them."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from markdown_it import MarkdownIt

from fliqs_hf.hf import templating
from fliqs_hf.hf.templating import code, escape, fence, literal, url

NASTY = [
    "dog|cat", "a\\|b", "trailing\\", "`tick`", "``two``", "`", "<script>alert(1)</script>", "<b>", "<!-- x", "-->",
    "[x](javascript:alert(1))", "![x](http://evil/x.png)", "[x]: http://evil", "<http://evil.example>",
    "https://evil.example/x", "www.evil.example", "mail@evil.example", "# heading", "---", "===", "- item", "+ item",
    "* item", "1. item", "2) item", "> quote", "*em* **strong** _em_ __strong__", "~~struck~~", "a_b_c", "_a_",
    "&lt;b&gt; &amp; &#35;", "{{ 7 * 7 }} {% raw %}", "$$x$$", ":smile:", "```", "~~~", "| a | b |\n|---|---|", "a\nb",
    "a\r\n\r\n# b", "x\u2028y", "\u202edrow", "</details>", "</code></pre>", "{#x#}", "    code", "\ttab", "%20",
    "'\"", "layer.0.mlp.fc1", "W int4 / A e2m1", "\t# h", " 1. x", "x #", "", " ",
]  # fmt: skip


class Text(HTMLParser):
    """Text and tags of a rendered page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def render(markdown: str) -> Text:
    """As GitHub and the Hub do: raw HTML, tables, struck text."""
    return Text(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))


def one_line(text: str) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


#: Where a template has a name: around it, and the tags of what is around it.
CONTEXTS = {
    "paragraph": ("before {} after", ["p"]),
    "alone": ("{}", ["p"]),
    "item": ("- {}", ["ul", "li"]),
    "heading": ("# {}", ["h1"]),
    "strong": ("**before {} after**", ["p", "strong"]),
    "cell": ("| h | i |\n|---|---|\n| {} | z |", ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]),
}


@pytest.mark.parametrize("spelling", [escape, code], ids=["text", "code"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_name_is_shown_as_it_is(context: str, spelling: object) -> None:
    around, tags = CONTEXTS[context]
    for name in NASTY:
        found = render(around.format(spelling(name)))  # type: ignore[operator]
        expected = render(around.format("X" if name.strip() else ""))
        assert one_line(found.text) == one_line(expected.text.replace("X", one_line(name))), name
        assert [tag for tag in found.tags if tag != "code"] == (tags if name.strip() else expected.tags), name


def test_no_renderer_makes_links_of_bare_addresses() -> None:
    """GitHub's rules for bare addresses: a scheme, `www.` or an @ within a word. None is left in one piece."""
    for name in NASTY:
        assert not re.search(r"(?<!\\)://|www\.\w|\w@\w", escape(name)), name


@pytest.mark.parametrize("name", NASTY)
def test_a_fence_holds_anything(name: str) -> None:
    found = render(f"before\n\n{fence(name, 'json')}\n\nafter")
    assert [tag for tag in found.tags if tag != "code"] == ["p", "pre", "p"]
    lines = "\n".join(name.splitlines())
    assert found.text.split("before\n")[1].rsplit("\nafter")[0].strip("\n") == lines.strip("\n")


def test_strings_and_addresses() -> None:
    assert literal('a"\n') == '"a\\"\\n"'
    assert url("a b) [x](y)#?.png") == "a%20b%29%20%5Bx%5D%28y%29%23%3F.png"


def test_a_template_cannot_forget_to_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ a }} {{ b }} {{ c }} {{ 'x|y' }} {{ a | code }} {{ n }}"
    monkeypatch.setattr(jinja2, "PackageLoader", lambda package: jinja2.DictLoader({"t.md.j2": template}))
    values = {"a": "<b>", "b": ["<i>"], "c": {"<u>": 1}, "n": 3}
    found = templating.markdown("any", "t.md.j2", values)
    assert found == r"\<b\> \['\<i\>'\] {'\<u\>': 1} x\|y `<b>` 3"
    with pytest.raises(jinja2.UndefinedError):
        templating.markdown("any", "t.md.j2", {})


def test_every_template_is_filled_by_this_module() -> None:
    """There is one environment for Markdown and one for HTML, and none of the templates switches escaping off."""
    package = Path(templating.__file__).parents[1]
    users = [path.name for path in package.rglob("*.py") if "jinja2.Environment(" in path.read_text()]
    assert users == ["templating.py"]
    for path in package.rglob("*.j2"):
        assert not re.search(r"\|\s*safe\b|autoescape", path.read_text()), path


def test_names_put_together_at_random_are_shown_as_they_are() -> None:
    """12,000 of them were tried once; these keep watch."""
    parts = [*"\\`*_[]<>|~&$@#+-=:!(). a1\n\t", "http://", "](", "<b>", "<!--", "&lt;", "```", "**", "1. ", "---"]
    choose = random.Random(0)
    for _ in range(120):
        name = "".join(choose.choices(parts, k=choose.randint(1, 9)))
        if not one_line(name):
            continue
        for around, tags in CONTEXTS.values():
            found, expected = render(around.format(code(name))), render(around.format("X"))
            assert one_line(found.text) == one_line(expected.text.replace("X", one_line(name))), name
            assert [tag for tag in found.tags if tag != "code"] == tags, name
