"""The tables of scripts 1 to 3, made from a record alone. The user's specification fixes their layout."""

from __future__ import annotations

from cleanai.report.notes import notes
from cleanai.report.wording import (
    FULL_BATCH,
    STAGES,
    WIDTH,
    Record,
    in_unit,
    method_title,
    speedup,
    timing_lines,
    verdict_text,
    wrapped,
)

RUNTIMES = {"onnx_runtime": "ONNX Runtime, CPU", "pytorch": "PyTorch, CPU, beside it"}


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
    models = [record["models"][name] for name in STAGES]
    exported = record["export"]["latency_ms"] if "export" in record else {}
    size, sizes = in_unit("size_mib", [model["size_mib"] for model in models])
    prefix, parameters = in_unit("parameters", [model["parameters"] for model in models])
    of_macs, macs = in_unit("macs", [model["macs"] for model in models])
    time, times = in_unit("ms", [model["latency_ms"]["mean"] for model in models])
    batch = models[0].get("throughput_batch", FULL_BATCH)
    rows = [
        ("Accuracy (%)", [f"{model['accuracy_percent']:.2f}" for model in models]),
        (f"Size ({size})", sizes),
        (f"Parameters ({prefix})", parameters),
        (f"FLOPs ({of_macs})", macs),
        (f"Avg Inference Time ({time})", times),
        ("Held-out Accuracy (%)", [f"{model['accuracy_heldout_percent']:.2f}" for model in models]),
        (f"Throughput, batch {batch} (images/s)", [f"{model['throughput_images_per_s']:.0f}" for model in models]),
    ]
    for runtime, latency in exported.items():
        time, times = in_unit("ms", [latency[name]["mean"] for name in STAGES])
        rows.append((f"{RUNTIMES[runtime]} ({time})", times))
    return rows


def summary_rows(record: Record) -> list[tuple[str, str]]:
    """The rows of the summary: reductions without a sign, changes of accuracy with one."""
    summary = record["summary"]
    return [
        ("Parameter Reduction", f"{summary['parameter_reduction_percent']:.2f}%"),
        ("Size Reduction", f"{summary['size_reduction_percent']:.2f}%"),
        ("Speedup", f"{speedup(record['models']):.2f}x"),
        ("Accuracy Recovery (FT)", f"{summary['accuracy_recovery_points']:+.2f}%"),
        ("Final Accuracy Drop", f"{summary['final_accuracy_drop_points']:+.2f}%"),
        ("FLOPs Reduction", f"{summary['macs_reduction_percent']:.2f}%"),
    ]


def comparison_table(record: Record) -> str:
    """The COMPREHENSIVE COMPARISON TABLE and the Summary of a pruning script, then its warnings and notes."""
    original, pruned, fine_tuned = STAGES.values()
    # The specification sets values with a sign or an x one column further right.
    summary = [
        (label, value, 12 if value[0].isdigit() and value.endswith("%") else 13)
        for label, value in summary_rows(record)
    ]
    judged = verdict_text(record)
    return "\n".join(
        [
            f"{method_title(record['method']).upper()} PRUNING - COMPREHENSIVE COMPARISON TABLE",
            "=" * WIDTH,
            f"{'Metric':<24}{original:>20}{pruned:>23}{fine_tuned:>23}",
            "-" * WIDTH,
            *(f"{label:<34}{values[0]:>10}{values[1]:>23}{values[2]:>23}" for label, values in comparison_rows(record)),
            "-" * WIDTH,
            *map(wrapped, timing_lines(record)),
            "",
            "Summary",
            *(f"  {label:<50}{value:>{width}}" for label, value, width in summary),
            *(["", wrapped(judged)] if judged else []),
            *("\n" + wrapped(f"!!! WARNING: {warning}") for warning in record["warnings"]),
            *("\n" + wrapped(f"Note: {note}") for note in notes(record)),
        ]
    )
