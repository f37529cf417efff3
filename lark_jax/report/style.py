"""The style of the figures, and their deterministic export: the same content always gives the same bytes.

Figures are drawn with matplotlib's object interface (no pyplot, no display). In SVG the neutral colours below become
CSS variables, so an inline figure follows the page into dark mode; PNG keeps the colours.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2328"  # text and axes
MUTED = "#6a737d"  # secondary text and lines
GRID = "#d8dee4"
QUIET = "#b8c4d0"  # bars for context
HIGHLIGHT = "#d1242f"  # the red border of selected candidates
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", QUIET: "--quiet", HIGHLIGHT: "--highlight"}

# Okabe & Ito's palette, distinguishable with every common form of colour blindness, without yellow (too pale on white).
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
HATCHES = ("", "///", "...", "xxx")  # after the last colour the palette repeats with the next hatch
DASHES = ("-", "--", ":", "-.")

SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout is the same on every machine
    "font.size": 10,
    "grid.color": GRID,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lark_jax",
    "text.color": INK,
    "text.parse_math": False,  # names in a pool may contain dollar signs
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"

_LABEL_LENGTH = 32  # characters


@dataclass(frozen=True)
class MethodStyle:
    colour: str
    hatch: str


@dataclass(frozen=True)
class Plate:
    """A figure with its title and caption."""

    figure: Figure
    title: str
    caption: str


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """One style per method, in order of first appearance."""
    return {
        method: MethodStyle(PALETTE[i % len(PALETTE)], HATCHES[i // len(PALETTE) % len(HATCHES)])
        for i, method in enumerate(dict.fromkeys(methods))
    }


def clean(text: str) -> str:
    """`text` with characters that XML and fonts cannot show replaced."""
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)


def short(name: str) -> str:
    """`name` shortened for a label in a figure; tables have it in full."""
    name = clean(name)
    return name if len(name) <= _LABEL_LENGTH else name[: _LABEL_LENGTH - 1] + "…"


def drawing_style() -> AbstractContextManager[None]:
    """A context with the matplotlib settings for drawing and saving."""
    return matplotlib.rc_context(SETTINGS)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, `width` x `height` inches. Call inside `drawing_style()`."""
    return Figure(figsize=(width, height), layout="constrained")


def quiet_axes(axes: Axes, grid_axis: str) -> None:
    axes.grid(axis=grid_axis, linewidth=0.8)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def png_bytes(figure: Figure) -> bytes:
    """The figure on white at 160 dots per inch."""
    stream = io.BytesIO()
    with drawing_style():
        figure.savefig(stream, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def svg_text(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an SVG element for an HTML page, labelled for screen readers and with the page's colours.

    Every id gets the prefix `name`, so that several figures can share a page.
    """
    stream = io.StringIO()
    with drawing_style():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(stream.getvalue())
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _adapt_element(element, name)
    _label_element(root, name, title, description)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt_element(element: ElementTree.Element, name: str) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    for attribute, value in list(element.attrib.items()):
        if attribute == "id":
            element.set("id", f"{name}-{value}")
        elif attribute == f"{_XLINK}href":
            del element.attrib[attribute]
            element.set("href", value.replace("#", f"#{name}-", 1))
        else:
            element.set(attribute, _with_page_style(value.replace("url(#", f"url(#{name}-")))


def _with_page_style(value: str) -> str:
    for colour, variable in CSS_VARIABLES.items():
        value = value.replace(colour, f"var({variable}, {colour})")
    return re.sub(r"'DejaVu Sans'(, [^;]*)?", _PAGE_FONT, value)


def _label_element(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    width_rem = float(root.attrib["width"].removesuffix("pt")) / 12
    for attribute in ("width", "height"):
        del root.attrib[attribute]  # the viewBox keeps the proportions; the page sets the size within these bounds
    root.set("style", f"min-width: {0.75 * width_rem:.1f}rem; max-width: {1.2 * width_rem:.1f}rem")
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = clean(text)
        root.insert(position, element)
