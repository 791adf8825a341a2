"""The PDF of the comparison of the methods, made from its record alone."""

from __future__ import annotations

from reportlab.platypus import Flowable, Spacer

from cleanai.report.charts import differences_chart, widths_chart
from cleanai.report.comparison_text import (
    DIFFERENCE_COLUMNS,
    any_run,
    difference_name,
    difference_rows,
    explanation,
    original_line,
    side_by_side_rows,
    table_columns,
)
from cleanai.report.drawing import WIDTH
from cleanai.report.page import build_pdf, section, table, text, warning
from cleanai.report.wording import Record, counted, listed, method_title, origin_lines

_MOST_COLUMNS = 4  # of networks, in a table
_MOST_DIFFERENCES = 30  # in a chart


def pdf_comparison(record: Record) -> bytes:
    """The comparison as the bytes of a PDF: the answer, the tables, the differences and the widths drawn."""
    titles = [method_title(method) for method in record["runs"]]
    runs = {method_title(method): run for method, run in record["runs"].items() if run}
    drawn = [(difference_name(d), d["difference_points"], d["interval_points"]) for d in record["differences"]]
    charts = [differences_chart(drawn[i : i + _MOST_DIFFERENCES]) for i in range(0, len(drawn), _MOST_DIFFERENCES)]
    differences = table(
        [DIFFERENCE_COLUMNS, *difference_rows(record)], [WIDTH * s for s in (0.38, 0.1, 0.16, 0.13, 0.08, 0.15)]
    )
    layers = [run["pruning"]["layers"] for run in runs.values()]
    widths = {"Original": [layer["channels_before"] for layer in layers[0]]}
    widths.update({name: [layer["channels_after"] for layer in cut] for name, cut in zip(runs, layers)})
    story = [
        *map(text, record["answer"]),
        *map(warning, record["warnings"]),
        *map(text, record["notes"]),
        *section("Side by side", *_side_by_side(record, titles)),
        *section("Are the differences significant?", differences, Spacer(1, 4), text(explanation(record))),
        *section("The differences with their intervals", *charts),
        *section("Channels per layer", widths_chart([layer["name"] for layer in layers[0]], widths)),
        *section("Origin", *(text(line) for line in _origin(record, runs))),
    ]
    return build_pdf(record["scenario"], f"{listed(titles)} compared", story)


def _side_by_side(record: Record, titles: list[str]) -> list[Flowable]:
    networks = [f"{title}, {stage}" for stage in ("pruned", "fine-tuned") for title in titles]
    rows = [["Metric", "Original", *networks], *([label, *values] for label, values in side_by_side_rows(record))]
    tables: list[Flowable] = []
    for columns in table_columns([1] * len(titles), _MOST_COLUMNS):
        shares = [0.29, 0.15, *[0.56 / len(columns)] * len(columns)]
        shown = [[*row[:2], *(row[1 + number] for number in columns)] for row in rows]
        shown = [row for row in shown if any(row[2:])]  # the summary is of the fine-tuned networks
        tables += [table(shown, [WIDTH * share for share in shares]), Spacer(1, 6)]
    return tables[:-1]


def _origin(record: Record, runs: dict[str, Record]) -> list[str]:
    lines = [*origin_lines({"dataset": any_run(record)["dataset"]}), original_line(record)]
    for title, run in runs.items():
        config, machine = run["config"], run["environment"]
        steps = counted(len(run["pruning"]["steps"]), "step")
        trained = counted(config["epochs"], "epoch") if config["epochs"] else "no fine-tuning"
        settings = f"{steps}, {trained}, seed {config['seed']}"
        lines.append(
            f"{title}: {settings}, {run['dataset']['train_images']:,} training images; {machine['device']}, "
            f"{machine['precision']}, PyTorch {machine['torch']}; record {run['scenario']}.json"
        )
    return [*lines, *record["remarks"]]
