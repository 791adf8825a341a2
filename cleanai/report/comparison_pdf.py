"""The PDF of the comparison of the methods, made from its record alone."""

from __future__ import annotations

from reportlab.platypus import Spacer

from cleanai.report.charts import WIDTH, differences_chart, widths_chart
from cleanai.report.comparison_text import (
    DIFFERENCE_COLUMNS,
    any_run,
    difference_name,
    difference_rows,
    explanation,
    original_line,
    side_by_side_rows,
)
from cleanai.report.page import build_pdf, section, table, text
from cleanai.report.wording import Record, counted, listed, method_title, origin_lines


def pdf_comparison(record: Record) -> bytes:
    """The comparison as the bytes of a PDF: the answer, the tables, the differences and the widths drawn."""
    titles = [method_title(method) for method in record["runs"]]
    runs = {method_title(method): run for method, run in record["runs"].items() if run}
    networks = [f"{title}, {stage}" for stage in ("pruned", "fine-tuned") for title in titles]
    rows = [["Metric", "Original", *networks], *([label, *values] for label, values in side_by_side_rows(record))]
    shares = [0.29, 0.15, *[0.56 / len(networks)] * len(networks)]
    drawn = [(difference_name(d), d["difference_points"], d["interval_points"]) for d in record["differences"]]
    differences = table(
        [DIFFERENCE_COLUMNS, *difference_rows(record)], [WIDTH * s for s in (0.38, 0.1, 0.16, 0.13, 0.08, 0.15)]
    )
    layers = [run["pruning"]["layers"] for run in runs.values()]
    widths = {"Original": [layer["channels_before"] for layer in layers[0]]}
    widths.update({name: [layer["channels_after"] for layer in cut] for name, cut in zip(runs, layers)})
    story = [
        *(text(sentence) for sentence in record["answer"]),
        *section("Side by side", table(rows, [WIDTH * share for share in shares])),
        *section("Are the differences significant?", differences, Spacer(1, 4), text(explanation(record))),
        *section("The differences with their intervals", differences_chart(drawn)),
        *section("Channels per layer", widths_chart([layer["name"] for layer in layers[0]], widths)),
        *section("Origin", *(text(line) for line in _origin(record, runs))),
    ]
    return build_pdf(record["scenario"], f"{listed(titles)} compared", story)


def _origin(record: Record, runs: dict[str, Record]) -> list[str]:
    lines = [*origin_lines({"dataset": any_run(record)["dataset"]}), original_line(record)]
    for title, run in runs.items():
        config, machine = run["config"], run["environment"]
        settings = f"{counted(config['steps'], 'step')}, {counted(config['epochs'], 'epoch')}, seed {config['seed']}"
        lines.append(
            f"{title}: {settings}, {run['dataset']['train_images']:,} training images; {machine['device']}, "
            f"{machine['precision']}, PyTorch {machine['torch']}; record {run['scenario']}.json"
        )
    return [*lines, *record["remarks"]]
