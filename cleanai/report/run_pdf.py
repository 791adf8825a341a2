"""The PDF of a pruning script, made from its record alone."""

from __future__ import annotations

from typing import Any

from reportlab.platypus import Spacer, Table

from cleanai.measure.significance import stricter_test, verdict
from cleanai.report.charts import epochs_chart, latency_chart
from cleanai.report.comparison import heldout_change
from cleanai.report.coverage_pdf import coverage, layer_coverage
from cleanai.report.curves import Panel, curves_chart
from cleanai.report.drawing import WIDTH
from cleanai.report.evidence_pdf import changes, deployed, robustness
from cleanai.report.layers_pdf import layers, sensitivity
from cleanai.report.notes import notes, path_end
from cleanai.report.page import build_pdf, headline, lead, pairs, pictures, section, small, table, text, warning
from cleanai.report.provenance_pdf import checkpoints, checksums, configuration, provenance
from cleanai.report.run_text import comparison_rows, path_rows, summary_rows
from cleanai.report.wording import (
    STAGES,
    Record,
    counted,
    heldout_images,
    in_unit,
    interval_text,
    is_narrow,
    method_title,
    prepared_with,
    pruning_goal,
    repair_stages,
    speedup,
    timing_lines,
    verdict_text,
    with_change,
)

_MOST_CLASSES = 20  # in the table of classes
_STEPS = "after each step"
_TERMS = (
    "Held-out are the test images that were not used for calibration. Significance covers variation between test "
    "images, not between training seeds."
)


def pdf_report(record: Record) -> bytes:
    """The report of a pruning script as the bytes of a PDF."""
    story = [
        text(_what_was_done(record)),
        *(warning(content) for content in record["warnings"]),
        *section("Summary", *_verdict(record), *map(lead, [*_answer(record), *notes(record)]), text(_TERMS)),
        *section("Result", _comparison(record), *_timing(record), pairs(summary_rows(record), numbers=True)),
        *(section("How far the pruning went", *_path(record)) if "path" in record["pruning"] else []),
        *_fine_tuning(record),
        *section("Layers before and after pruning", *layers(record)),
        *(section("Sensitivity of the layers", *sensitivity(record)) if record["pruning"].get("sensitivity") else []),
        *section("Test coverage", *coverage(record)),
        *section("Test coverage of the layers", *layer_coverage(record)),
        *section("Accuracy per class", *_classes(record)),
        *changes(record),
        *(_newly_wrong(record) if record["newly_wrong"] else []),
        *robustness(record),
        *section("Inference time", *_latency(record)),
        *deployed(record),
        *section("Configuration", pairs(configuration(record), abreast=2)),
        *section("Dataset and machine", pairs(provenance(record)), *checksums(record)),
        *section("Checkpoints with their SHA-256", *checkpoints(record)),
        *section("Commands to repeat this", *map(small, record["commands"])),
    ]
    return build_pdf(record["scenario"], f"{method_title(record['method'])} Pruning", story)


def _what_was_done(record: Record) -> str:
    config, dataset = record["config"], record["dataset"]
    trained = f"then {counted(config['epochs'], 'epoch')} of fine-tuning on {dataset['train_images']:,} images of"
    return (
        f"{record['scenario']}: {pruning_goal(record)}, {trained if config['epochs'] else 'without fine-tuning, on'} "
        f"{dataset['name']} ({dataset['source']}). "
        f"Original network: {prepared_with(record)}."
    )


def _verdict(record: Record) -> list[Any]:
    judged = verdict_text(record)
    return [headline(judged)] if judged else []


def _answer(record: Record) -> list[str]:
    """The change of accuracy, the savings, and whether the change is significant: a sentence each."""
    models, summary, tested = record["models"], record["summary"], heldout_change(record)
    before, after = (models[name]["accuracy_heldout_percent"] for name in ("original", "fine_tuned"))
    beside = f"the original network {before:.2f}%"
    if after != before:
        change = f"{'lost' if after < before else 'gained'} {abs(after - before):.2f} points of accuracy"
    else:
        beside = "as many as the original network"
        kept = is_narrow(tested["interval_points"])
        change = "kept its accuracy" if kept else "shows no change of accuracy, but on too few images to be sure"
    size, (size_before, _, size_after) = in_unit("size_mib", [models[name]["size_mib"] for name in STAGES])
    time, (time_before, _, time_after) = in_unit("ms", [models[name]["latency_ms"]["p50"] for name in STAGES])
    return [
        f"{'Pruned and fine-tuned' if record['config']['epochs'] else 'Pruned'}, the network {change}: it classifies "
        f"{after:.2f}% of the {heldout_images(record):,} held-out test images correctly, {beside}.",
        f"It has {summary['parameter_reduction_percent']:.1f}% fewer parameters and "
        f"{summary['macs_reduction_percent']:.1f}% fewer FLOPs, takes {size_after} {size} instead of "
        f"{size_before} {size}, and is {speedup(models):.2f} times as fast on single images "
        f"(median {time_after} {time} instead of {time_before} {time}).",
        _significance(tested),
    ]


