"""The sections of a report on settings, data, machine and files: what it takes to repeat the run."""

from __future__ import annotations

from typing import Any

from cleanai.report.page import small
from cleanai.report.wording import Record, calibrated_on_train, counted, exported_as, prepared_with


def configuration(record: Record) -> list[tuple[str, str]]:
    """The settings of a run, by name."""
    config = {**record["config"], "train_samples": record["config"]["train_samples"] or "all"}
    config = {key: value for key, value in config.items() if value is not None or "ratio" in key}  # None: not asked for
    del config["fine_tuned_model"]  # the section on checkpoints has its SHA-256
    names = {
        "ratio": "Ratio of parameters",
        "macs_ratio": "Ratio of FLOPs",
        "lr": "Learning rate (peak)",
    }
    shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in config.items()}
    return [(names.get(key, key.replace("_", " ").capitalize()), str(value)) for key, value in shown.items()]


def provenance(record: Record) -> list[tuple[str, str]]:
    """Network, images, machine and packages, by name."""
    dataset, environment = record["dataset"], record["environment"]
    device = f"{environment['device_type']}, {environment['device']}, {counted(environment['cpu_threads'], 'thread')}"
    packages = ("torch", "torchvision", "torch-pruning", "thop", "cleanai")
    calibration = f"{dataset['calibration_images']:,}"
    if calibrated_on_train(record):
        heldout = f", all held out; calibration used {calibration} training images"
    else:
        heldout = f", of which {calibration} were used for calibration (held-out accuracy is on the others)"
    rows = [
        ("Original network", prepared_with(record)),
        ("Dataset", f"{dataset['name']}, {dataset['source']}"),
        ("Training images", f"{dataset['train_images']:,}{_per_class(dataset, 'train')}"),
        ("Test images", f"{dataset['test_images']:,}{heldout}{_per_class(dataset, 'test')}"),
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


def checksums(record: Record) -> list[Any]:
    """A line for the digest of each part of the images; none in an older record."""
    digests = {part: record["dataset"].get(f"{part}_sha256") for part in ("train", "test")}  # absent in older records
    return [
        small(f"SHA-256 of the {part.replace('train', 'training')} images: {digest}")
        for part, digest in digests.items()
        if digest
    ]


def _per_class(dataset: Record, part: str) -> str:
    """For example "; 1,000 of each class"; empty for an older record."""
    counts = dataset.get(f"{part}_per_class")
    if not counts:
        return ""
    least, most = min(counts), max(counts)
    if least == most:
        return f"; {least:,} of each class"
    fewest, frequent = (dataset["classes"][counts.index(count)] for count in (least, most))
    return f"; {least:,} ({fewest}) to {most:,} ({frequent}) of a class"


def checkpoints(record: Record) -> list[Any]:
    """A line for each file that the run read or wrote, with its digest."""
    return [small(f"{digest}  {name}") for name, digest in record["checkpoints"].items()]
