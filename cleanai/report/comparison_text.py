"""The comparison of the methods as text and as CSV, made from its record alone."""
from __future__ import annotations

import csv
import io
import textwrap

from cleanai.measure.significance import LEVEL
from cleanai.report.comparison import METHODS, PAIRS, STAGES
from cleanai.report.run_text import MODELS, Record, comparison_rows, origin_lines, prepared_with, summary_rows

_WIDTH = 104
DIFFERENCE_COLUMNS = ("Difference in held-out accuracy", "Points", "95% interval", "Right alone", "p", "Beyond chance")
_COSTS = ("accuracy_percent", "accuracy_heldout_percent", "size_mib", "parameters", "macs")


def side_by_side_rows(record: Record) -> list[tuple[str, list[str]]]:
    """A label, and the values of: the original, both methods pruned, both fine-tuned; "-" where one has not run."""
    runs = {method: run for method, run in record["runs"].items() if run}
    measured = {method: dict(comparison_rows(run)) for method, run in runs.items()}
    rows = []
    for label in dict.fromkeys(label for table in measured.values() for label in table):
        values = {method: table.get(label, ["-"] * len(MODELS)) for method, table in measured.items()}
        # Each run measured the original beside its own networks: both values, where they are not the same.
        original = " / ".join(dict.fromkeys(of_models[0] for of_models in values.values()))
        pruned, tuned = ([values[m][stage] if m in values else "-" for m in METHODS] for stage in (1, 2))
        rows.append((label, [original, *pruned, *tuned]))
    summaries = {method: dict(summary_rows(run)) for method, run in runs.items()}
    for label in next(iter(summaries.values())):
        rows.append((label, ["", "", "", *(summaries[m][label] if m in summaries else "-" for m in METHODS)]))
    return rows


def difference_rows(record: Record) -> list[list[str]]:
    """For each pair of networks the values of DIFFERENCE_COLUMNS, "-" where they are not known."""
    known = {(d["stage"], d["first"], d["second"]): d for d in record["differences"]}
    rows = []
    for stage in STAGES:
        for first, second in PAIRS:
            difference = known.get((stage, first, second), {"stage": stage, "first": first, "second": second})
            points = difference.get("difference_points")
            row = [difference_name(difference), "-" if points is None else f"{points:+.2f}"]
            if "p_value" in difference:
                low, high = difference["interval_points"]
                p = "< 0.001" if difference["p_value"] < 0.001 else f"{difference['p_value']:.3f}"
                right_alone = f"{difference['only_second']} / {difference['only_first']}"
                row += [f"{low:+.2f} to {high:+.2f}", right_alone, p, "yes" if difference["more_than_chance"] else "no"]
            rows.append(row + ["-"] * (len(DIFFERENCE_COLUMNS) - len(row)))
    return rows


def difference_name(difference: Record) -> str:
    """Which two networks a difference is of: the first minus the second."""
    first, second = METHODS[difference["second"]], METHODS.get(difference["first"], "Original")
    return f"{MODELS[difference['stage']]}: {first} - {second}"


def explanation(record: Record) -> str:
    """What the differences are, and what they do not tell."""
    sizes = {
        (run["dataset"]["test_images"], run["dataset"]["calibration_images"]) for run in record["runs"].values() if run
    }
    if len(sizes) == 1:
        ((test, calibration),) = sizes
        where = f"the {test - calibration:,} held-out test images: which channels go was decided on the other "
        where += f"{calibration:,}"
    else:
        where = "the held-out test images of each method's run, which differ"
    sentences = [f"Differences are in percentage points, on {where}."]
    if any(" / " in values[0] for _, values in side_by_side_rows(record)):
        sentences.insert(0, "Two values of the original: each method's run timed it anew, beside its own networks.")
    if any("p_value" in difference for difference in record["differences"]):
        sentences.append(
            "The 95% interval is that of a bootstrap over the images. Right alone: how many images only the first of "
            "the two networks recognised, and how many only the second. p is that of the exact McNemar test on these; "
            f"below {LEVEL:g} a difference is beyond chance, each taken by itself. The chance meant is that of other "
            "test images: training again with another seed makes other networks, and how far those would differ is not "
            "measured."
        )
    return " ".join(sentences)


def original_line(record: Record) -> str:
    """How the network that both methods began with came to be."""
    run, preparation = _any_run(record), record["preparation"]
    line = f"Original network: {prepared_with(run)}"
    if preparation and all(run["prepared_with"].get(key) == value for key, value in preparation["config"].items()):
        models = preparation["models"]
        return f"{line}; test accuracy {models['before']['accuracy_percent']:.2f}% before that training"
    return f"{line}; test accuracy before that training: -"


def comparison_text(record: Record) -> str:
    """All that the comparing script prints: the answer, the two tables, and what to know of them."""
    header = "".join(f"{METHODS['Coverage']:>17}{METHODS['Wanda']:>11}" for _ in STAGES)
    difference_widths = (44, 8, 17, 13, 8, 14)
    lines = [_cells(row, difference_widths) for row in (DIFFERENCE_COLUMNS, *difference_rows(record))]
    return "\n".join(
        [
            *(textwrap.fill(sentence, _WIDTH) for sentence in record["answer"]),
            "",
            origin_lines({"dataset": _any_run(record)["dataset"]}),
            original_line(record),
            "",
            "NEURON COVERAGE AND WANDA - COMPARISON TABLE",
            "=" * _WIDTH,
            f"{'':<48}" + "".join(f"{MODELS[stage]:>28}" for stage in STAGES),
            f"{'Metric':<33}{'Original (FT)':>15}{header}",
            "-" * _WIDTH,
            *(_cells([label, *values], (33, 15, 17, 11, 17, 11)) for label, values in side_by_side_rows(record)),
            "-" * _WIDTH,
            "",
            lines[0],
            "-" * _WIDTH,
            *lines[1:],
            "-" * _WIDTH,
            textwrap.fill(explanation(record), _WIDTH),
            *(f"- {remark}" for remark in record["remarks"]),  # not folded: they hold commands to copy
        ]
    )


def comparison_csv(record: Record) -> str:
    """One line per network, units in the names of the columns; empty where something is not known."""
    names = {"original": "minus_original", "Coverage": "minus_neuron_coverage"}
    measures = ("points", "low_points", "high_points", "p_value")
    columns = ["network", "method", *_COSTS, "latency_mean_ms", "throughput_images_per_s"]
    columns += [f"{prefix}_{measure}" for prefix in names.values() for measure in measures]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for method, run in record["runs"].items():
        for name, model in run["models"].items() if run else ():
            row = {"network": name, "method": METHODS[method], **{key: model[key] for key in _COSTS}}
            row["latency_mean_ms"] = model["latency_ms"]["mean"]
            row["throughput_images_per_s"] = model["throughput_images_per_s"]
            for difference in record["differences"]:
                if (difference["stage"], difference["second"]) == (name, method):
                    low, high = difference.get("interval_points", ("", ""))
                    values = (difference["difference_points"], low, high, difference.get("p_value", ""))
                    prefix = names[difference["first"]]
                    row.update({f"{prefix}_{measure}": value for measure, value in zip(measures, values)})
            writer.writerow(row)
    return file.getvalue()


def _any_run(record: Record) -> Record:
    return next(run for run in record["runs"].values() if run)


def _cells(values: list[str] | tuple[str, ...], widths: tuple[int, ...]) -> str:
    first = f"{values[0]:<{widths[0]}}"
    return (first + "".join(f"{value:>{width}}" for value, width in zip(values[1:], widths[1:]))).rstrip()
