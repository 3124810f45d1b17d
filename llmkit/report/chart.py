"""Matplotlib figures as SVG that stands in a page: its colours are the page's, so that light and dark are one drawing."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that nobody would choose stand for the variables of the page's style sheet.
INK, MUTED, GRID, PAPER = "#000001", "#000002", "#000003", "#000004"
HUES = ("#000011", "#000012", "#000013", "#000014", "#000015", "#000016")
FROZEN, LEARNING, THAWING = "#000021", "#000022", "#000023"
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))  # so that curves differ without colour too
_VARIABLES = {
    **{INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"},
    **{hue: f"--hue-{number}" for number, hue in enumerate(HUES, 1)},
    **{FROZEN: "--frozen", LEARNING: "--learning", THAWING: "--thawing"},
}
_VARIABLE = re.compile("|".join(_VARIABLES))
_REFERENCE = re.compile(r"^#(.+)$|url\(#(.+?)\)")
_SVG = "{http://www.w3.org/2000/svg}"
_WIDTH = 4.6
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llmkit",
    "font.family": "DejaVu Sans",  # comes with Matplotlib; the page's own font is narrower
    "font.size": 9,
    "text.parse_math": False,  # labels come from data
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, and in words what it shows."""

    title: str
    description: str
    svg: Markup


@contextmanager
def _style() -> Iterator[None]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of building its font cache
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user's says
        matplotlib.rcParams.update(_SETTINGS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of signs that its own font has not got
            yield


def draw(
    key: str,
    title: str,
    description: str,
    paint: Callable[[Axes], None],
    *,
    height: float = 2.4,
    width: float = _WIDTH,
) -> Chart:
    """A chart of one pair of axes; `key` is unique on its page, the size is in inches, and the page scales it."""
    with _style():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        file = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.print_svg(file, metadata=nothing)
    return Chart(title, description, _for_page(file.getvalue(), key, title, description))


def label(value: object, longest: int = 28) -> str:
    """A name from data as a chart's text: one line, no longer than that, without what no page can hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _for_page(svg: str, key: str, title: str, description: str) -> Markup:
    """The SVG element alone, named, with ids of its own, in the page's colours."""
    root = ElementTree.fromstring(svg)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img"}
    root.set("aria-labelledby", f"{key}-title {key}-description")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used = {found for element in root.iter() for value in element.attrib.values() for found in _references(value)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        element.tag = element.tag.removeprefix(_SVG)
        element.text, element.tail = (element.text or "").strip() or None, None
        element.attrib = {
            name.rpartition("}")[2]: _VARIABLE.sub(lambda m: f"var({_VARIABLES[m[0]]})", _own_id(name, value, key))
            for name, value in element.attrib.items()
        }
    for name, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(name, id=f"{key}-{'title' if name == 'title' else 'description'}")
        element.text = text
        root.insert(0, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # which escapes all texts


def _references(value: str) -> list[str]:
    return [first or second for first, second in _REFERENCE.findall(value)]


def _own_id(name: str, value: str, key: str) -> str:
    """An attribute's value, with the chart's key before each id: several charts stand on one page."""
    if name == "id":
        return f"{key}-{value}"
    if name.endswith("href"):
        return value.replace("#", f"#{key}-", 1)
    return value.replace("url(#", f"url(#{key}-")
