"""Charts of one run: epochs, times, layers; and differences between networks."""

from __future__ import annotations

import math

from reportlab.graphics.charts.barcharts import VerticalBarChart
from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import stringWidth

from cleanai.report.drawing import (
    DARK,
    GREY,
    LIGHT,
    ORIGINAL,
    STYLES,
    WIDTH,
    Box,
    Points,
    add_legend,
    axes_of,
    plot_lines,
    style_axes,
)
from cleanai.report.fonts import FONT
from cleanai.report.wording import Record


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
        chart = axes_of(drawing, LinePlot(), Box(left, 0, width, drawing.height - 5 * mm), title, "Epoch")
        plot_lines(chart, list(lines.values()), (*STYLES[:2], ORIGINAL))
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
    add_legend(drawing, chart, lines)
    return drawing


def latency_chart(quantiles_ms: dict[str, list[float]]) -> Drawing:
    """The share of calls below a time, from the quantiles of each of three networks, by name."""
    drawing = Drawing(WIDTH, 58 * mm)
    box = Box(0, 0, WIDTH, drawing.height - 5 * mm)
    chart = axes_of(drawing, LinePlot(), box, "Calls below this time (%)", "Time for one image (ms)")
    lines = [
        [(value, 100 * number / (len(values) + 1)) for number, value in enumerate(values, 1)]
        for values in quantiles_ms.values()
    ]
    plot_lines(chart, lines, (ORIGINAL, (LIGHT, None, None), (DARK, None, None)))
    chart.yValueAxis.valueMin, chart.yValueAxis.valueMax, chart.yValueAxis.valueStep = 0, 100, 25
    chart.yValueAxis.labelTextFormat = "%d"
    fastest, slowest = min(map(min, quantiles_ms.values())), max(map(max, quantiles_ms.values()))
    chart.xValueAxis.valueMin, chart.xValueAxis.valueMax = 0.95 * fastest, 1.02 * slowest
    chart.xValueAxis.maximumTicks = 10
    spread = slowest - fastest
    digits = 4 if slowest < 0.1 else 2 if spread < 1 else 1 if spread < 8 else 0
    chart.xValueAxis.labelTextFormat = f"%.{digits}f"
    add_legend(drawing, chart, quantiles_ms)
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
        chart = axes_of(drawing, VerticalBarChart(), Box(0, y, WIDTH, panel + 10 * mm), title)
        chart.data = list(rows.values())
        chart.categoryAxis.categoryNames = layers if lowest else [""] * len(layers)
        labels = chart.categoryAxis.labels
        labels.angle, labels.boxAnchor, labels.dx, labels.dy = (90, "e", 0, -6) if crowded else (60, "ne", 3, -2)
        labels.fontSize = label_size
        chart.categoryAxis.tickDown = 0
        chart.valueAxis.valueMin, chart.valueAxis.valueMax = 0, 1.1 * max(max(row) for row in chart.data) or 1
        chart.valueAxis.maximumTicks = 6
        chart.groupSpacing, chart.barSpacing = 4, 0
        fills = (colors.white, DARK) if len(rows) == 2 else (colors.white, LIGHT, DARK, *(s[0] for s in STYLES[2:]))
        for row, color in zip(range(len(rows)), fills):
            chart.bars[row].fillColor = color
            chart.bars[row].strokeColor, chart.bars[row].strokeWidth = GREY, 0.4
    add_legend(drawing, chart, rows)
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
            plot_lines(plot, [points, [(mark, 0), (mark, 100)]], ((DARK, None, None), (LIGHT, (3, 2), None)))
            for axis in (plot.xValueAxis, plot.yValueAxis):
                axis.valueMin, axis.valueMax, axis.valueStep, axis.labelTextFormat = 0, 100, 50, "%d"
            style_axes(plot.xValueAxis, plot.yValueAxis)
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
    box = Box(left - 10 * mm, 0, WIDTH - left + 8 * mm, drawing.height)
    chart = axes_of(drawing, LinePlot(), box, "", caption)
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
