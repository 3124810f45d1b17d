"""Reads a page as a browser would, as far as the tests need it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    own_text: str = ""

    def all(self, *tags: str) -> list[Element]:
        """Everything inside with one of the tags, in order."""
        found = []
        for child in self.children:
            found += ([child] if not tags or child.tag in tags else []) + child.all(*tags)
        return found

    @property
    def text(self) -> str:
        """What is written in it and inside it."""
        return " ".join((self.own_text + " " + " ".join(child.text for child in self.children)).split())

    def by_id(self, name: str) -> Element:
        """The one element of that id."""
        (found,) = [element for element in self.all() if element.attributes.get("id") == name]
        return found


class Reader(HTMLParser):
    """Raises AssertionError for a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.here = Element("", {})

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attributes}, self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.here.children.append(Element(tag, {name: value or "" for name, value in attributes}, self.here))

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.own_text += data


def read_page(html: str) -> Element:
    """The page's tree."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.here is reader.root, f"<{reader.here.tag}> is not closed"
    return reader.root
