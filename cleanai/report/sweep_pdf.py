"""The sweep as text, CSV and PDF, made from its record alone."""
from __future__ import annotations

import csv
import io
import math
import textwrap
from typing import Any

from reportlab.graphics.charts.lineplots import LinePlot
from reportlab.graphics.shapes import Drawing, Line, String
from reportlab.graphics.widgets.markers import makeMarker
from reportlab.lib import colors
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.platypus import Spacer

from cleanai.report.charts import DARK, FONT, GREY, LIGHT, LINES, WIDTH
from cleanai.report.comparison import METHODS
from cleanai.report.page import build_pdf, pairs, section, table, text
from cleanai.report.run_text import MODELS, Record, counted, origin_lines, prepared_with
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.scenario import Scenario

WITHIN = 1  # points of accuracy that the answer lets go
_WIDTH = 104
# Told apart without colours, too: by their markers and dashes.
_STYLES = {
    "Neuron Coverage": (DARK, None, "FilledCircle"),
    "WANDA": (LIGHT, None, "FilledSquare"),
    "L2 magnitude": (colors.HexColor("#3a9a5b"), (5, 2), "FilledTriangle"),
    "random choice": (GREY, (1, 2), "Circle"),
}
_STAGES = {"pruned": "pruned", "fine_tuned": "fine-tuned"}
_COSTS = {"parameters": ("Parameters", "M", 1e6), "macs": ("Multiply-accumulates", "G", 1e9)}


def chosen_networks(scenario: Scenario, fine_tuned_model: str) -> list[dict[str, Any]]:
    """The networks that the pruning scripts made of the same fine-tuned model, as far as their records are there.

    Each with `criterion`, `stage` ("pruned" or "fine_tuned"), `parameters`, `macs`, and its accuracy on the test images
    that its script held out.
    """
    chosen = []
    for method, criterion in METHODS.items():
        part = Scenario(scenario.number, scenario.model, scenario.dataset, scenario.checkpoints_dir, method)
        record = read_record(part.record)
        if record and record["config"].get("fine_tuned_model") == fine_tuned_model:
            for stage in _STAGES:
                model = record["models"][stage]
                costs = {cost: model[cost] for cost in _COSTS}
                accuracy = model["accuracy_heldout_percent"]
                chosen.append({"criterion": criterion, "stage": stage, "accuracy_percent": accuracy, **costs})
    return chosen


def sweep_answer(record: Record) -> str:
    """How far one can go, in a sentence: up to which ratio each criterion stays near the original at every ratio."""
    original, epochs = record["original"]["accuracy_percent"], record["config"]["epochs"]
    ratios = record["config"]["ratios"]
    reach: dict[float, list[str]] = {}
    for name in _STYLES:
        near = [original - point["accuracy_percent"] <= WITHIN for point in _points(record, name)]
        count = [*near, False].index(False)
        reach.setdefault(ratios[count - 1] if count else 0, []).append(name)
    how = f"With {counted(epochs, 'epoch')} of fine-tuning at each ratio" if epochs else "Without fine-tuning"
    what = f"within {counted(WITHIN, 'point')} of the original network's {original:.2f}% accuracy"
    (furthest, best), *others = sorted(reach.items(), reverse=True)
    if not furthest:
        return f"{how}, no criterion stays {what}, not even with {100 * ratios[0]:g}% removed."
    limit = ", the most that was tried," if furthest == ratios[-1] else ""
    rest = [
        f"; {_listed(names)} {f'{100 * ratio:g}%' if ratio else f'not even {100 * ratios[0]:g}%'}"
        for ratio, names in others
    ]
    return (
        f"{how}, {_listed(best)} can remove {100 * furthest:g}% of the parameters and of the multiply-accumulates"
        f"{limit} and stay {what}{''.join(rest)}."
    )


def sweep_text(record: Record) -> str:
    """All that the script prints of a sweep: the answer, the table, and what to know of it."""
    return "\n".join(
        [
            textwrap.fill(record["answer"], _WIDTH),
            "",
            origin_lines({"dataset": record["dataset"]}).splitlines()[0],
            f"Original network: {prepared_with(record)}",
            "",
            f"HOW FAR CAN IT BE PRUNED - {heading(record).upper()}",
            "=" * _WIDTH,
            *_lines(sweep_rows(record), (20, 21, 21, 21, 21)),
            "",
            *(_lines(chosen_rows(record), (40, 24, 26, 14)) if record["chosen"] else []),
            textwrap.fill(explanation(record), _WIDTH),
        ]
    )


def heading(record: Record) -> str:
    """What stands above the table."""
    return f"Accuracy (%), and points against the original network's {record['original']['accuracy_percent']:.2f}"


