"""The PDF of the sweep over ratios, made from its record alone."""

from __future__ import annotations

from reportlab.graphics.shapes import Drawing
from reportlab.platypus import Flowable, Spacer

from cleanai.report.curves import Panel, curves_chart
from cleanai.report.drawing import WIDTH
from cleanai.report.page import build_pdf, pairs, section, table, text
from cleanai.report.sweep_text import (
    COSTS,
    chosen_rows,
    criteria,
    criteria_groups,
    explanation,
    heading,
    points_of,
    removed_percent,
    sweep_rows,
)
from cleanai.report.wording import Record, calibrated_on_train, counted, origin_lines, prepared_with

_UNITS = {"parameters": ("M", 1e6), "macs": ("G", 1e9)}
_STAGES = {"pruned": "pruned", "fine_tuned": "fine-tuned"}


def pdf_sweep(record: Record) -> bytes:
    """The sweep as the bytes of a PDF."""
    config, machine = record["config"], record["environment"]
    training = f"{counted(config['epochs'], 'epoch')} at each ratio, peak learning rate {config['lr']:g}"
    kind = "training" if calibrated_on_train(record) else "test"
    settings = [
        ("Dataset", origin_lines({"dataset": record["dataset"]})[0].split(": ", 1)[1]),
        ("Original network", prepared_with(record)),
        ("Ratios", ", ".join(f"{100 * ratio:g}%" for ratio in config["ratios"])),
        ("Fine-tuning", training if config["epochs"] else "none"),
        ("Calibration", f"at most {config['calibration_batches']} x {config['batch_size']} {kind} images"),
        ("Repair", f"at most {config['repair_batches']} x {config['batch_size']} training images"),
        ("Seed", str(config["seed"])),
        ("Device", f"{machine['device']}, {machine['precision']}; PyTorch {machine['torch']}"),
    ]
    tables: list[Flowable] = []
    for names in criteria_groups(record):
        widths = [WIDTH * 0.16, *[WIDTH * 0.84 / len(names)] * len(names)]
        tables += [table(sweep_rows(record, names), widths), Spacer(1, 6)]
    of_scripts = table(chosen_rows(record), [WIDTH * share for share in (0.43, 0.19, 0.19, 0.19)])
    story = [
        text(record["answer"]),
        *section("Accuracy over what was removed", sweep_chart(record)),
        *section(
            heading(record),
            *tables,
            *([of_scripts, Spacer(1, 6)] if record["chosen"] else []),
            text(explanation(record)),
        ),
        *section("Settings and machine", pairs(settings)),
    ]
    return build_pdf(record["scenario"], "How far can it be pruned?", story)


def sweep_chart(record: Record) -> Drawing:
    """Accuracy over the parameters and over the FLOPs that were removed, side by side."""
    stars = [
        (f"{network['criterion']}, {_STAGES[network['stage']]}", network["criterion"], network["stage"] != "pruned")
        for network in record["chosen"]
    ]
    return curves_chart([_panel(record, cost) for cost in COSTS], record["original"]["accuracy_percent"], stars)


def _panel(record: Record, cost: str) -> Panel:
    original, (unit, scale) = record["original"], _UNITS[cost]

    def place(network: Record) -> tuple[float, float]:
        return removed_percent(network, original, cost), network["accuracy_percent"]

    return Panel(
        caption=f"{COSTS[cost]} removed (%); below: remaining ({unit})",
        curves={name: [place(original), *map(place, points_of(record, name))] for name in criteria(record)},
        stars=[(n["criterion"], n["stage"] != "pruned", *place(n)) for n in record["chosen"]],
        label=lambda removed: f"{removed:.0f}\n{original[cost] * (1 - removed / 100) / scale:#.3g}",
    )
