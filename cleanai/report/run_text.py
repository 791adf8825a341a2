"""The tables of the scripts, made from a record alone."""
from __future__ import annotations

from typing import Any, Dict

Record = Dict[str, Any]

TITLES = {"Coverage": "NEURON COVERAGE PRUNING", "Wanda": "WANDA PRUNING"}
MODELS = {"original": "Original (FT)", "pruned": "After Pruning", "fine_tuned": "After Pruning+FT"}
RUNTIMES = {"onnx_runtime": "ONNX Runtime, CPU (ms)", "pytorch": "PyTorch, CPU, beside it (ms)"}


def preparation_table(record: Record) -> str:
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
            f"{'Metric':<31}{'Before Fine-Tuning':<26}After Fine-Tuning",
            "-" * 80,
            *(f"{label:<30}{form.format(before[key]):>20}{form.format(after[key]):>26}" for label, form, key in rows),
            "-" * 80,
            f"✓ Accuracy Improvement: {gain:+.2f}%",
        ]
    )


def comparison_rows(record: Record) -> list[tuple[str, list[str]]]:
    """The rows of the comparison: a label, and the values of original, pruned and fine-tuned network."""
    models = [record["models"][name] for name in MODELS]
    exported = record["export"]["latency_ms"] if "export" in record else {}
    return [
        ("Accuracy (%)", [f"{model['accuracy_percent']:.2f}" for model in models]),
        ("Size (MB)", [f"{model['size_mib']:.2f}" for model in models]),
        ("Parameters (M)", [f"{model['parameters'] / 1e6:.2f}" for model in models]),
        ("FLOPs (G)", [f"{model['macs'] / 1e9:.2f}" for model in models]),
        ("Avg Inference Time (ms)", [f"{model['latency_ms']['mean']:.2f}" for model in models]),
        ("Held-out Accuracy (%)", [f"{model['accuracy_heldout_percent']:.2f}" for model in models]),
        ("Throughput, batch 128 (images/s)", [f"{model['throughput_images_per_s']:.0f}" for model in models]),
        *((RUNTIMES[key], [f"{latency[name]['mean']:.2f}" for name in MODELS]) for key, latency in exported.items()),
    ]


def summary_rows(record: Record) -> list[tuple[str, str]]:
    """The rows of the summary: what was saved without a sign, what the accuracy did with one."""
    summary = record["summary"]
    return [
        ("Parameter Reduction", f"{summary['parameter_reduction_percent']:.2f}%"),
        ("Size Reduction", f"{summary['size_reduction_percent']:.2f}%"),
        ("Speedup", f"{summary['speedup']:.2f}x"),
        ("Accuracy Recovery (FT)", f"{summary['accuracy_recovery_points']:+.2f}%"),
        ("Final Accuracy Drop", f"{summary['final_accuracy_drop_points']:+.2f}%"),
        ("FLOPs Reduction", f"{summary['macs_reduction_percent']:.2f}%"),
    ]


def comparison_table(record: Record) -> str:
    """The COMPREHENSIVE COMPARISON TABLE and the Summary of a pruning script, with its warnings under them."""
    original, pruned, fine_tuned = MODELS.values()
    # The scenario's page sets values with a sign or an x one column further right.
    summary = [
        (label, value, 12 if value[0].isdigit() and value.endswith("%") else 13)
        for label, value in summary_rows(record)
    ]
    return "\n".join(
        [
            f"{TITLES[record['method']]} - COMPREHENSIVE COMPARISON TABLE",
            "=" * 100,
            f"{'Metric':<24}{original:>20}{pruned:>23}{fine_tuned:>23}",
            "-" * 100,
            *(f"{label:<34}{values[0]:>10}{values[1]:>23}{values[2]:>23}" for label, values in comparison_rows(record)),
            "-" * 100,
            "",
            "Summary",
            *(f"  {label:<50}{value:>{width}}" for label, value, width in summary),
            *(f"\n!!! WARNING: {warning}" for warning in record.get("warnings", [])),
        ]
    )


def origin_lines(record: Record) -> str:
    """What a result was measured with: the images, and for a pruning script the network it began with."""
    dataset = record["dataset"]
    line = (
        f"Dataset: {dataset['name']}, {dataset['source']}; "
        f"{dataset['train_images']:,} training and {dataset['test_images']:,} test images"
    )
    if "calibration_images" in dataset:
        heldout = dataset["test_images"] - dataset["calibration_images"]
        line += (
            f"\nChannels were measured on {dataset['calibration_images']:,} of the test images; "
            f"held-out accuracy is that on the other {heldout:,}"
        )
    if "prepared_with" in record:
        line += f"\nOriginal network: {prepared_with(record)}"
    return line


def prepared_with(record: Record) -> str:
    """How the network that a pruning script began with was made."""
    config = record["prepared_with"]
    weights = {"imagenet": "ImageNet weights", "none": "random weights"}.get(config["weights"])
    if weights is None:
        weights = f"{config['weights']} ({config['weights_sha256'][:8]}…)"
    samples = f" on {config['train_samples']:,} images" if config["train_samples"] else ""
    return f"from {weights}, {counted(config['epochs'], 'epoch')}{samples}, seed {config['seed']}"


def exported_as(export: Record) -> str:
    """What an exported network is, and how far its outputs are from PyTorch's."""
    return (
        f"opset {export['opset']}, {export['size_mib']:.2f} MB, "
        f"largest difference from PyTorch's outputs {export['largest_difference']:.1e}"
    )


def asked_for(config: Record) -> str:
    """The shares that were to be removed."""
    parameters, macs = config["ratio"], config["macs_ratio"]
    if parameters == macs:
        return f"{100 * parameters:g}% of the parameters and of the arithmetic"
    shares = ((parameters, "parameters"), (macs, "arithmetic"))
    return " and ".join(f"{100 * share:g}% of the {name}" for share, name in shares if share is not None)


def repair_stages(pruning: Record) -> str:
    """The accuracy right after pruning, and after each part of the repair that was made."""
    stages = [
        ("accuracy_raw_percent", "as cut"),
        ("accuracy_recalibrated_percent", "with batch norm recalibrated"),
        ("accuracy_reconstructed_percent", "with the layers reconstructed as well"),
    ]
    return ", ".join(f"{pruning[key]:.2f}% {text}" for key, text in stages if key in pruning)


def counted(number: int, noun: str) -> str:
    """For example "1 epoch" or "30 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
