"""Turns HTML and XML into plain text, whole documents as well as tags within other text."""

from __future__ import annotations

import html
import re
from collections import Counter
from itertools import chain
from typing import Any

from llmkit.data.filters import clean_texts
from llmkit.data.specs import needed

_TAG = r"""<(?P<end>/?)(?P<name>[A-Za-z][\w:.-]*+)(?P<rest>(?:\s(?:[^<>"']++|"[^"<]*+"|'[^'<]*+')*+)?+/?+)>"""
_COMMENT = r"<!--(?:[^<-]++|-(?!->)|<(?!!--))*+-->"
_DATA = r"<!\[CDATA\[(?P<data>(?:[^\]<]++|\](?!\]>)|<(?!!\[CDATA\[))*+)\]\]>"
_PIECE = re.compile(rf"{_COMMENT}|{_DATA}|<[!?][A-Za-z][^<>]*>|{_TAG}")
_WHOLE = re.compile(
    rf"\s*+(?:<\?xml[^<>]*>\s*+)?+(?:{_COMMENT}\s*+)*+<(?:!doctype\s+html|html|head|body)\b[^<>]*>", re.I
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_NAMES = {
    "alone": "br hr wbr p li dt dd td th tr",  # have no end, or need none
    "empty": "area base br col embed hr img input link meta param source track wbr",
    "inline": "a abbr acronym b bdi bdo big body button center cite code del dfn em font form head html i iframe ins kbd "
    "label mark nobr noscript object q s samp script select small span strike strong style sub sup svg template "
    "textarea time tt u var td th",
    "paragraphs": "blockquote dl h1 h2 h3 h4 h5 h6 ol p pre table ul",
    "lines": "address article aside caption dd details dialog div dt fieldset figcaption figure footer header hr "
    "legend li main nav option section summary tbody tfoot thead title tr",
}
_KINDS = {kind: tuple(names.split()) for kind, names in _NAMES.items()}
_ALONE = frozenset(_KINDS["alone"])
_EMPTY = frozenset(_KINDS["empty"])
_KNOWN = frozenset(chain.from_iterable(_KINDS.values()))
_DROPPED = ["script", "style", "noscript", "template", "svg", "iframe", "object", "embed"]
_BREAK, _LINE, _PARAGRAPH, _KEPT = "\x1c", "\x1d", "\x1e", "\x1f"  # marks that stand for what was between texts
_MARKS = re.compile("[\x1c-\x1f]")
_DEEPEST = 2000  # elements in each other; beyond, only the tags are taken out, as parsing takes time by the square
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_BREAKS = re.compile("[ \t\r\n]*+[\x1c-\x1e][ \t\r\n\x1c-\x1e]*")


class StripMarkupFilter:
    """Leaves the text of HTML and XML: blocks stand on lines of their own, scripts, styles and comments go.

    A tag is what HTML calls so and is closed, or has attributes, or needs no end; and any name that is both opened and
    closed. All else that stands between `<` and `>` is text: `a < b`, `List<String>`, `<file>`. White space is
    collapsed, as browsers do it, where the text is a whole HTML document; else lines stay as they are. Text without tags
    and entities stays byte for byte. Raises RecipeError when selectolax is missing.
    """

    def __init__(self) -> None:
        try:
            from selectolax.lexbor import LexborHTMLParser
        except ImportError:
            raise needed("filter", "strip_markup", "selectolax") from None
        self._parse = LexborHTMLParser
        self.counts: Counter[str] = Counter()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, as plain text, or the reason when nothing was left of a text."""
        return clean_texts(row, self._clean)

    def _clean(self, text: str) -> str:
        if "<" in text:
            if _WHOLE.match(text):
                self.counts["documents"] += 1
                return self._text_of(text, whole=True)
            if pieces := _markup(text):
                self.counts["texts with tags"] += 1
                return self._text_of(_guarded(text, pieces), whole=False)
        if "&" not in text:
            return text
        plain = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        if plain != text:
            self.counts["texts with entities"] += 1
        return plain

    def _text_of(self, source: str, whole: bool) -> str:
        source = _MARKS.sub("", source)
        if source.count("<") > _DEEPEST and _depth(source) > _DEEPEST:
            return html.unescape(_PIECE.sub(" ", source)).strip()
        tree = self._parse(source)
        tree.strip_tags(_DROPPED)
        for node in tree.css("pre, textarea"):
            node.insert_before(_PARAGRAPH + _kept(node.text(deep=True)) + _PARAGRAPH)
            node.decompose()
        for kind, mark in (("paragraphs", _PARAGRAPH), ("lines", _LINE)):
            for node in tree.css(", ".join(_KINDS[kind])):
                node.insert_before(mark)
                node.insert_after(mark)
        for node in tree.css("td, th"):
            node.insert_after(" ")
        for node in tree.css("br"):
            node.insert_after(_BREAK)
        text = tree.root.text(deep=True) if tree.root is not None else ""
        if whole:
            text = _BREAKS.sub(_breaks, _BLANKS.sub(" ", text)).strip(" \n")
        else:
            text = _BREAKS.sub(_breaks, text.strip(_BREAK + _LINE + _PARAGRAPH))
        return _restored(text)


def _markup(text: str) -> list[re.Match[str]]:
    """The tags, comments and the like of a text."""
    found = list(_PIECE.finditer(text))
    names = Counter((piece["name"] or "", piece["end"]) for piece in found)
    paired = {name.lower() for name, end in names if end} & {name.lower() for name, end in names if not end}
    plain = {name for name, end in names if not _is_tag_name(name.lower(), paired)}
    return [piece for piece in found if piece["name"] not in plain or _is_complete(piece)]


def _is_tag_name(name: str, paired: set[str]) -> bool:
    return not name or name in paired or name in _ALONE


def _is_complete(piece: re.Match[str]) -> bool:
    """True for what is a tag by itself."""
    if piece["rest"].endswith("/"):
        return True
    return piece["name"].lower() in _KNOWN and bool(piece["end"] or "=" in piece["rest"])


def _guarded(text: str, pieces: list[re.Match[str]]) -> str:
    """The text with all `<` escaped that begin no tag, as the body of an HTML document."""
    parts = ["<!doctype html><body>"]
    reached = 0
    for piece in pieces:
        parts.append(text[reached : piece.start()].replace("<", "&lt;"))
        if piece["data"] is not None:
            parts.append(html.escape(piece["data"], quote=False))
        elif piece["name"] and not (piece["rest"].endswith("/") and piece["name"].lower() not in _EMPTY):
            parts.append(piece[0])
        reached = piece.end()
    return "".join([*parts, text[reached:].replace("<", "&lt;")])


def _depth(text: str) -> int:
    """How deep elements are nested at most, those that need no end left out."""
    deepest = depth = 0
    for piece in _PIECE.finditer(text):
        if piece["name"] and piece["name"].lower() not in _ALONE | _EMPTY:
            depth += -1 if piece["end"] else 1
            deepest = max(deepest, depth)
    return deepest


def _kept(text: str) -> str:
    """A text whose blanks are not collapsed."""
    return text.replace("\n", _KEPT + "n").replace(" ", _KEPT + "s").replace("\t", _KEPT + "t")


def _restored(text: str) -> str:
    return text.replace(_KEPT + "n", "\n").replace(_KEPT + "s", " ").replace(_KEPT + "t", "\t")


def _breaks(run: re.Match[str]) -> str:
    """Line breaks for a run of marks and blanks: as many as there are or as the marks ask for, two at most."""
    wanted = 2 if _PARAGRAPH in run[0] else max(run[0].count(_BREAK), run[0].count("\n"), 1)
    indentation = run[0].rpartition("\n")[2] if "\n" in run[0] else ""
    return "\n" * min(wanted, 2) + _MARKS.sub("", indentation)
