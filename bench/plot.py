"""Draw figures as SVG: a panel for each, on logarithmic scales, since what is compared differs by powers of ten."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final
from xml.etree import ElementTree as ET

# Who stands in several pictures has the same colour in all of them.
COLOURS: Final = {
    name: colour
    for colour, names in {
        "#d62728": ("eng", "relay"),
        "#ff7f0e": ("eng spinning", "relay spinning"),
        "#ff9896": ("eng 2 lanes",),
        "#9467bd": ("attested",),
        "#1f77b4": ("4 socat", "socat"),
        "#17becf": ("socat TLS", "socat -b 256k"),
        "#2ca02c": ("4 haproxy", "haproxy", "trio.SSLStream"),
        "#8c564b": ("openvpn",),
        "#e377c2": ("wireguard-go",),
        "#7f7f7f": ("direct", "plain"),
    }.items()
    for name in names
}
_OTHERS: Final = "#bcbd22"
_COLUMNS: Final = 3
_WIDTH: Final = 380
_MARGIN: Final = 16
_ROW: Final = 17
_LABEL: Final = 106
_VALUE: Final = 52
_GRAPH: Final = 190  # how high a graph is

Panels = Mapping[str, Mapping[str, Sequence[float]]]
"""By figure, by column: the rounds' values."""
Graphs = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
"""By title, by column: points."""


def dots(title: str, panels: Panels, names: Sequence[str]) -> str:
    """Draw each figure's median as a dot, with a line from its least to its greatest value."""
    height = 48 + _ROW * max(len(columns) for columns in panels.values())
    drawing = _Drawing(title, names, len(panels), height)
    for number, (figure, columns) in enumerate(panels.items()):
        panel = drawing.panel(number, figure)
        across = _Scale([value for values in columns.values() for value in values], _LABEL, _WIDTH - _VALUE - _MARGIN)
        for value in across.marks():
            x = across.at(value)
            _add(panel, "line", x1=x, x2=x, y1=22, y2=height - 26, stroke="#ddd")
            _text(panel, short(value), x, height - 15, anchor="middle", size=10)
        for row, (name, values) in enumerate(columns.items()):
            y, colour, median = 32 + _ROW * row, drawing.colours[name], statistics.median(values)
            _text(panel, name, _LABEL - 8, y + 4, anchor="end")
            ends = {"x1": across.at(min(values)), "x2": across.at(max(values))}
            _add(panel, "line", **ends, y1=y, y2=y, stroke=colour, stroke_width=3, stroke_opacity=0.4)
            _add(panel, "circle", cx=across.at(median), cy=y, r=4.5, fill=colour)
            _text(panel, short(median), _WIDTH - _MARGIN, y + 4, anchor="end")
    return drawing.text()


def lines(title: str, graphs: Graphs, names: Sequence[str]) -> str:
    """Draw each column as a line through its points."""
    drawing = _Drawing(title, names, len(graphs), _GRAPH + 70)
    left, right, top, bottom = 46, _WIDTH - 24, 26, _GRAPH + 26
    for number, (heading, columns) in enumerate(graphs.items()):
        panel = drawing.panel(number, heading)
        points = [point for each in columns.values() for point in each]
        across, up = _Scale([x for x, _ in points], left, right), _Scale([y for _, y in points], bottom, top)
        for value in sorted({x for x, _ in points}):
            _add(panel, "line", x1=across.at(value), x2=across.at(value), y1=top, y2=bottom, stroke="#eee")
            _text(panel, short(value), across.at(value), bottom + 15, anchor="middle")
        for value in up.marks():
            _add(panel, "line", x1=left, x2=right, y1=up.at(value), y2=up.at(value), stroke="#ddd")
            _text(panel, short(value), left - 5, up.at(value) + 4, anchor="end")
        for name, each in columns.items():
            places = [(across.at(x), up.at(y)) for x, y in each]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            _add(panel, "polyline", points=path, fill="none", stroke=drawing.colours[name], stroke_width=2)
            for x, y in places:
                _add(panel, "circle", cx=x, cy=y, r=3, fill=drawing.colours[name])
    return drawing.text()


def short(value: float) -> str:
    """Three digits of a number, for people."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= power:
            scale = 1000 if letter == "k" else power
            return f"{value / scale:.3g}{letter}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class _Drawing:
    """A heading, a key of all columns, and panels below."""

    def __init__(self, title: str, names: Sequence[str], panels: int, panel_height: int) -> None:
        self.colours = {name: COLOURS.get(name, _OTHERS) for name in names}
        self._panel_height = panel_height
        width, height = _COLUMNS * _WIDTH, 70 + math.ceil(panels / _COLUMNS) * panel_height
        size = {"width": str(width), "height": str(height), "viewBox": f"0 0 {width} {height}"}
        style = {"font-family": "sans-serif", "font-size": "12"}
        self._root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **style})
        _add(self._root, "rect", width=width, height=height, fill="white")
        _text(self._root, title, _MARGIN, 26, size=17)
        x = float(_MARGIN)
        for name, colour in self.colours.items():
            _add(self._root, "circle", cx=x + 5, cy=48, r=5, fill=colour)
            _text(self._root, name, x + 15, 52)
            x += 40 + 7 * len(name)

    def panel(self, number: int, heading: str) -> ET.Element:
        """Make room for another figure."""
        x, y = number % _COLUMNS * _WIDTH, 66 + number // _COLUMNS * self._panel_height
        panel = _add(self._root, "g", transform=f"translate({x} {y})")
        _text(panel, heading, _MARGIN, 14, weight="bold")
        return panel

    def text(self) -> str:
        """The file's text."""
        ET.indent(self._root, " ")
        return ET.tostring(self._root, encoding="unicode") + "\n"


class _Scale:
    """From values to places, by their logarithms. What is nothing or less lies at the scale's start."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._start, self._end = start, end
        logarithms = [math.log10(value) for value in values if value > 0] or [0.0]
        self._low, self._high = min(logarithms), max(logarithms)
        if self._high - self._low < 0.3:  # what is nearly equal is to look so
            self._low, self._high = self._low - 0.15, self._high + 0.15

    def at(self, value: float) -> float:
        if value <= 0:
            return self._start
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def marks(self) -> list[float]:
        """The powers of ten within, and twice and five times them if there would be hardly any otherwise."""
        powers = range(math.floor(self._low), math.floor(self._high) + 1)
        factors = (1, 2, 5) if self._high - self._low < 2 else (1,)
        marks = [factor * 10.0**power for power in powers for factor in factors]
        return [mark for mark in marks if self._low <= math.log10(mark) <= self._high]


def _add(parent: ET.Element, tag: str, **attributes: object) -> ET.Element:
    named = {name.replace("_", "-"): str(value) for name, value in attributes.items()}
    return ET.SubElement(parent, tag, named)


def _text(
    parent: ET.Element,
    text: str,
    x: float,
    y: float,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
) -> None:
    shape = {"text_anchor": anchor, "font_size": size, "font_weight": weight}
    _add(parent, "text", x=x, y=y, fill="#222", **shape).text = text
