"""The charts of the report, with its fonts, colours and measures; made from a record alone."""
from __future__ import annotations

import math
from typing import Any, Iterable

from reportlab.graphics.charts.barcharts import VerticalBarChart
from reportlab.graphics.charts.legends import Legend
from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.units import mm
from reportlab.lib.validators import Auto

from cleanai.report.run_text import Record

# Fonts that come with reportlab and, unlike the PDF standard ones, hold the Turkish letters.
FONT, BOLD = "Vera", "VeraBd"
DARK, LIGHT, GREY = colors.HexColor("#1d4e79"), colors.HexColor("#f0a030"), colors.HexColor("#666666")
LINES = colors.HexColor("#dddddd")
MARGIN = 18 * mm
PADDING = 6  # of a page's frame, and of a table's cells
WIDTH = A4[0] - 2 * MARGIN - 2 * PADDING
_ORIGINAL = (GREY, (4, 2), None)  # how the original network is drawn: colour, dashes, no marker


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
        chart = _axes(drawing, LinePlot(), left, 0, width, drawing.height - 5 * mm, title, "Epoch")
        _plot(chart, list(lines.values()), ((DARK, None, "FilledCircle"), (LIGHT, None, "FilledSquare"), _ORIGINAL))
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
    """The share of calls that took no longer than a time, from the quantiles of each of three networks, by name."""
    drawing = Drawing(WIDTH, 58 * mm)
    height = drawing.height - 5 * mm
    chart = _axes(drawing, LinePlot(), 0, 0, WIDTH, height, "Calls that took no longer (%)", "Time for one image (ms)")
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
    chart.xValueAxis.labelTextFormat = "%.2f" if slowest - fastest < 1 else "%.1f" if slowest - fastest < 8 else "%.0f"
    _legend(drawing, chart, quantiles_ms)
    return drawing


def widths_chart(layers: list[str], widths: dict[str, list[int]]) -> Drawing:
    """The output channels of each layer but the last, whose outputs are the classes, side by side."""
    channels = {name: values[:-1] for name, values in widths.items()}
    return layers_chart(layers[:-1], {"Output channels": channels})


def layers_chart(layers: list[str], panels: dict[str, dict[str, list[float]]]) -> Drawing:
    """One below the other, what `panels` hold of the layers: by title, two or three rows of values by name."""
    crowded = len(layers) > 30
    label_size = min(6.5, 0.8 * WIDTH / len(layers))
    below, panel = 4 * mm + (0.6 if crowded else 0.5) * label_size * max(map(len, layers)), 38 * mm
    drawing = Drawing(WIDTH, below + panel * len(panels) + 5 * mm)
    for number, (title, rows) in enumerate(panels.items()):
        lowest = number == len(panels) - 1
        y = below + panel * (len(panels) - 1 - number) - 10 * mm
        chart = _axes(drawing, VerticalBarChart(), 0, y, WIDTH, panel + 10 * mm, title)
        chart.data = list(rows.values())
        chart.categoryAxis.categoryNames = layers if lowest else [""] * len(layers)
        labels = chart.categoryAxis.labels
        labels.angle, labels.boxAnchor, labels.dx, labels.dy = (90, "e", 0, -6) if crowded else (60, "ne", 3, -2)
        labels.fontSize = label_size
        chart.categoryAxis.tickDown = 0
        chart.valueAxis.valueMin, chart.valueAxis.valueMax = 0, 1.1 * max(max(row) for row in chart.data) or 1
        chart.valueAxis.maximumTicks = 6
        chart.groupSpacing, chart.barSpacing = 4, 0
        fills = (colors.white, DARK) if len(rows) == 2 else (colors.white, LIGHT, DARK)
        for row, color in enumerate(fills):
            chart.bars[row].fillColor = color
            chart.bars[row].strokeColor, chart.bars[row].strokeWidth = GREY, 0.4
    _legend(drawing, chart, rows)
    return drawing


def differences_chart(rows: list[tuple[str, float, list[float]]]) -> Drawing:
    """Differences of accuracy with their intervals, one below the other: label, points, interval in points."""
    left, line = 66 * mm, 7 * mm
    drawing = Drawing(WIDTH, 17 * mm + line * len(rows))
    caption = "Difference in held-out accuracy with its 95% interval (percentage points)"
    chart = _axes(drawing, LinePlot(), left - 10 * mm, 0, WIDTH - left + 8 * mm, drawing.height, "", caption)
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
    for (label, _, _), y in zip(rows, heights):
        height = chart.y + chart.height * y / len(rows) - 2
        drawing.add(String(0, height, label, fontName=FONT, fontSize=7))
    return drawing


def _axes(
    drawing: Drawing, chart: Any, x: float, y: float, width: float, height: float, title: str, caption: str = ""
) -> Any:
    """Put `chart` into this part of a drawing, with a title above, and a caption below its horizontal axis."""
    chart.x, chart.y = x + 10 * mm, y + 10 * mm
    chart.width, chart.height = width - 12 * mm, height - 17 * mm
    drawing.add(chart)
    drawing.add(String(x, y + height - 4 * mm, title, fontName=FONT, fontSize=7))
    drawing.add(String(chart.x + chart.width / 2, y + 2, caption, fontName=FONT, fontSize=7, textAnchor="middle"))
    bars = isinstance(chart, VerticalBarChart)
    across, up = (chart.categoryAxis, chart.valueAxis) if bars else (chart.xValueAxis, chart.yValueAxis)
    for axis in (across, up):
        axis.labels.fontName, axis.labels.fontSize = FONT, 6.5
        axis.strokeColor = GREY
    up.visibleGrid, up.gridStrokeColor = True, LINES
    up.maximumTicks = 6
    return chart


def _plot(chart: LinePlot, lines: list[list[tuple[float, float]]], styles: tuple[Any, ...]) -> None:
    """Give a chart its lines, each with a colour, dashes and a marker."""
    chart.data = lines
    for number, (color, dashes, marker) in enumerate(styles):
        line = chart.lines[number]
        line.strokeColor, line.strokeWidth, line.strokeDashArray = color, 1.5, dashes
        if marker:
            line.symbol = makeMarker(marker, size=4, fillColor=color, strokeColor=color)


def _legend(drawing: Drawing, chart: Any, names: Iterable[str]) -> None:
    """Name the lines or bars of `chart`, at the top right of the drawing."""
    bars = isinstance(chart, VerticalBarChart)
    for number, name in enumerate(names):
        (chart.bars if bars else chart.lines)[number].name = name
    legend = Legend()
    legend.colorNamePairs = Auto(obj=chart)
    legend.x, legend.y = drawing.width, drawing.height
    legend.boxAnchor = "ne"
    legend.columnMaximum = 1
    legend.alignment = "right"
    legend.fontName, legend.fontSize = FONT, 7
    legend.dx, legend.dy = (6 if bars else 20), 6
    legend.deltax, legend.variColumn = 12, True
    legend.dxTextSpace = 4
    drawing.add(legend)
