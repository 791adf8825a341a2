"""The PDF of the comparison of the methods, made from its record alone."""
from __future__ import annotations

from reportlab.platypus import Spacer

from cleanai.report.charts import WIDTH, differences_chart, widths_chart
from cleanai.report.comparison import METHODS
from cleanai.report.comparison_text import (
    DIFFERENCE_COLUMNS,
    difference_name,
    difference_rows,
    explanation,
    original_line,
    side_by_side_rows,
)
from cleanai.report.page import build_pdf, section, table, text
from cleanai.report.run_text import Record, counted, origin_lines


def pdf_comparison(record: Record) -> bytes:
    """The comparison as the bytes of a PDF: the answer, the tables, the differences and the widths drawn."""
    runs = {METHODS[method]: run for method, run in record["runs"].items() if run}
    networks = [f"{name}, {stage}" for stage in ("pruned", "fine-tuned") for name in METHODS.values()]
    rows = [["Metric", "Original", *networks], *([label, *values] for label, values in side_by_side_rows(record))]
    tested = [d for d in record["differences"] if "p_value" in d]
    drawn = [(difference_name(d), d["difference_points"], d["interval_points"]) for d in tested]
    differences = table(
        [list(DIFFERENCE_COLUMNS), *difference_rows(record)],
        [WIDTH * share for share in (0.44, 0.09, 0.17, 0.1, 0.1, 0.1)],
    )
    layers = [run["pruning"]["layers"] for run in runs.values()]
    widths = {"Original": [layer["channels_before"] for layer in layers[0]]}
    widths.update({name: [layer["channels_after"] for layer in cut] for name, cut in zip(runs, layers)})
    story = [
        *(text(sentence) for sentence in record["answer"]),
        *section("Side by side", table(rows, [WIDTH * share for share in (0.29, 0.15, *[0.14] * 4)])),
        *section("Is the difference more than chance?", differences, Spacer(1, 4), text(explanation(record))),
        *(section("The differences, with their intervals", differences_chart(drawn)) if drawn else []),
        *section("Where the channels went", widths_chart([layer["name"] for layer in layers[0]], widths)),
        *section("What this is made of", *(text(line) for line in _origin(record, runs))),
    ]
    return build_pdf(record["scenario"], "Neuron Coverage and WANDA compared", story)


def _origin(record: Record, runs: dict[str, Record]) -> list[str]:
    lines = [*origin_lines({"dataset": next(iter(runs.values()))["dataset"]}).splitlines(), original_line(record)]
    for name, run in runs.items():
        config, machine = run["config"], run["environment"]
        asked = f"{counted(config['steps'], 'step')}, {counted(config['epochs'], 'epoch')}, seed {config['seed']}"
        lines.append(
            f"{name}: {asked}, {run['dataset']['train_images']:,} training images; {machine['device']}, "
            f"{machine['precision']}, PyTorch {machine['torch']}; record {run['scenario']}.json"
        )
    return [*lines, *record["remarks"]]
