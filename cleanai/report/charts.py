"""The charts of the reports, with their fonts, colours and measures."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, List, Sequence, Tuple

from reportlab.graphics import renderSVG
from reportlab.graphics.charts.barcharts import VerticalBarChart
from reportlab.graphics.charts.legends import Legend
from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, Line, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.units import mm
from reportlab.lib.validators import Auto
from reportlab.pdfbase.pdfmetrics import stringWidth

from cleanai.report.fonts import FONT
from cleanai.report.wording import Record

DARK, LIGHT, GREY = colors.HexColor("#1d4e79"), colors.HexColor("#f0a030"), colors.HexColor("#666666")
LINES = colors.HexColor("#dddddd")
MARGIN = 18 * mm
PADDING = 6  # of a page's frame, and of a table's cells
WIDTH = A4[0] - 2 * MARGIN - 2 * PADDING
Points = List[Tuple[float, float]]
Style = Tuple[Any, Any, Any]  # colour, dashes, marker
_ORIGINAL: Style = (GREY, (4, 3), None)  # of the original network
# Of the curves in a chart. Markers and dashes distinguish them without colours, too.
_STYLES: tuple[Style, ...] = (
    (DARK, None, "FilledCircle"),
    (LIGHT, None, "FilledSquare"),
    (colors.HexColor("#3a9a5b"), (5, 2), "FilledTriangle"),
    (GREY, (1, 2), "Circle"),
    (colors.HexColor("#b05090"), (4, 2), "FilledDiamond"),
    (colors.HexColor("#7a5230"), None, "Square"),
)


def epochs_chart(record: Record) -> Drawing:
    """Accuracy and loss over the epochs of fine-tuning, from the pruned network on, beside those of the original."""
    models, history = record["models"], record["history"]
    drawing, gap = Drawing(WIDTH, 62 * mm), 6 * mm
    width = (WIDTH - gap) / 2
    titles = {"accuracy_percent": "Accuracy (%)", "loss": "Loss (cross-entropy)"}
    for left, (key, title) in zip((0, width + gap), titles.items()):
        original = models["original"][key]
        lines = {
            "Test images": [(0, models["pruned"][key]), *((epoch["epoch"], epoch[f"test_{key}"]) for epoch in history)],
            "Training images": [(epoch["epoch"], epoch[f"train_{key}"]) for epoch in history],
            "Original network, test images": [(0, original), (len(history), original)],
        }
        chart = _axes(drawing, LinePlot(), _Box(left, 0, width, drawing.height - 5 * mm), title, "Epoch")
        _plot(chart, list(lines.values()), (*_STYLES[:2], _ORIGINAL))
        values = [value for points in chart.data for _, value in points]
        spread = max(values) - min(values)
        least, most, form = (0.02, math.inf, "%.2f") if key == "loss" else (0.5, 100, "%.1f" if spread < 5 else "%.0f")
        margin = max(spread / 10, least)
        chart.yValueAxis.valueMin = max(0, min(values) - margin)
        chart.yValueAxis.valueMax = min(most, max(values) + margin)
        chart.yValueAxis.labelTextFormat = form
        chart.xValueAxis.valueMin, chart.xValueAxis.valueMax = 0, len(history)
        chart.xValueAxis.valueStep = max(1, -(-len(history) // 10))
        chart.xValueAxis.labelTextFormat = "%d"
    _legend(drawing, chart, lines)
    return drawing


def latency_chart(quantiles_ms: dict[str, list[float]]) -> Drawing:
    """The share of calls below a time, from the quantiles of each of three networks, by name."""
    drawing = Drawing(WIDTH, 58 * mm)
    box = _Box(0, 0, WIDTH, drawing.height - 5 * mm)
    chart = _axes(drawing, LinePlot(), box, "Calls below this time (%)", "Time for one image (ms)")
    lines = [
        [(value, 100 * number / (len(values) + 1)) for number, value in enumerate(values, 1)]
        for values in quantiles_ms.values()
    ]
    _plot(chart, lines, (_ORIGINAL, (LIGHT, None, None), (DARK, None, None)))
    chart.yValueAxis.valueMin, chart.yValueAxis.valueMax, chart.yValueAxis.valueStep = 0, 100, 25
    chart.yValueAxis.labelTextFormat = "%d"
    fastest, slowest = min(map(min, quantiles_ms.values())), max(map(max, quantiles_ms.values()))
    chart.xValueAxis.valueMin, chart.xValueAxis.valueMax = 0.95 * fastest, 1.02 * slowest
    chart.xValueAxis.maximumTicks = 10
    spread = slowest - fastest
    digits = 4 if slowest < 0.1 else 2 if spread < 1 else 1 if spread < 8 else 0
    chart.xValueAxis.labelTextFormat = f"%.{digits}f"
    _legend(drawing, chart, quantiles_ms)
    return drawing


def widths_chart(layers: list[str], widths: dict[str, list[int]]) -> Drawing:
    """The output channels of each layer but the last, whose outputs are the classes, side by side."""
    channels = {name: [float(value) for value in values[:-1]] for name, values in widths.items()}
    return layers_chart(layers[:-1], {"Output channels": channels})


def layers_chart(layers: list[str], panels: dict[str, dict[str, list[float]]]) -> Drawing:
    """Bars per layer, one panel below the other: `panels` holds, by title, two or more rows of values by name."""
    longest = max(map(len, layers))
    crowded = len(layers) > 30 or longest > 30
    share = 0.6 if crowded else 0.5  # of the font size: the height of a letter of a slanted label
    label_size = min(6.5, 0.8 * WIDTH / len(layers), 60 * mm / (share * longest))
    below, panel = 4 * mm + share * label_size * longest, 38 * mm
    drawing = Drawing(WIDTH, below + panel * len(panels) + 5 * mm)
    for number, (title, rows) in enumerate(panels.items()):
        lowest = number == len(panels) - 1
        y = below + panel * (len(panels) - 1 - number) - 10 * mm
        chart = _axes(drawing, VerticalBarChart(), _Box(0, y, WIDTH, panel + 10 * mm), title)
        chart.data = list(rows.values())
        chart.categoryAxis.categoryNames = layers if lowest else [""] * len(layers)
        labels = chart.categoryAxis.labels
        labels.angle, labels.boxAnchor, labels.dx, labels.dy = (90, "e", 0, -6) if crowded else (60, "ne", 3, -2)
        labels.fontSize = label_size
        chart.categoryAxis.tickDown = 0
        chart.valueAxis.valueMin, chart.valueAxis.valueMax = 0, 1.1 * max(max(row) for row in chart.data) or 1
        chart.valueAxis.maximumTicks = 6
        chart.groupSpacing, chart.barSpacing = 4, 0
        fills = (colors.white, DARK) if len(rows) == 2 else (colors.white, LIGHT, DARK, *(s[0] for s in _STYLES[2:]))
        for row, color in zip(range(len(rows)), fills):
            chart.bars[row].fillColor = color
            chart.bars[row].strokeColor, chart.bars[row].strokeWidth = GREY, 0.4
    _legend(drawing, chart, rows)
    return drawing


def small_charts(charts: list[tuple[str, Points, float]], abreast: int = 4) -> list[Drawing]:
    """Rows of small charts whose axes are percent from 0 to 100: title, points, and where a dashed line stands."""
    rows = []
    for start in range(0, len(charts), abreast):
        row = Drawing(WIDTH, 34 * mm)
        for column, (title, points, mark) in enumerate(charts[start : start + abreast]):
            left = column * WIDTH / abreast
            plot = LinePlot()
            plot.x, plot.y, plot.width, plot.height = left + 7 * mm, 6 * mm, WIDTH / abreast - 11 * mm, 21 * mm
            _plot(plot, [points, [(mark, 0), (mark, 100)]], ((DARK, None, None), (LIGHT, (3, 2), None)))
            for axis in (plot.xValueAxis, plot.yValueAxis):
                axis.valueMin, axis.valueMax, axis.valueStep, axis.labelTextFormat = 0, 100, 50, "%d"
            _style_axes(plot.xValueAxis, plot.yValueAxis)
            plot.xValueAxis.labels.fontSize = plot.yValueAxis.labels.fontSize = 5.5
            size = min(6.5, (WIDTH / abreast - 3 * mm) / stringWidth(title, FONT, 1))
            row.add(plot)
            row.add(String(left, 30 * mm, title, fontName=FONT, fontSize=size))
        rows.append(row)
    return rows


def differences_chart(rows: list[tuple[str, float, list[float]]]) -> Drawing:
    """Differences of accuracy with their intervals, one below the other: label, points, interval in points."""
    left, line = 66 * mm, 7 * mm
    drawing = Drawing(WIDTH, 17 * mm + line * len(rows))
    caption = "Difference in held-out accuracy with its 95% interval (percentage points)"
    box = _Box(left - 10 * mm, 0, WIDTH - left + 8 * mm, drawing.height)
    chart = _axes(drawing, LinePlot(), box, "", caption)
    heights = [len(rows) - number - 0.5 for number in range(len(rows))]
    intervals = [[(low, y), (high, y)] for (_, _, (low, high)), y in zip(rows, heights)]
    points = [[(value, y)] for (_, value, _), y in zip(rows, heights)]
    chart.data = [[(0, 0), (0, len(rows))], *intervals, *points]
    for number in range(len(chart.data)):
        chart.lines[number].strokeColor, chart.lines[number].strokeWidth = DARK, 1.5
        if number > len(rows):
            chart.lines[number].symbol = makeMarker("FilledDiamond", size=6, fillColor=DARK, strokeColor=DARK)
    chart.lines[0].strokeColor, chart.lines[0].strokeWidth, chart.lines[0].strokeDashArray = GREY, 0.7, (4, 2)
    reach = 1.15 * max(abs(bound) for _, _, interval in rows for bound in interval) or 1
    chart.xValueAxis.valueMin, chart.xValueAxis.valueMax = -reach, reach
    chart.xValueAxis.labelTextFormat = "%+.1f"
    chart.yValueAxis.valueMin, chart.yValueAxis.valueMax = 0, len(rows)
    chart.yValueAxis.visible = chart.yValueAxis.visibleGrid = False
    size = min(7, left / max(stringWidth(label, FONT, 1) for label, _, _ in rows))
    for (label, _, _), y in zip(rows, heights):
        height = chart.y + chart.height * y / len(rows) - 2
        drawing.add(String(0, height, label, fontName=FONT, fontSize=size))
    return drawing


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
    styles = dict(zip(panels[0].curves, itertools.cycle(_STYLES)))
    names = [*styles, *([] if original is None else ["original network"])]
    places, below = _legend_places(names, 29), _legend_places([text for text, _, _ in stars], 21)
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
        color, dashes, marker = styles.get(name, _ORIGINAL)
        y = drawing.height - 6 - 14 * row
        line = Line(x, y, x + 24, y, strokeColor=color, strokeWidth=1.5 if marker else 0.8, strokeDashArray=dashes)
        drawing.add(line)
        _legend_entry(drawing, marker and _marker(marker, color), (x, y), 29, name)
    for (text, name, filled), (x, row) in zip(stars, below):
        y = drawing.height - 6 - 14 * (rows[0] + row)
        _legend_entry(drawing, _star(styles[name][0], filled), (x, y), 21, text)
    return drawing


def svg_bytes(drawing: Drawing) -> bytes:
    """A drawing as SVG, with fonts that browsers have."""
    return renderSVG.drawToString(drawing).replace("Vera", "Verdana, sans-serif").encode("utf-8")


def _curves(panel: Panel, original: float | None, styles: dict[str, Style]) -> LinePlot:
    plot = LinePlot()
    lines, stars = list(panel.curves.values()), [[(x, y)] for _, _, x, y in panel.stars]
    furthest = max(x for line in (*lines, *stars) for x, _ in line)
    step = 10 if furthest > 25 else 5
    end = step * math.ceil(furthest / step - 0.1)  # the axis may end at 70 for 70.1
    reference: list[Points] = [] if original is None else [[(0.0, original), (float(end), original)]]
    _plot(plot, [*lines, *stars, *reference], [*styles.values(), *[_ORIGINAL] * (len(stars) + len(reference))])
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
    _style_axes(plot.xValueAxis, plot.yValueAxis)
    return plot


def _legend_places(texts: Sequence[str], indent: float) -> list[tuple[float, int]]:
    """Where each entry of a legend begins: its position across, and its row."""
    places, x, row = [], 0.0, 0
    for text in texts:
        width = indent + stringWidth(text, FONT, 7)
        if x and x + width > WIDTH:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width + 12
    return places


def _legend_entry(drawing: Drawing, marker: Any, place: tuple[float, float], indent: float, text: str) -> None:
    """Draw a marker and its text."""
    x, y = place
    if marker:
        marker.x, marker.y = x + 12, y
        drawing.add(marker)
    drawing.add(String(x + indent, y - 2.5, text, fontName=FONT, fontSize=7))


def _marker(kind: str, color: Any) -> Any:
    filled = color if kind.startswith("Filled") else colors.white
    return makeMarker(kind, size=5, fillColor=filled, strokeColor=color)


def _star(color: Any, filled: bool) -> Any:
    fill, edge = (color, colors.black) if filled else (colors.white, color)
    return makeMarker("FilledStarFive", size=11, fillColor=fill, strokeColor=edge, strokeWidth=0.5 if filled else 1.2)


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def _axes(drawing: Drawing, chart: Any, box: _Box, title: str, caption: str = "") -> Any:
    """Put `chart` into a part of a drawing, with a title above, and a caption below its horizontal axis."""
    chart.x, chart.y = box.x + 10 * mm, box.y + 10 * mm
    chart.width, chart.height = box.width - 12 * mm, box.height - 17 * mm
    drawing.add(chart)
    drawing.add(String(box.x, box.y + box.height - 4 * mm, title, fontName=FONT, fontSize=7))
    middle = chart.x + chart.width / 2
    drawing.add(String(middle, box.y + 2, caption, fontName=FONT, fontSize=7, textAnchor="middle"))
    bars = isinstance(chart, VerticalBarChart)
    _style_axes(*((chart.categoryAxis, chart.valueAxis) if bars else (chart.xValueAxis, chart.yValueAxis)))
    return chart


def _style_axes(across: Any, up: Any) -> None:
    for axis in (across, up):
        axis.labels.fontName, axis.labels.fontSize = FONT, 6.5
        axis.strokeColor = GREY
    up.visibleGrid, up.gridStrokeColor = True, LINES
    up.maximumTicks = 6


def _plot(chart: LinePlot, lines: list[Points], styles: Sequence[Style]) -> None:
    """Give a chart its lines, each with a colour, dashes and a marker."""
    chart.data = lines
    for number, (color, dashes, marker) in enumerate(styles):
        line = chart.lines[number]
        line.strokeColor, line.strokeWidth, line.strokeDashArray = color, 1.5, dashes
        line.symbol = marker and _marker(marker, color)


def _legend(drawing: Drawing, chart: Any, names: Iterable[str]) -> None:
    """Name the lines or bars of `chart`, at the top right of the drawing; above it where there are too many."""
    bars = isinstance(chart, VerticalBarChart)
    rows = 1 + _legend_places(list(names), 22 if bars else 36)[-1][1]
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