def sweep_rows(record: Record) -> list[list[str]]:
    """A heading, and a row per ratio: the accuracies by criterion, with what they lost or gained."""
    original = record["original"]["accuracy_percent"]
    rows = [["Removed", *_STYLES]]
    for number, ratio in enumerate(record["config"]["ratios"]):
        accuracies = [_points(record, name)[number]["accuracy_percent"] for name in _STYLES]
        rows.append([f"{100 * ratio:g}%", *(f"{value:.2f} ({value - original:+.2f})" for value in accuracies)])
    return rows


def chosen_rows(record: Record) -> list[list[str]]:
    """A heading, and a row for each network of the pruning scripts."""
    rows = [["Network of the pruning scripts", *(f"{title} (%)" for title, _, _ in _COSTS.values()), "Accuracy (%)"]]
    for network in record["chosen"]:
        changes = [f"{100 * (network[cost] / record['original'][cost] - 1):+.1f}" for cost in _COSTS]
        name = f"{network['criterion']}, {MODELS[network['stage']]}"
        rows.append([name, *changes, f"{network['accuracy_percent']:.2f}"])
    return rows


def explanation(record: Record) -> str:
    """What the accuracies are, and what they do not tell."""
    count, calibration = (record["dataset"][key] for key in ("accuracy_images", "calibration_images"))
    sentences = [
        f"Accuracy is that on {count:,} test images; channels were measured on {calibration:,} others. One point is "
        f"{count / 100:g} images. The answer names the highest ratio up to which all accuracies are that near.",
        "Each criterion removes the same share of the parameters and of the multiply-accumulates, going from ratio to "
        "ratio, with repair after each. It did so once: another seed would give somewhat other numbers, of a "
        "random choice above all.",
    ]
    if record["chosen"]:
        sentences.append("Stars are the networks of the pruning scripts, on the test images that these held out.")
    return " ".join(sentences)


def sweep_csv(record: Record) -> str:
    """A line per network, units in the names of the columns; `stage` tells those of scripts 2 and 3 from the sweep."""
    file = io.StringIO()
    columns = ["criterion", "stage", "ratio", "accuracy_percent", "parameters", "macs"]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerow({"stage": "original", "ratio": 0, **record["original"]})
    writer.writerows({"stage": "sweep", **point} for point in record["points"])
    writer.writerows(record["chosen"])
    return file.getvalue()


def pdf_sweep(record: Record) -> bytes:
    """The sweep as the bytes of a PDF."""
    config, machine = record["config"], record["environment"]
    training = f"{counted(config['epochs'], 'epoch')} at each ratio, peak learning rate {config['lr']:g}"
    settings = [
        ("Dataset", origin_lines({"dataset": record["dataset"]}).splitlines()[0].split(": ", 1)[1]),
        ("Original network", prepared_with(record)),
        ("Ratios", ", ".join(f"{100 * ratio:g}%" for ratio in config["ratios"])),
        ("Fine-tuning", training if config["epochs"] else "none"),
        ("Calibration", f"at most {config['calibration_batches']} x {config['batch_size']} test images"),
        ("Repair", f"at most {config['repair_batches']} x {config['batch_size']} training images"),
        ("Seed", str(config["seed"])),
        ("Device", f"{machine['device']}, {machine['precision']}; PyTorch {machine['torch']}"),
    ]
    own = table(chosen_rows(record), [WIDTH * share for share in (0.37, 0.18, 0.3, 0.15)])
    story = [
        text(record["answer"]),
        *section("Accuracy over what was removed", sweep_chart(record)),
        *section(
            heading(record),
            table(sweep_rows(record), [WIDTH * 0.2] * 5),
            Spacer(1, 6),
            *([own, Spacer(1, 6)] if record["chosen"] else []),
            text(explanation(record)),
        ),
        *section("What this is made of", pairs(settings)),
    ]
    return build_pdf(record["scenario"], "How far can it be pruned?", story)


def sweep_chart(record: Record) -> Drawing:
    """Accuracy over the parameters and over the multiply-accumulates that were removed, side by side."""
    drawing = Drawing(WIDTH, 86 * mm)
    width, left = WIDTH / 2, 9 * mm
    for column, cost in enumerate(_COSTS):
        plot = _panel(record, cost)
        plot.x, plot.y = column * width + left, 13 * mm
        plot.width, plot.height = width - left - 3 * mm, drawing.height - 13 * mm - 16 * mm
        drawing.add(plot)
        title, unit, _ = _COSTS[cost]
        drawing.add(String(plot.x - left, plot.y + plot.height + 7, "Accuracy (%)", fontName=FONT, fontSize=7))
        middle = plot.x + plot.width / 2
        caption = f"{title} removed (%); below: left ({unit})"
        drawing.add(String(middle, 3, caption, fontName=FONT, fontSize=7, textAnchor="middle"))
    _add_legend(drawing, record)
    return drawing


