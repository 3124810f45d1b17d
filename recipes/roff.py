"""Manual pages as plain text: an example of a filter of one's own, which recipes/clean-corpus.yaml names."""

from __future__ import annotations

import re

_ESCAPES = {
    "-": "-", "&": "", "e": "\\", "|": "", "^": "", "0": " ", "~": " ", "%": "", ":": "", "/": "", ",": "", "c": "",
    "(cq": "'", "(aq": "'", "(oq": "'", "(lq": '"', "(rq": '"', "(dq": '"', "(bu": "*", "(co": "(c)", "(em": "-",
    "(en": "-", "(ti": "~", "(ha": "^", "(rs": "\\", "(la": "<", "(ra": ">", "(mu": "x", "(->": "->",
}  # fmt: skip
_ESCAPE = re.compile(r"\\(?:f(?:\(..|\[[^]]*\]|.)|s[-+]?\d+|m\[[^]]*\]|\*(?:\(..|\[[^]]*\]|.)|\[[^]]*\]|(\(..|.))")
_HEADING = (".SH", ".SS", ".Sh", ".Ss")
_INLINE = (".B", ".I", ".BR", ".RB", ".BI", ".IB", ".IR", ".RI", ".SM", ".SB")  # which set fonts within a sentence
_TERM = (".TP", ".IP", ".It")
_BREAK = (".PP", ".P", ".LP", ".sp", ".Pp", ".RS", ".RE", ".br")
_REQUEST = re.compile(r"[.']\s*(\w*)\s*(.*)")


def without_roff(row: dict) -> dict | str:
    """The row with the text of a manual page; other rows as they are."""
    text = row["text"]
    if "\n.SH" not in text and "\n.Sh" not in text:
        return row
    paragraphs: list[list[str]] = [[]]
    inside_definition = False
    for line in text.splitlines():
        request = _REQUEST.match(line)
        if inside_definition:  # of a macro, up to a line with two dots
            inside_definition = not line.startswith("..")
        elif line.startswith((".de ", ".ig")):
            inside_definition = True
        elif request is None:
            paragraphs[-1].append(_plain(line))
        elif line.split(" ")[0] in _HEADING:
            paragraphs += [[_plain(request[2]).strip('"')], []]
        elif line.split(" ")[0] in _INLINE:
            paragraphs[-1].append(_plain(request[2]).replace('"', ""))
        elif line.split(" ")[0] in (*_TERM, *_BREAK):
            paragraphs.append([])
    kept = [" ".join(filter(None, lines)) for lines in paragraphs]
    plain = "\n\n".join(filter(None, map(str.strip, kept)))
    return {**row, "text": plain} if plain else "a manual page without text"


def _plain(line: str) -> str:
    if line.startswith('\\"'):
        return ""
    return _ESCAPE.sub(lambda found: _ESCAPES.get(found[1], "") if found[1] else "", line.partition('\\"')[0]).strip()
