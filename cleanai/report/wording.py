"""Phrases that several tables and reports share, made from a record alone."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any, Dict

from cleanai.runtime.methods import METHODS

Record = Dict[str, Any]

STAGES = {"original": "Original (FT)", "pruned": "After Pruning", "fine_tuned": "After Pruning+FT"}
WIDTH = 100  # columns of a table


def method_title(method: str) -> str:
    """The name of a method in tables and reports."""
    return METHODS[method].title


def wrapped(text: str) -> str:
    """Prose wrapped to the terminal, at most to the width of the tables."""
    return textwrap.fill(text, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def origin_lines(record: Record) -> list[str]:
    """The images of a result, and for a pruning script the network it started from."""
    dataset = record["dataset"]
    lines = [
        f"Dataset: {dataset['name']}, {dataset['source']}; "
        f"{dataset['train_images']:,} training and {dataset['test_images']:,} test images"
    ]
    if "calibration_images" in dataset:
        lines.append(
            f"Calibration: {dataset['calibration_images']:,} of the test images; "
            f"held-out accuracy is on the other {heldout_images(record):,}"
        )
    if "prepared_with" in record:
        lines.append(f"Original network: {prepared_with(record)}")
    return lines


def heldout_images(record: Record) -> int:
    """The number of test images that were not used for calibration."""
    return record["dataset"]["test_images"] - record["dataset"]["calibration_images"]


def prepared_with(record: Record) -> str:
    """How the network that a pruning script started from was made."""
    config = record["prepared_with"]
    weights = {"imagenet": "ImageNet weights", "none": "random weights"}.get(config["weights"])
    if weights is None:
        weights = f"{config['weights']} ({config['weights_sha256'][:8]}…)"
    samples = f" on {config['train_samples']:,} images" if config["train_samples"] else ""
    return f"from {weights}, {counted(config['epochs'], 'epoch')}{samples}, seed {config['seed']}"


def exported_as(export: Record) -> str:
    """The properties of an exported network."""
    return (
        f"opset {export['opset']}, {export['size_mib']:.2f} MB, "
        f"largest difference from PyTorch's outputs {export['largest_difference']:.1e}"
    )


def timing_lines(record: Record) -> list[str]:
    """How the times of networks were taken on a GPU: a sentence, or none."""
    how = record["models"]["original"].get("latency_by")
    return [f"Inference time: one image, {how}. Throughput: batches of 128, without a graph."] if how else []


def requested_shares(config: Record) -> str:
    """The shares that were to be removed."""
    parameters, macs = config["ratio"], config["macs_ratio"]
    if parameters == macs:
        return f"{100 * parameters:g}% of the parameters and of the FLOPs"
    shares = ((parameters, "parameters"), (macs, "FLOPs"))
    return " and ".join(f"{100 * share:g}% of the {name}" for share, name in shares if share is not None)


def repair_stages(pruning: Record) -> str:
    """The accuracy right after pruning, and after each part of the repair."""
    stages = [
        ("accuracy_raw_percent", "as cut"),
        ("accuracy_recalibrated_percent", "with batch norm recalibrated"),
        ("accuracy_reconstructed_percent", "with layers reconstructed"),
    ]
    return ", ".join(f"{pruning[key]:.2f}% {text}" for key, text in stages if key in pruning)


def counted(number: int, noun: str) -> str:
    """For example "1 epoch" or "30 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    """For example "A, B and C"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def row_text(values: list[str], widths: list[int]) -> str:
    """A row of a table: the first value to the left, the others to the right of their columns."""
    cells = [f"{values[0]:<{widths[0]}}", *(f"{value:>{width}}" for value, width in zip(values[1:], widths[1:]))]
    return "".join(cells).rstrip()


def table_text(rows: list[list[str]], widths: list[int]) -> list[str]:
    """A table whose first row is its heading."""
    heading, *lines = (row_text(row, widths) for row in rows)
    return [heading, "-" * WIDTH, *lines, "-" * WIDTH]