def _significance(tested: Record) -> str:
    return (
        f"The difference in accuracy is {verdict(tested['p_value'])} by McNemar's test: {tested['only_first']:,} of "
        f"these images only the original network classifies correctly, {tested['only_second']:,} only the final one. "
        f"The 95% interval of the difference is {interval_text(tested['interval_points'])} points. "
        f"{stricter_test(tested)}".rstrip()
    )


def _comparison(record: Record) -> Table:
    rows = [["Metric", *STAGES.values()], *([label, *values] for label, values in comparison_rows(record))]
    return table(rows, [WIDTH * 0.4, *[WIDTH * 0.2] * 3])


def _timing(record: Record) -> list[Any]:
    return [*map(text, timing_lines(record)), Spacer(1, 6)]


def _fine_tuning(record: Record) -> list[Any]:
    if not record["config"]["epochs"]:
        return section(
            "Accuracy after pruning", text(f"Test accuracy after pruning: {repair_stages(record['pruning'])}.")
        )
    return section("Accuracy and loss per epoch of fine-tuning", epochs_chart(record), text(_epochs_note(record)))


def _epochs_note(record: Record) -> str:
    images, batch = record["dataset"]["train_images"], record["config"]["batch_size"]
    used = f" An epoch has whole batches only: {images - images % batch:,} of the {images:,} images, others each time."
    return (
        f"Epoch 0 is the pruned network: test accuracy {repair_stages(record['pruning'])}. The training curve is of "
        f"augmented images during the epoch.{used if images > batch and images % batch else ''}"
    )


def _path(record: Record) -> list[Any]:
    """The steps of a pruning that went on up to a limit: accuracy over what was removed, and all numbers."""
    path = record["pruning"]["path"]
    points = [(step["parameters_removed_percent"], step["accuracy_calibration_percent"]) for step in path]
    last = points[len(record["pruning"]["steps"])]
    panel = Panel("Parameters removed (%)", {_STEPS: points}, stars=[(_STEPS, True, *last)])
    rows, timed = path_rows(record), "speedup" in path[-1]
    how = f" Times are for {counted(path[-1]['latency_images'], 'image')}, briefly measured." if timed else ""
    return [
        text(f"{path_end(record)} Accuracy is on the calibration images, after the repair of each step.{how}"),
        Spacer(1, 4),
        curves_chart([panel], path[0]["accuracy_calibration_percent"], [("the pruned network", _STEPS, True)]),
        Spacer(1, 6),
        table(rows, [WIDTH * share for share in ((0.13, 0.17, *[0.7 / (len(rows[0]) - 2)] * (len(rows[0]) - 2)))]),
    ]


def _classes(record: Record) -> list[Any]:
    classes = sorted(record["classes"], key=lambda row: row["fine_tuned_percent"] - row["original_percent"])
    rows = [["Class", *STAGES.values(), "Change (points)", "Images", "Newly wrong", "Newly right"]]
    for row in classes[:_MOST_CLASSES]:
        counts = [f"{row[key]:,}" for key in ("images", "newly_wrong", "newly_right")]
        rows.append([row["name"], *with_change([row[f"{name}_percent"] for name in STAGES]), *counts])
    shown = "" if len(classes) <= _MOST_CLASSES else f" The {_MOST_CLASSES} of {len(classes)} classes that lost most."
    return [
        text(
            "Accuracy (%) on all test images; the class that lost most comes first. Newly wrong: images that only the "
            f"original network classifies correctly. Newly right: only the final one.{shown}"
        ),
        Spacer(1, 4),
        table(rows, [WIDTH * share for share in (0.2, 0.12, 0.12, 0.14, 0.12, 0.1, 0.1, 0.1)]),
    ]


def _newly_wrong(record: Record) -> list[Any]:
    shown = [(each["png_base64"], f"{each['class']}, predicted {each['predicted']}") for each in record["newly_wrong"]]
    return section(
        "Images that are newly wrong",
        text("The first such images of the classes that lost most, in the order of the test set."),
        Spacer(1, 4),
        pictures(shown, abreast=6),
    )


def _latency(record: Record) -> list[Any]:
    models = record["models"]
    labels = {"p50": "Median", "p90": "90th percentile", "p99": "99th percentile"}
    unit, times = in_unit("ms", [models[name]["latency_ms"][key] for key in labels for name in STAGES])
    rows = [[f"Time for one image ({unit})", *STAGES.values()]]
    rows += [[label, *times[3 * number : 3 * number + 3]] for number, label in enumerate(labels.values())]
    if all("spread_percent" in models[name]["latency_ms"] for name in STAGES):
        rows.append(
            ["Spread between turns", *(f"{models[name]['latency_ms']['spread_percent']:.0f}%" for name in STAGES)]
        )
    rows = table(rows, [WIDTH * 0.4, *[WIDTH * 0.2] * 3])
    quantiles = {title: models[name]["latency_quantiles_ms"] for name, title in STAGES.items()}
    note = (
        f"{models['original']['latency_ms']['n']} calls of each network, in float32: those of the fastest two thirds "
        "of its turns. The curves leave out the fastest and the slowest 2% of them. A curve further left is a faster "
        "network, a steeper curve a steadier one."
    )
    return [latency_chart(quantiles), text(note), Spacer(1, 4), rows]
