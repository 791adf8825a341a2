"""The PDF of a pruning script, made from its record alone."""
from __future__ import annotations

from pathlib import Path

from reportlab.platypus import Spacer, Table

from cleanai.charts import WIDTH, accuracy_chart, channels_chart
from cleanai.files import write_bytes
from cleanai.layout import build_pdf, pairs, section, table, text, warning
from cleanai.tables import (
    MODELS,
    TITLES,
    Record,
    asked_for,
    comparison_rows,
    counted,
    exported_as,
    prepared_with,
    repair_stages,
    summary_rows,
)


def write_report(path: Path, record: Record) -> None:
    """Write the report of a pruning script as a PDF."""
    write_bytes(path, pdf_report(record))


def pdf_report(record: Record) -> bytes:
    """The report of a pruning script as the bytes of a PDF."""
    method = TITLES[record["method"]].title().replace("Wanda", "WANDA")
    story = [
        text(_what_was_done(record)),
        *(warning(content) for content in record.get("warnings", [])),
        *section("Result", _comparison(record)),
        *section("Summary", pairs(summary_rows(record), numbers=True)),
        *section(
            "Accuracy over the epochs of fine-tuning",
            accuracy_chart(record),
            Spacer(1, 4),
            text(_accuracy_note(record)),
        ),
        *section("Channels per layer, before and after pruning", channels_chart(record)),
        *section("What each pruning step removed", _steps(record)),
        *section("Configuration", pairs(_configuration(record), abreast=2)),
        *section("Dataset and machine", pairs(_provenance(record))),
    ]
    return build_pdf(record["scenario"], method, story)


def _comparison(record: Record) -> Table:
    rows = [["Metric", *MODELS.values()], *([label, *values] for label, values in comparison_rows(record))]
    latencies = [record["models"][name]["latency_ms"] for name in MODELS]
    for key in ("p50", "p90", "p99"):
        rows.append([f"Inference time, {key} (ms)", *(f"{latency[key]:.2f}" for latency in latencies)])
    return table(rows, [WIDTH * 0.4, *[WIDTH * 0.2] * 3])


def _steps(record: Record) -> Table:
    rows = [["Step", "Parameters: asked (%)", "removed (%)", "FLOPs: asked (%)", "removed (%)"]]
    keys = ("parameters_asked_percent", "parameters_removed_percent", "macs_asked_percent", "macs_removed_percent")
    for number, step in enumerate(record["pruning"]["steps"], 1):
        rows.append([str(number), *("-" if step[key] is None else f"{step[key]:.2f}" for key in keys)])
    return table(rows, [WIDTH * share for share in (0.1, 0.27, 0.18, 0.27, 0.18)])


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
    rows = [
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
    if "export" in record:
        export = record["export"]
        timed = f"timed in float32 by ONNX Runtime {export['onnxruntime']} and by PyTorch on {export['device']}"
        threads = counted(export["cpu_threads"], "thread")
        rows.append(("ONNX", f"{export['file']}: {exported_as(export)}; {timed}, {threads}"))
    return rows


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
