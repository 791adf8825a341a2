"""The PDF of a pruning script, made from its record alone."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import reportlab
from reportlab.lib import colors
from reportlab.lib.enums import TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import KeepTogether, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from cleanai.charts import BOLD, DARK, FONT, GREY, MARGIN, PADDING, WIDTH, accuracy_chart, channels_chart
from cleanai.checkpoints import write_bytes
from cleanai.tables import (
    MODELS,
    TITLES,
    Record,
    asked_for,
    comparison_rows,
    counted,
    prepared_with,
    repair_stages,
    summary_rows,
)

_TEXT = ParagraphStyle("text", fontName=FONT, fontSize=8.5, leading=12)
_CELL = ParagraphStyle("cell", parent=_TEXT, fontSize=8, leading=10.5)
_NUMBER = ParagraphStyle("number", parent=_CELL, alignment=TA_RIGHT)
_TITLE = ParagraphStyle("title", parent=_TEXT, fontName=BOLD, fontSize=17, leading=21, textColor=DARK)
_WARNING = ParagraphStyle("warning", parent=_TEXT, fontName=BOLD, spaceBefore=5, textColor=colors.HexColor("#b00020"))
_HEADING = ParagraphStyle("heading", parent=_TITLE, fontSize=11, leading=14, spaceBefore=10)


def write_report(path: Path, record: Record) -> None:
    """Write the report of a pruning script as a PDF."""
    write_bytes(path, pdf_report(record))


def pdf_report(record: Record) -> bytes:
    """The report of a pruning script as the bytes of a PDF."""
    for name in (FONT, BOLD):
        pdfmetrics.registerFont(TTFont(name, str(Path(reportlab.__file__).parent / "fonts" / f"{name}.ttf")))
    file = io.BytesIO()
    method = TITLES[record["method"]].title().replace("Wanda", "WANDA")
    document = SimpleDocTemplate(
        file,
        pagesize=A4,
        leftMargin=MARGIN,
        rightMargin=MARGIN,
        topMargin=MARGIN,
        bottomMargin=MARGIN,
        title=f"{record['scenario']}: {method}",
        author="CleanAI",
    )
    story = [
        Paragraph(method, _TITLE),
        Paragraph(_escaped(_what_was_done(record)), _TEXT),
        *(Paragraph(_escaped(f"Warning: {text}"), _WARNING) for text in record.get("warnings", [])),
        *_section("Result", _comparison(record)),
        *_section("Summary", _pairs(summary_rows(record), numbers=True)),
        *_section(
            "Accuracy over the epochs of fine-tuning",
            accuracy_chart(record),
            Spacer(1, 4),
            Paragraph(_accuracy_note(record), _TEXT),
        ),
        *_section("Channels per layer, before and after pruning", channels_chart(record)),
        *_section("What each pruning step removed", _steps(record)),
        *_section("Configuration", _pairs(_configuration(record), abreast=2)),
        *_section("Dataset and machine", _pairs(_provenance(record))),
    ]
    document.build(story, onFirstPage=_footer(record), onLaterPages=_footer(record))
    return file.getvalue()


def _section(heading: str, *content: Any) -> list[Any]:
    return [KeepTogether([Paragraph(heading, _HEADING), Spacer(1, 4), *content])]


def _footer(record: Record) -> Any:
    def draw(canvas: Any, document: Any) -> None:
        canvas.setFont(FONT, 7)
        canvas.setFillColor(GREY)
        canvas.drawString(MARGIN + PADDING, MARGIN / 2, record["scenario"])
        canvas.drawRightString(A4[0] - MARGIN - PADDING, MARGIN / 2, f"Page {document.page}")

    return draw


def _comparison(record: Record) -> Table:
    rows = [["Metric", *MODELS.values()], *([label, *values] for label, values in comparison_rows(record))]
    latencies = [record["models"][name]["latency_ms"] for name in MODELS]
    for key in ("p50", "p90", "p99"):
        rows.append([f"Inference time, {key} (ms)", *(f"{latency[key]:.2f}" for latency in latencies)])
    return _table(rows, [WIDTH * 0.4, *[WIDTH * 0.2] * 3])


def _steps(record: Record) -> Table:
    rows = [["Step", "Parameters: asked (%)", "removed (%)", "FLOPs: asked (%)", "removed (%)"]]
    keys = ("parameters_asked_percent", "parameters_removed_percent", "macs_asked_percent", "macs_removed_percent")
    for number, step in enumerate(record["pruning"]["steps"], 1):
        rows.append([str(number), *("-" if step[key] is None else f"{step[key]:.2f}" for key in keys)])
    return _table(rows, [WIDTH * share for share in (0.1, 0.27, 0.18, 0.27, 0.18)])


def _table(rows: list[list[str]], widths: list[float]) -> Table:
    rows = [[_escaped(cell) for cell in row] for row in rows]
    rows[0] = [f"<font name='{BOLD}' color='white'>{cell}</font>" for cell in rows[0]]
    cells = [[Paragraph(cell, _NUMBER if column else _CELL) for column, cell in enumerate(row)] for row in rows]
    style = [
        ("BACKGROUND", (0, 0), (-1, 0), DARK),
        ("ROWBACKGROUNDS", (0, 1), (-1, -1), [colors.white, colors.HexColor("#f1f4f8")]),
        ("LINEBELOW", (0, -1), (-1, -1), 0.6, DARK),
        ("TOPPADDING", (0, 0), (-1, -1), 2),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 3),
    ]
    return Table(cells, colWidths=widths, style=TableStyle(style), repeatRows=1)


def _pairs(rows: list[tuple[str, str]], numbers: bool = False, abreast: int = 1) -> Table:
    """A table of labels and values, `abreast` of them in a row, to be read downwards."""
    height = -(-len(rows) // abreast)
    rows = [*rows, *[("", "")] * (height * abreast - len(rows))]
    cells = [
        [
            Paragraph(_escaped(text), style)
            for label, value in rows[line::height]
            for text, style in ((label, _CELL), (value, _NUMBER if numbers else _CELL))
        ]
        for line in range(height)
    ]
    style = [
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LINEBELOW", (0, 0), (-1, -1), 0.25, colors.HexColor("#cccccc")),
        ("TOPPADDING", (0, 0), (-1, -1), 1.5),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 2.5),
    ]
    widths = [WIDTH * 0.4 / abreast, WIDTH * (0.2 if numbers else 0.6) / abreast] * abreast
    return Table(cells, colWidths=widths, style=TableStyle(style), hAlign="LEFT")


def _configuration(record: Record) -> list[tuple[str, str]]:
    config = {**record["config"], "train_samples": record["config"]["train_samples"] or "all"}
    names = {
        "ratio": "Ratio of parameters",
        "macs_ratio": "Ratio of FLOPs",
        "lr": "Learning rate (peak)",
        "fine_tuned_model": "Fine-tuned model (SHA-256)",
    }
    return [(names.get(key, key.replace("_", " ").capitalize()), str(value)) for key, value in config.items()]


def _provenance(record: Record) -> list[tuple[str, str]]:
    dataset, environment = record["dataset"], record["environment"]
    device = f"{environment['device_type']}, {environment['device']}, {environment['cpu_threads']} threads"
    packages = ("torch", "torchvision", "torch-pruning", "thop", "cleanai")
    return [
        ("Original network", prepared_with(record)),
        ("Dataset", f"{dataset['name']}, {dataset['source']}"),
        ("Training images", f"{dataset['train_images']:,}"),
        (
            "Test images",
            f"{dataset['test_images']:,}, of which {dataset['calibration_images']:,} were used to measure channels "
            "(the held-out accuracy is that on the others)",
        ),
        ("Device", device),
        ("Precision", f"{environment['precision']} for training and accuracy, float32 for inference times"),
        ("System", f"{environment['system']}, Python {environment['python']}"),
        ("Packages", ", ".join(f"{package} {environment[package]}" for package in packages)),
    ]


def _what_was_done(record: Record) -> str:
    config, dataset = record["config"], record["dataset"]
    return (
        f"{record['scenario']}: {asked_for(config)} removed in "
        f"{counted(config['steps'], 'step')}, then {counted(config['epochs'], 'epoch')} of fine-tuning on "
        f"{dataset['train_images']:,} images of {dataset['name']} ({dataset['source']}). "
        f"Original network: {prepared_with(record)}."
    )


def _accuracy_note(record: Record) -> str:
    models = record["models"]
    return (
        f"Test accuracy: {models['original']['accuracy_percent']:.2f}% before pruning; after it "
        f"{repair_stages(record['pruning'])}: epoch 0 of the curve; {models['fine_tuned']['accuracy_percent']:.2f}% "
        "after fine-tuning. Training accuracy is measured on augmented images while the network learns."
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