def _panel(record: Record, cost: str) -> LinePlot:
    original, (_, _, scale) = record["original"], _COSTS[cost]

    def place(network: Record) -> tuple[float, float]:
        return 100 * (1 - network[cost] / original[cost]), network["accuracy_percent"]

    plot = LinePlot()
    lines = [[(0, original["accuracy_percent"]), *map(place, _points(record, name))] for name in _STYLES]
    stars = [[place(network)] for network in record["chosen"]]
    furthest = max(x for line in (*lines, *stars) for x, _ in line)
    step = 10 if furthest > 25 else 5
    end = step * math.ceil(furthest / step - 0.1)  # 70.1% is 70% well enough
    plot.data = [[(0, original["accuracy_percent"]), (end, original["accuracy_percent"])], *lines, *stars]
    markers = [(GREY, (4, 3), None), *_STYLES.values()]
    for number, (color, dashes, marker) in enumerate(markers):
        plot.lines[number].strokeColor, plot.lines[number].strokeWidth = color, 0.8 if marker is None else 1.5
        plot.lines[number].strokeDashArray = dashes
        plot.lines[number].symbol = marker and _marker(marker, color)
    for number, network in enumerate(record["chosen"], len(markers)):
        plot.lines[number].symbol = _star(network)
    accuracies = [y for line in plot.data for _, y in line]
    spread = max(accuracies) - min(accuracies)
    mark = next(mark for mark in (1, 2, 5, 10, 20) if spread <= 8 * mark or mark == 20)
    low, high = math.floor(min(accuracies) / mark) * mark, math.ceil((max(accuracies) + mark / 10) / mark) * mark
    plot.yValueAxis.valueMin, plot.yValueAxis.valueMax, plot.yValueAxis.valueStep = low, min(100, high), mark
    plot.yValueAxis.labelTextFormat = "%d"
    plot.yValueAxis.visibleGrid, plot.yValueAxis.gridStrokeColor = True, LINES
    plot.xValueAxis.valueMin, plot.xValueAxis.valueMax, plot.xValueAxis.valueStep = 0, end, step
    plot.xValueAxis.labels.textAnchor = "middle"
    plot.xValueAxis.labelTextFormat = lambda gone: f"{gone:.0f}\n{original[cost] * (1 - gone / 100) / scale:#.3g}"
    for axis in (plot.xValueAxis, plot.yValueAxis):
        axis.labels.fontName, axis.labels.fontSize = FONT, 6.5
        axis.strokeColor = GREY
    return plot


def _add_legend(drawing: Drawing, record: Record) -> None:
    """Two rows at the top: the lines, and the stars."""
    lines = [*_STYLES.items(), ("original network", (GREY, (4, 3), None))]
    x, y = 0.0, drawing.height - 6
    for name, (color, dashes, marker) in lines:
        width = 1.5 if marker else 0.8
        drawing.add(Line(x, y, x + 24, y, strokeColor=color, strokeWidth=width, strokeDashArray=dashes))
        if marker:
            _add_marker(drawing, _marker(marker, color), x + 12, y)
        drawing.add(String(x + 29, y - 2.5, name, fontName=FONT, fontSize=7))
        x += 29 + stringWidth(name, FONT, 7) + 14
    x, y = 0.0, drawing.height - 20
    for network in record["chosen"]:
        _add_marker(drawing, _star(network), x + 12, y)
        name = f"{network['criterion']}, {_STAGES[network['stage']]}"
        drawing.add(String(x + 21, y - 2.5, name, fontName=FONT, fontSize=7))
        x += 21 + stringWidth(name, FONT, 7) + 8


def _add_marker(drawing: Drawing, marker: Any, x: float, y: float) -> None:
    marker.x, marker.y = x, y
    drawing.add(marker)


def _marker(kind: str, color: Any) -> Any:
    filled = color if kind.startswith("Filled") else colors.white
    return makeMarker(kind, size=5, fillColor=filled, strokeColor=color)


def _star(network: Record) -> Any:
    """Filled once it is fine-tuned."""
    color, tuned = _STYLES[network["criterion"]][0], network["stage"] == "fine_tuned"
    filled, edge = (color, colors.black) if tuned else (colors.white, color)
    return makeMarker("FilledStarFive", size=11, fillColor=filled, strokeColor=edge, strokeWidth=0.5 if tuned else 1.2)


def _lines(rows: list[list[str]], widths: tuple[int, ...]) -> list[str]:
    """A table as text, its first row as its heading."""
    lines = [f"{row[0]:<{widths[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:])) for row in rows]
    return [lines[0], "-" * _WIDTH, *lines[1:], "-" * _WIDTH]


def _points(record: Record, name: str) -> list[Record]:
    return [point for point in record["points"] if point["criterion"] == name]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
