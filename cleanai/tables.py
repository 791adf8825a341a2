"""The printed tables, made from a record alone."""
from __future__ import annotations

from typing import Any


def preparation_table(record: dict[str, Any]) -> str:
    """The FINE-TUNING RESULTS table of the preparing script."""
    before, after = record["models"]["before"], record["models"]["after"]
    rows = [
        ("Accuracy (%)", "{:.2f}", "accuracy_percent"),
        ("Loss", "{:.4f}", "loss"),
        ("Total Parameters", "{:,}", "parameters"),
        ("Trainable Parameters", "{:,}", "trainable_parameters"),
    ]
    gain = after["accuracy_percent"] - before["accuracy_percent"]
    return "\n".join(
        [
            "FINE-TUNING RESULTS - COMPARISON TABLE",
            "=" * 80,
            f"{'Metric':<31}{'Before Fine-Tuning':<26}{'After Fine-Tuning'}",
            "-" * 80,
            *(f"{label:<30}{form.format(before[key]):>20}{form.format(after[key]):>26}" for label, form, key in rows),
            "-" * 80,
            f"✓ Accuracy Improvement: {gain:+.2f}%",
        ]
    )


def dataset_line(record: dict[str, Any]) -> str:
    """One line on the images a result was measured with."""
    dataset = record["dataset"]
    return (
        f"Dataset: {dataset['name']}, {dataset['source']}; "
        f"{dataset['train_images']:,} training and {dataset['test_images']:,} test images"
    )
