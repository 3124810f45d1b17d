"""strip_markup: HTML and XML become text, and what only looks like them stays byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.data.filters import build_filters

PAGE = """<!DOCTYPE html>
<html><head><title>Cats &amp; dogs</title><style>p { color: red }</style></head>
<body>
  <!-- navigation -->
  <h1>Two
      kinds</h1>
  <p>A <b>cat</b> is <a href="x?a=1&amp;b=2">not</a> a
     dog.<br>Nor is 1 &lt; 0.</p>
  <ul><li>one<li>two</ul>
  <pre>
  if a:
      b</pre>
  <script>if (a<b) { document.write("<p>no</p>") }</script>
  <table><tr><td>1</td><td>2</td></tr></table>
</body></html>"""


def strip(text: str) -> Any:
    ((_, take_out),) = build_filters(["strip_markup"])
    result = take_out({"text": text})
    return result["text"] if isinstance(result, dict) else result


def test_a_page_becomes_text() -> None:
    assert strip(PAGE) == (
        "Cats & dogs\n\nTwo kinds\n\nA cat is not a dog.\nNor is 1 < 0.\n\none\ntwo\n\n  if a:\n      b\n\n1 2"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>One</p><p>Two</p>", "One\n\nTwo"),
        ("x<br>y<br/>z", "x\ny\nz"),
        ("AT&amp;T &lt;b&gt; &copy; &#8212;", "AT&T <b> © —"),
        ("日本語<b>太字</b>です", "日本語太字です"),
        (
            "# Title\n\n- a < b\n- see <file>\n\n<img src='x.png'/>\n\n    code  here\n",
            "# Title\n\n- a < b\n- see <file>\n\n\n\n    code  here\n",
        ),
        ("<?xml version='1.0'?><doc><item>a</item> <item><![CDATA[b < c]]></item><end/></doc>", "a b < c"),
        ("text <span class='a'>cut off", "text cut off"),
        ("<!-- nothing -->", "no text is left"),
    ],
)
def test_markup_goes(text: str, expected: str) -> None:
    assert strip(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "if (a<b && c>d) x <<= 2;",
        "std::vector<int> x; List<String> y; Map<K, V> z = new HashMap<>();",
        "template <class T> T f(T x);",
        "#include <stdio.h>\nint main() { return 1<2; }",
        "usage: mount <source> <target> [<option>]",
        "see <https://example.org/x> and <jane@example.org>",
        "I <3 you & me; Q&A",
        "https://example.org/?a=1&b=2&copy=3",
        "x -> y <- z <-> w",
        "  two  spaces\n\n\n\tand tabs \n",
        "猫 < 犬 😀",
    ],
)
def test_text_without_markup_stays(text: str) -> None:
    ((_, take_out),) = build_filters(["strip_markup"])
    row = {"text": text}
    assert take_out(row) is row
    assert not take_out.counts


@pytest.mark.parametrize("text", [PAGE, "<p>One</p><p>Two</p>", "x<br>y", "a <i>b</i> c"])
def test_a_second_pass_changes_nothing(text: str) -> None:
    assert strip(strip(text)) == strip(text)


@pytest.mark.parametrize(
    "text", ["<div>" * 30000 + "x" + "</div>" * 30000, "<!--" * 50000 + "x", "<a " * 50000, "<![CDATA[" * 50000]
)
def test_endless_markup_ends(text: str) -> None:
    assert strip(text)


def test_what_it_changed_is_counted() -> None:
    ((_, take_out),) = build_filters(["strip_markup"])
    for text in (PAGE, "a<br>b", "a &amp; b", "a & b"):
        take_out({"text": text})
    assert take_out.counts == {"documents": 1, "texts with tags": 1, "texts with entities": 1}
