"""Charts of accuracy over what was removed: curves in panels, and single networks as stars."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, Line, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.units import mm

from cleanai.report.drawing import (
    ORIGINAL,
    STYLES,
    WIDTH,
    Points,
    Style,
    legend_places,
    marker_of,
    plot_lines,
    style_axes,
)
from cleanai.report.fonts import FONT


@dataclass
class Panel:
    """One part of a `curves_chart`: the points of each curve by name, and single networks as stars.

    A star is (name of its curve, filled, x, y). `label` makes the text below a position of the horizontal axis.
    """

    caption: str
    curves: dict[str, Points]
    title: str = "Accuracy (%)"
    stars: list[tuple[str, bool, float, float]] = field(default_factory=list)
    label: Callable[[float], str] = "{:.0f}".format


def curves_chart(
    panels: Sequence[Panel], original: float | None = None, stars: Sequence[tuple[str, str, bool]] = ()
) -> Drawing:
    """Accuracy in percent over what was removed, in panels side by side that have the same curves.

    `original` is the accuracy of the original network, if there is one, drawn as a line. `stars` are the legend of the
    panels' stars: (text, name of the curve, filled).
    """
    styles = dict(zip(panels[0].curves, itertools.cycle(STYLES)))
    names = [*styles, *([] if original is None else ["original network"])]
    places, below = legend_places(names, 29), legend_places([text for text, _, _ in stars], 21)
    rows = 1 + places[-1][1], 1 + (below[-1][1] if below else 0)
    drawing = Drawing(WIDTH, 86 * mm + 14 * (sum(rows) - 2))
    width, left = WIDTH / len(panels), 9 * mm
    for column, panel in enumerate(panels):
        plot = _curves(panel, original, styles)
        plot.x, plot.y = column * width + left, 13 * mm
        plot.width, plot.height = width - left - 3 * mm, 57 * mm
        drawing.add(plot)
        drawing.add(String(plot.x - left, plot.y + plot.height + 7, panel.title, fontName=FONT, fontSize=7))
        middle = plot.x + plot.width / 2
        drawing.add(String(middle, 3, panel.caption, fontName=FONT, fontSize=7, textAnchor="middle"))
    for name, (x, row) in zip(names, places):
        color, dashes, marker = styles.get(name, ORIGINAL)
        y = drawing.height - 6 - 14 * row
        line = Line(x, y, x + 24, y, strokeColor=color, strokeWidth=1.5 if marker else 0.8, strokeDashArray=dashes)
        drawing.add(line)
        _legend_entry(drawing, marker and marker_of(marker, color), (x, y), 29, name)
    for (text, name, filled), (x, row) in zip(stars, below):
        y = drawing.height - 6 - 14 * (rows[0] + row)
        _legend_entry(drawing, _star(styles[name][0], filled), (x, y), 21, text)
    return drawing


def _curves(panel: Panel, original: float | None, styles: dict[str, Style]) -> LinePlot:
    plot = LinePlot()
    lines, stars = list(panel.curves.values()), [[(x, y)] for _, _, x, y in panel.stars]
    furthest = max(x for line in (*lines, *stars) for x, _ in line)
    step = 10 if furthest > 25 else 5
    end = step * math.ceil(furthest / step - 0.1)  # the axis may end at 70 for 70.1
    reference: list[Points] = [] if original is None else [[(0.0, original), (float(end), original)]]
    plot_lines(plot, [*lines, *stars, *reference], [*styles.values(), *[ORIGINAL] * (len(stars) + len(reference))])
    for number, (name, filled, _, _) in enumerate(panel.stars, len(lines)):
        plot.lines[number].symbol = _star(styles[name][0], filled)
    accuracies = [y for line in plot.data for _, y in line]
    spread = max(accuracies) - min(accuracies)
    mark = next(mark for mark in (1, 2, 5, 10, 20) if spread <= 8 * mark or mark == 20)
    low, high = math.floor(min(accuracies) / mark) * mark, math.ceil((max(accuracies) + mark / 10) / mark) * mark
    plot.yValueAxis.valueMin, plot.yValueAxis.valueMax, plot.yValueAxis.valueStep = low, min(100, high), mark
    plot.yValueAxis.labelTextFormat = "%d"
    plot.xValueAxis.valueMin, plot.xValueAxis.valueMax, plot.xValueAxis.valueStep = 0, end, step
    plot.xValueAxis.labels.textAnchor = "middle"
    plot.xValueAxis.labelTextFormat = panel.label
    style_axes(plot.xValueAxis, plot.yValueAxis)
    return plot


def _legend_entry(drawing: Drawing, marker: Any, place: tuple[float, float], indent: float, text: str) -> None:
    """Draw a marker and its text."""
    x, y = place
    if marker:
        marker.x, marker.y = x + 12, y
        drawing.add(marker)
    drawing.add(String(x + indent, y - 2.5, text, fontName=FONT, fontSize=7))


def _star(color: Any, filled: bool) -> Any:
    fill, edge = (color, colors.black) if filled else (colors.white, color)
    return makeMarker("FilledStarFive", size=11, fillColor=fill, strokeColor=edge, strokeWidth=0.5 if filled else 1.2)
