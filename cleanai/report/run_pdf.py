"""The PDF of a pruning script, made from its record alone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.platypus import Spacer, Table

from cleanai.report.charts import WIDTH, epochs_chart, latency_chart, layers_chart
from cleanai.report.page import build_pdf, lead, pairs, pictures, section, small, table, text, warning
from cleanai.report.run_text import (
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
from cleanai.runtime.checkpoints import write_record
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import Scenario

_MOST_CLASSES = 20  # in the table of classes
_TERMS = (
    "Held-out are the test images that no channel was measured on. The chance meant is that of other test images. "
    "Training again with another seed gives other networks; how far those would differ is not measured here."
)
_CRITERIA = {
    "nc": "NC: neurons active on some image",
    "kmnc": "KMNC: sections reached of each range",
    "nbc": "NBC: ends of ranges that were passed",
    "snac": "SNAC: upper ends that were passed",
    "tknc": "TKNC: neurons among a layer's top 3",
}


def write_results(scenario: Scenario, record: Record) -> None:
    """Write the report of a pruning script, and then its record, which marks the run as finished."""
    write_report(scenario.report, record)
    write_record(scenario.record, record)


def write_report(path: Path, record: Record) -> None:
    """Write the report of a pruning script as a PDF."""
    write_bytes(path, pdf_report(record))


def pdf_report(record: Record) -> bytes:
    """The report of a pruning script as the bytes of a PDF.

    Records of earlier versions lack some parts; their reports do without the sections on them.
    """
    method = TITLES[record["method"]].title().replace("Wanda", "WANDA")
    opening = [
        text(_what_was_done(record)),
        *(warning(content) for content in record.get("warnings", [])),
        *section("In short", *(lead(sentence) for sentence in _answer(record)), text(_TERMS)),
        *section("Result", _comparison(record), Spacer(1, 6), pairs(summary_rows(record), numbers=True)),
    ]
    story = [
        *section("Accuracy and loss per epoch of fine-tuning", epochs_chart(record), text(_epochs_note(record))),
        *section("Layer by layer, before and after pruning", *_layers(record)),
        *(section("Test coverage", *_coverage(record)) if "coverage" in record else []),
        *(section("Accuracy per class", *_classes(record)) if "classes" in record else []),
        *(_newly_wrong(record) if record.get("newly_wrong") else []),
        *section("Inference time", *_latency(record)),
        *section("Configuration", pairs(_configuration(record), abreast=2)),
        *section("Dataset and machine", pairs(_provenance(record))),
        *(section("Checkpoints, with their SHA-256", *_checkpoints(record)) if "checkpoints" in record else []),
        *(section("Commands that repeat this", *map(small, record["commands"])) if "commands" in record else []),
    ]
    return build_pdf(record["scenario"], method, story, opening)


def _what_was_done(record: Record) -> str:
    config, dataset = record["config"], record["dataset"]
    return (
        f"{record['scenario']}: {asked_for(config)} removed in "
        f"{counted(config['steps'], 'step')}, then {counted(config['epochs'], 'epoch')} of fine-tuning on "
        f"{dataset['train_images']:,} images of {dataset['name']} ({dataset['source']}). "
        f"Original network: {prepared_with(record)}."
    )


def _answer(record: Record) -> list[str]:
    """What it cost, what it gained, and whether the cost is more than chance: a sentence each."""
    original, final, summary = record["models"]["original"], record["models"]["fine_tuned"], record["summary"]
    before, after = original["accuracy_heldout_percent"], final["accuracy_heldout_percent"]
    dataset = record["dataset"]
    heldout = dataset["test_images"] - dataset["calibration_images"]
    verb = "lost" if after < before else "gained" if after > before else "kept"
    change = "its accuracy" if verb == "kept" else f"{abs(after - before):.2f} points of accuracy"
    beside = "as many as the original network" if verb == "kept" else f"the original network {before:.2f}%"
    return [
        f"Pruned and fine-tuned, the network {verb} {change}: it recognises {after:.2f}% of the "
        f"{heldout:,} held-out test images, {beside}.",
        f"It has {summary['parameter_reduction_percent']:.1f}% fewer parameters, takes "
        f"{final['size_mib']:.1f} MB instead of {original['size_mib']:.1f} MB, does "
        f"{summary['macs_reduction_percent']:.1f}% less arithmetic, and is {summary['speedup']:.2f} times as fast on "
        f"single images ({final['latency_ms']['mean']:.2f} ms instead of {original['latency_ms']['mean']:.2f} ms).",
        _beyond_chance(record),
    ]


def _beyond_chance(record: Record) -> str:
    from cleanai.measure.significance import LEVEL, compare_paired, shown_p
    from cleanai.report.comparison import heldout_flags  # these take a while to import: when there is a report to make

    flags = heldout_flags(record)
    if flags is None:
        return "Its record does not tell whether the difference in accuracy is more than chance."
    tested = compare_paired(flags["original"], flags["fine_tuned"])
    low, high = tested["interval_points"]
    return (
        f"These images show {'a' if tested['p_value'] < LEVEL else 'no'} difference beyond chance: only the original "
        f"network recognises {tested['only_first']:,} of them, only the final one {tested['only_second']:,} "
        f"(McNemar's test, {shown_p(tested['p_value'])}; 95% interval of the difference {low:+.2f} to {high:+.2f} "
        "points)."
    )


def _comparison(record: Record) -> Table:
    rows = [["Metric", *MODELS.values()], *([label, *values] for label, values in comparison_rows(record))]
    return table(rows, [WIDTH * 0.4, *[WIDTH * 0.2] * 3])


def _epochs_note(record: Record) -> str:
    return (
        f"Epoch 0 is the pruned network: test accuracy {repair_stages(record['pruning'])}. Training images are "
        "augmented, and measured while the network learns."
    )


def _layers(record: Record) -> list[Any]:
    """What each layer had and has; the names of layers are the same in both parts of a record."""
    widths = record["pruning"]["layers"]
    names = [layer["name"] for layer in widths]
    panels = {"Output channels": _before_and_after(widths, "channels", 1)}
    if "layers" not in record:
        return [layers_chart(names, panels)]
    costs = record["layers"]
    panels["Parameters (thousands)"] = _before_and_after(costs, "parameters", 1e3)
    panels["Multiply-accumulates for one image (millions)"] = _before_and_after(costs, "macs", 1e6)
    most = " ".join(
        f"Most of the {what} went from {_most_gone(record, key)}."
        for key, what in (("parameters", "parameters"), ("macs", "multiply-accumulates"))
    )
    return [layers_chart(names, panels), text(f"{most} Batch norm and pooling, which hold little, are not drawn.")]


def _before_and_after(layers: list[Record], key: str, unit: float) -> dict[str, list[float]]:
    return {when: [layer[f"{key}_{when.lower()}"] / unit for layer in layers] for when in ("Before", "After")}


def _most_gone(record: Record, key: str) -> str:
    """The three layers that gave most, each with its part in all that went."""
    gone = {layer["name"]: layer[f"{key}_before"] - layer[f"{key}_after"] for layer in record["layers"]}
    total = record["models"]["original"][key] - record["models"]["fine_tuned"][key] or 1  # a tiny share may be nothing
    most = sorted(gone, key=lambda name: -gone[name])[:3]
    return ", ".join(f"{name} ({100 * gone[name] / total:.0f}%)" for name in most)


def _coverage(record: Record) -> list[Any]:
    coverage = record["coverage"]
    models = [coverage["models"][name] for name in MODELS]
    rows = [["Coverage (%)", *MODELS.values(), "Change (points)"]]
    rows += [[label, *_with_change([model[f"{key}_percent"] for model in models])] for key, label in _CRITERIA.items()]
    rows.append(["Neurons", *(f"{model['neurons']:,}" for model in models), ""])
    read = [model["layers"][:-1] for model in models]  # the last one's outputs are the classes
    panels = {
        title: {name: [layer[key] for layer in layers] for name, layers in zip(MODELS.values(), read)}
        for title, key in (
            ("Share of channels active, on average over images and positions (%)", "active_percent"),
            ("Mean normalised coverage (%)", "normalized_mean_percent"),
        )
    }
    return [
        text(
            "How much of what each network can do the test images make it do. It says how thoroughly these images "
            "exercise a network, not how good that is: where coverage has not fallen, they test the pruned network as "
            "thoroughly as the original one."
        ),
        Spacer(1, 4),
        table(rows, [WIDTH * share for share in (0.4, 0.15, 0.15, 0.16, 0.14)]),
        Spacer(1, 8),
        layers_chart([layer["name"] for layer in read[0]], panels),
        text(
            f"Measured on {coverage['images']:,} of the calibration images. A neuron is one channel of a layer's "
            "output, its value for an image the mean over all positions. NC counts it as active above "
            f"{coverage['threshold']:g}, the layer's values being brought to [0, 1]. Its range is what it did on "
            f"{coverage['profile_images']:,} training images, in 1,000 sections. TKNC rises by itself where layers get "
            "narrower. In the charts a channel is active where it is above zero; its normalised coverage is its mean "
            "absolute value over that of the layer's busiest channel. An output is named after the first layer that "
            "reads it."
        ),
    ]


def _with_change(values: list[float]) -> list[str]:
    change = round(values[-1] - values[0], 2) + 0.0  # never -0.00
    return [*(f"{value:.2f}" for value in values), f"{change:+.2f}"]


def _classes(record: Record) -> list[Any]:
    classes = sorted(record["classes"], key=lambda row: row["fine_tuned_percent"] - row["original_percent"])
    rows = [["Class", *MODELS.values(), "Change (points)", "Images", "Newly wrong", "Newly right"]]
    for row in classes[:_MOST_CLASSES]:
        counts = [f"{row[key]:,}" for key in ("images", "newly_wrong", "newly_right")]
        rows.append([row["name"], *_with_change([row[f"{name}_percent"] for name in MODELS]), *counts])
    shown = "" if len(classes) <= _MOST_CLASSES else f" The {_MOST_CLASSES} of {len(classes)} classes that lost most."
    return [
        text(
            "Accuracy (%) on all test images, the class that lost most first. Newly wrong: images that the original "
            f"network recognised and the final one does not; newly right: the reverse.{shown}"
        ),
        Spacer(1, 4),
        table(rows, [WIDTH * share for share in (0.2, 0.12, 0.12, 0.14, 0.12, 0.1, 0.1, 0.1)]),
    ]


def _newly_wrong(record: Record) -> list[Any]:
    shown = [(each["png_base64"], f"{each['class']}, taken for {each['taken_for']}") for each in record["newly_wrong"]]
    return section(
        "Images that are newly wrong",
        text("From the classes that lost most, the first such images in the order of the test set."),
        Spacer(1, 4),
        pictures(shown, abreast=6),
    )


def _latency(record: Record) -> list[Any]:
    models = record["models"]
    rows = [["Time for one image (ms)", *MODELS.values()]]
    for key, label in (("p50", "Median"), ("p90", "90% took at most"), ("p99", "99% took at most")):
        rows.append([label, *(f"{models[name]['latency_ms'][key]:.2f}" for name in MODELS)])
    rows = table(rows, [WIDTH * 0.4, *[WIDTH * 0.2] * 3])
    if any("latency_quantiles_ms" not in models[name] for name in MODELS):
        return [rows]
    quantiles = {title: models[name]["latency_quantiles_ms"] for name, title in MODELS.items()}
    note = (
        f"{models['original']['latency_ms']['n']} calls of each network, in turns, in float32; the fastest and the "
        "slowest 2% of them are not drawn. The further left a curve, the faster the network; the steeper, the steadier."
    )
    return [latency_chart(quantiles), text(note), Spacer(1, 4), rows]


def _configuration(record: Record) -> list[tuple[str, str]]:
    config = {**record["config"], "train_samples": record["config"]["train_samples"] or "all"}
    if "checkpoints" in record:  # where the whole hash stands
        del config["fine_tuned_model"]
    names = {
        "ratio": "Ratio of parameters",
        "macs_ratio": "Ratio of FLOPs",
        "lr": "Learning rate (peak)",
        "fine_tuned_model": "Fine-tuned model (SHA-256)",
    }
    shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in config.items()}
    return [(names.get(key, key.replace("_", " ").capitalize()), str(value)) for key, value in shown.items()]


def _provenance(record: Record) -> list[tuple[str, str]]:
    dataset, environment = record["dataset"], record["environment"]
    device = f"{environment['device_type']}, {environment['device']}, {counted(environment['cpu_threads'], 'thread')}"
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


def _checkpoints(record: Record) -> list[Any]:
    return [small(f"{digest}  {name}") for name, digest in record["checkpoints"].items()]
