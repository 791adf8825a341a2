"""What the charts of the reports share: colours, measures, axes, lines and legends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, List, Sequence, Tuple

from reportlab.graphics import renderSVG
from reportlab.graphics.charts.barcharts import VerticalBarChart
from reportlab.graphics.charts.legends import Legend
from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.units import mm
from reportlab.lib.validators import Auto
from reportlab.pdfbase.pdfmetrics import stringWidth

from cleanai.report.fonts import FONT

DARK, LIGHT, GREY = colors.HexColor("#1d4e79"), colors.HexColor("#f0a030"), colors.HexColor("#666666")
LINES = colors.HexColor("#dddddd")
MARGIN = 18 * mm
PADDING = 6  # of a page's frame, and of a table's cells
WIDTH = A4[0] - 2 * MARGIN - 2 * PADDING
Points = List[Tuple[float, float]]
Style = Tuple[Any, Any, Any]  # colour, dashes, marker
ORIGINAL: Style = (GREY, (4, 3), None)  # of the original network
# Of the curves in a chart. Markers and dashes distinguish them without colours, too.
STYLES: tuple[Style, ...] = (
    (DARK, None, "FilledCircle"),
    (LIGHT, None, "FilledSquare"),
    (colors.HexColor("#3a9a5b"), (5, 2), "FilledTriangle"),
    (GREY, (1, 2), "Circle"),
    (colors.HexColor("#b05090"), (4, 2), "FilledDiamond"),
    (colors.HexColor("#7a5230"), None, "Square"),
)


@dataclass(frozen=True)
class Box:
    """A part of a drawing."""

    x: float
    y: float
    width: float
    height: float


def axes_of(drawing: Drawing, chart: Any, box: Box, title: str, caption: str = "") -> Any:
    """Put `chart` into a part of a drawing, with a title above, and a caption below its horizontal axis."""
    chart.x, chart.y = box.x + 10 * mm, box.y + 10 * mm
    chart.width, chart.height = box.width - 12 * mm, box.height - 17 * mm
    drawing.add(chart)
    drawing.add(String(box.x, box.y + box.height - 4 * mm, title, fontName=FONT, fontSize=7))
    middle = chart.x + chart.width / 2
    drawing.add(String(middle, box.y + 2, caption, fontName=FONT, fontSize=7, textAnchor="middle"))
    bars = isinstance(chart, VerticalBarChart)
    style_axes(*((chart.categoryAxis, chart.valueAxis) if bars else (chart.xValueAxis, chart.yValueAxis)))
    return chart


def style_axes(across: Any, up: Any) -> None:
    """Give the axes of a chart the fonts and colours of all charts."""
    for axis in (across, up):
        axis.labels.fontName, axis.labels.fontSize = FONT, 6.5
        axis.strokeColor = GREY
    up.visibleGrid, up.gridStrokeColor = True, LINES
    up.maximumTicks = 6


def plot_lines(chart: LinePlot, lines: list[Points], styles: Sequence[Style]) -> None:
    """Give a chart its lines, each with a colour, dashes and a marker."""
    chart.data = lines
    for number, (color, dashes, marker) in enumerate(styles):
        line = chart.lines[number]
        line.strokeColor, line.strokeWidth, line.strokeDashArray = color, 1.5, dashes
        line.symbol = marker and marker_of(marker, color)


def marker_of(kind: str, color: Any) -> Any:
    """A marker of reportlab's `kind`, filled where its name says so."""
    filled = color if kind.startswith("Filled") else colors.white
    return makeMarker(kind, size=5, fillColor=filled, strokeColor=color)


def add_legend(drawing: Drawing, chart: Any, names: Iterable[str]) -> None:
    """Name the lines or bars of `chart`, at the top right of the drawing; above it where there are too many."""
    bars = isinstance(chart, VerticalBarChart)
    rows = 1 + legend_places(list(names), 22 if bars else 36)[-1][1]
    drawing.height += 10 * (rows - 1)
    for number, name in enumerate(names):
        (chart.bars if bars else chart.lines)[number].name = name
    legend = Legend()
    legend.colorNamePairs = Auto(obj=chart)
    legend.x, legend.y = drawing.width, drawing.height
    legend.boxAnchor = "ne"
    legend.columnMaximum = rows
    legend.alignment = "right"
    legend.fontName, legend.fontSize = FONT, 7
    legend.dx, legend.dy = (6 if bars else 20), 6
    legend.deltax, legend.deltay, legend.variColumn = 12, 10, True
    legend.dxTextSpace = 4
    drawing.add(legend)


def legend_places(texts: Sequence[str], indent: float) -> list[tuple[float, int]]:
    """Where each entry of a legend begins: its position across, and its row."""
    places, x, row = [], 0.0, 0
    for text in texts:
        width = indent + stringWidth(text, FONT, 7)
        if x and x + width > WIDTH:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width + 12
    return places


def svg_bytes(drawing: Drawing) -> bytes:
    """A drawing as SVG, with fonts that browsers have."""
    return renderSVG.drawToString(drawing).replace("Vera", "Verdana, sans-serif").encode("utf-8")
