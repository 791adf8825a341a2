"""The tables of scripts 1 to 3, made from a record alone. The user's specification fixes their layout."""

from __future__ import annotations

from cleanai.measure.significance import stricter_test, verdict
from cleanai.report.comparison import heldout_change
from cleanai.report.notes import notes
from cleanai.report.wording import (
    FULL_BATCH,
    STAGES,
    WIDTH,
    Record,
    changed_predictions,
    in_unit,
    interval_text,
    method_title,
    robustness_summary,
    speedup,
    table_text,
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
            *([] if record["config"]["epochs"] else ["", "Note: the network was taken as it is, not fine-tuned."]),
            *("\n" + wrapped(f"!!! WARNING: {warning}") for warning in record.get("warnings", [])),
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
    throughputs = [model["throughput_images_per_s"] for model in models]
    decimals = 0 if min(throughputs) >= 10 else 2
    rows = [
        ("Accuracy (%)", [f"{model['accuracy_percent']:.2f}" for model in models]),
        (f"Size ({size})", sizes),
        (f"Parameters ({prefix})", parameters),
        (f"FLOPs ({of_macs})", macs),
        (f"Avg Inference Time ({time})", times),
        ("Held-out Accuracy (%)", [f"{model['accuracy_heldout_percent']:.2f}" for model in models]),
        (f"Throughput, batch {batch} (images/s)", [f"{each:.{decimals}f}" for each in throughputs]),
    ]
    for runtime, latency in exported.items():
        time, times = in_unit("ms", [latency[name]["mean"] for name in STAGES])
        rows.append((f"{RUNTIMES[runtime]} ({time})", times))
    return rows


def deployed_rows(record: Record) -> list[list[str]]:
    """A heading, and what was measured of the final network as it is deployed; no rows without such measurements."""
    export = record.get("export", {})
    if "disagreements" not in export:
        return []
    measured = {"ONNX float32": export, **({"ONNX INT8": export["int8"]} if "int8" in export else {})}
    final = record["models"]["fine_tuned"]
    accuracies = [export["pytorch_accuracy_percent"], *(x["accuracy_heldout_percent"] for x in measured.values())]
    size, sizes = in_unit("size_mib", [final["size_mib"], *(each["size_mib"] for each in measured.values())])
    latencies = [export["latency_ms"][runtime]["fine_tuned"] for runtime in ("pytorch", "onnx_runtime")]
    latencies += [export["int8"]["latency_ms"]] if "int8" in export else []
    time, times = in_unit("ms", [latency["mean"] for latency in latencies])
    return [
        ["Final network on the CPU", "PyTorch", *measured],
        ["Held-out Accuracy (%)", *(f"{accuracy:.2f}" for accuracy in accuracies)],
        ["Other class than PyTorch (images)", "", *(f"{each['disagreements']:,}" for each in measured.values())],
        [f"Size ({size})", *sizes],
        [f"Avg Inference Time ({time})", *times],
    ]


def path_rows(record: Record) -> list[list[str]]:
    """A heading, and the steps of a pruning that went on up to a limit, with the accuracy on calibration images."""
    path = record["pruning"]["path"]
    original, timed = path[0]["accuracy_calibration_percent"], "speedup" in path[-1]
    head = ["Step", "Parameters removed (%)", "FLOPs removed (%)", "Accuracy (%)", "Change (points)"]
    rows = [[*head, *(["Median time (ms)", "Speed-up"] if timed else []), "Taken"]]
    for number, step in enumerate(path):
        accuracy = step["accuracy_calibration_percent"]
        times = [f"{step['latency_median_ms']:.2f}", f"{step['speedup']:.2f}x"] if "speedup" in step else ["", ""]
        rows.append(
            [
                str(number) if number else "Original",
                f"{step['parameters_removed_percent']:.1f}",
                f"{step['macs_removed_percent']:.1f}",
                f"{accuracy:.2f}",
                f"{round(accuracy - original, 2) + 0.0:+.2f}" if number else "",
                *(times if timed else []),
                ("yes" if step["taken"] else "no") if number else "",
            ]
        )
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
            *(
                "\n" + wrapped(sentence)
                for sentence in [*_change(record), *changed_predictions(record), *robustness_summary(record)]
            ),
            *_deployed(record),
            *(["", wrapped(judged)] if judged else []),
            *("\n" + wrapped(f"!!! WARNING: {warning}") for warning in record["warnings"]),
            *("\n" + wrapped(f"Note: {note}") for note in notes(record)),
        ]
    )


def _change(record: Record) -> list[str]:
    """How sure the change of held-out accuracy is: a sentence, or none where a verdict says it."""
    if "verdict" in record:
        return []
    tested = heldout_change(record)
    return [
        f"Held-out accuracy changed by {tested['difference_points']:+.2f} points, {verdict(tested['p_value'])}; 95% "
        f"interval {interval_text(tested['interval_points'])} points. {stricter_test(tested)}".rstrip()
    ]


def _deployed(record: Record) -> list[str]:
    rows = deployed_rows(record)
    if not rows:
        return []
    heading = f"\nDEPLOYED NETWORK - ON ALL {record['export']['heldout_images']:,} HELD-OUT TEST IMAGES"
    return [heading, "=" * WIDTH, *table_text(rows, [WIDTH - 20 * len(rows[0][1:]), *[20] * len(rows[0][1:])])]
