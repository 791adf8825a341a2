"""The charts of the report, with its fonts, colours and measures; made from a record alone."""
from __future__ import annotations

from typing import Any

from reportlab.graphics.charts.barcharts import VerticalBarChart
from reportlab.graphics.charts.legends import Legend
from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.units import mm

from cleanai.tables import Record

# Fonts that come with reportlab and, unlike the PDF standard ones, hold the Turkish letters.
FONT, BOLD = "Vera", "VeraBd"
DARK, LIGHT, GREY = colors.HexColor("#1d4e79"), colors.HexColor("#f0a030"), colors.HexColor("#666666")
MARGIN = 18 * mm
PADDING = 6  # of a page's frame, and of a table's cells
WIDTH = A4[0] - 2 * MARGIN - 2 * PADDING


def accuracy_chart(record: Record) -> Drawing:
    """Accuracy over the epochs of fine-tuning, from the pruned network on, beside that of the original network."""
    history = record["history"]
    test = [(0, record["models"]["pruned"]["accuracy_percent"])]
    test += [(epoch["epoch"], epoch["test_accuracy_percent"]) for epoch in history]
    train = [(epoch["epoch"], epoch["train_accuracy_percent"]) for epoch in history]
    original = record["models"]["original"]["accuracy_percent"]
    lines = {
        "Test accuracy": (test, DARK, None, "FilledCircle"),
        "Training accuracy": (train, LIGHT, None, "FilledSquare"),
        "Original network, test": ([(0, original), (len(history), original)], GREY, (4, 2), None),
    }
    drawing, chart = _canvas(LinePlot(), height=62 * mm, title="Accuracy (%)")
    chart.data = [points for points, *_ in lines.values()]
    for number, (_, color, dashes, marker) in enumerate(lines.values()):
        chart.lines[number].strokeColor = color
        chart.lines[number].strokeWidth = 1.5
        chart.lines[number].strokeDashArray = dashes
        if marker:
            chart.lines[number].symbol = makeMarker(marker, size=4, fillColor=color, strokeColor=color)
    lowest = min(value for points in chart.data for _, value in points)
    highest = max(value for points in chart.data for _, value in points)
    margin = max(0.5, (highest - lowest) / 10)
    chart.yValueAxis.valueMin, chart.yValueAxis.valueMax = max(0, lowest - margin), min(100, highest + margin)
    chart.yValueAxis.labelTextFormat = "%.0f" if highest - lowest > 5 else "%.1f"
    chart.yValueAxis.maximumTicks = 6
    chart.xValueAxis.valueMin, chart.xValueAxis.valueMax = 0, len(history)
    chart.xValueAxis.valueStep = max(1, len(history) // 10)
    chart.xValueAxis.labelTextFormat = "%d"
    for axis in (chart.xValueAxis, chart.yValueAxis):
        axis.labels.fontName, axis.labels.fontSize = FONT, 7
        axis.strokeColor = GREY
    chart.yValueAxis.visibleGrid, chart.yValueAxis.gridStrokeColor = True, colors.HexColor("#dddddd")
    drawing.add(String(drawing.width / 2, 2, "Epoch", fontName=FONT, fontSize=7, textAnchor="middle"))
    drawing.add(_legend([(color, name) for name, (_, color, _, _) in lines.items()], drawing))
    return drawing


def channels_chart(record: Record) -> Drawing:
    """The output channels of each layer before and after pruning."""
    layers = record["pruning"]["layers"]
    widths = {when: [layer[f"channels_{when.lower()}"] for layer in layers] for when in ("Before", "After")}
    return widths_chart([layer["name"] for layer in layers], widths)


def widths_chart(layers: list[str], widths: dict[str, list[int]]) -> Drawing:
    """The output channels of each layer but the last, whose outputs are the classes, side by side."""
    drawing, chart = _canvas(VerticalBarChart(), height=78 * mm, title="Output channels", bottom=30 * mm)
    chart.data = [channels[:-1] for channels in widths.values()]
    chart.categoryAxis.categoryNames = layers[:-1]
    labels, crowded = chart.categoryAxis.labels, len(layers) > 30
    labels.angle, labels.boxAnchor, labels.dx, labels.dy = (90, "e", 0, -6) if crowded else (60, "ne", 3, -2)
    chart.valueAxis.valueMin, chart.valueAxis.valueMax = 0, 1.1 * max(max(row) for row in chart.data)
    chart.valueAxis.visibleGrid, chart.valueAxis.gridStrokeColor = True, colors.HexColor("#dddddd")
    chart.groupSpacing, chart.barSpacing = 4, 0
    colours = (DARK, LIGHT) if len(widths) == 2 else (colors.white, DARK, LIGHT)
    for number, color in enumerate(colours):
        chart.bars[number].fillColor = color
        chart.bars[number].strokeColor, chart.bars[number].strokeWidth = GREY if color == colors.white else None, 0.4
    for axis in (chart.categoryAxis, chart.valueAxis):
        axis.labels.fontName, axis.labels.fontSize = FONT, 6.5
        axis.strokeColor = GREY
    legend = _legend(list(zip(colours, widths)), drawing)
    if len(widths) > 2:
        legend.strokeColor, legend.strokeWidth = GREY, 0.4  # or the white would not be seen
    drawing.add(legend)
    return drawing


def differences_chart(rows: list[tuple[str, float, list[float]]]) -> Drawing:
    """Differences of accuracy with their intervals, one below the other: label, points, interval in points."""
    left, line = 66 * mm, 7 * mm
    drawing, chart = _canvas(LinePlot(), height=16 * mm + line * len(rows), title="")
    chart.x, chart.width = left, drawing.width - left - 4 * mm
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
    chart.xValueAxis.labels.fontName, chart.xValueAxis.labels.fontSize = FONT, 7
    chart.xValueAxis.strokeColor = GREY
    chart.yValueAxis.valueMin, chart.yValueAxis.valueMax = 0, len(rows)
    chart.yValueAxis.visible = False
    for (label, _, _), y in zip(rows, heights):
        height = chart.y + chart.height * y / len(rows) - 2
        drawing.add(String(0, height, label, fontName=FONT, fontSize=7))
    middle = chart.x + chart.width / 2
    caption = "Difference in held-out accuracy with its 95% interval (percentage points)"
    drawing.add(String(middle, 2, caption, fontName=FONT, fontSize=7, textAnchor="middle"))
    return drawing


def _canvas(chart: Any, height: float, title: str, bottom: float = 10 * mm) -> tuple[Drawing, Any]:
    drawing = Drawing(WIDTH, height)
    chart.x, chart.y = 10 * mm, bottom
    chart.width, chart.height = WIDTH - 14 * mm, height - bottom - 9 * mm
    drawing.add(chart)
    drawing.add(String(0, height - 9, title, fontName=FONT, fontSize=7))
    return drawing, chart


def _legend(entries: list[tuple[Any, str]], drawing: Drawing) -> Legend:
    legend = Legend()
    legend.colorNamePairs = entries
    legend.x, legend.y = drawing.width, drawing.height
    legend.boxAnchor = "ne"
    legend.columnMaximum = 1
    legend.alignment = "right"
    legend.fontName, legend.fontSize = FONT, 7
    legend.dx = legend.dy = 6
    legend.deltax = 12
    legend.dxTextSpace = 4
    legend.strokeWidth = 0
    legend.strokeColor = None
    return legend
