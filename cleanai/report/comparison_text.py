"""The comparison of the methods as text and as CSV, made from its record alone."""

from __future__ import annotations

import csv
import io

from cleanai.measure.significance import LEVEL
from cleanai.report.comparison import COMPARED, pairs_of
from cleanai.report.run_text import comparison_rows, summary_rows
from cleanai.report.wording import (
    STAGES,
    WIDTH,
    Record,
    heldout_images,
    listed,
    method_title,
    origin_lines,
    prepared_with,
    row_text,
    table_text,
    wrapped,
)

DIFFERENCE_COLUMNS = ["Difference in held-out accuracy", "Points", "95% interval", "Discordant", "p", "Significant"]
_COSTS = ("accuracy_percent", "accuracy_heldout_percent", "size_mib", "parameters", "macs")


def side_by_side_rows(record: Record) -> list[tuple[str, list[str]]]:
    """A label, then the values of the original network, of all methods pruned and of all fine-tuned; "-" if not run."""
    methods, runs = list(record["runs"]), {method: run for method, run in record["runs"].items() if run}
    measured = {method: dict(comparison_rows(run)) for method, run in runs.items()}
    rows = []
    for label in dict.fromkeys(label for table in measured.values() for label in table):
        values = {method: table.get(label, ["-"] * len(STAGES)) for method, table in measured.items()}
        # Each run measured the original network beside its own: both values, where they differ.
        original = " / ".join(dict.fromkeys(of_stages[0] for of_stages in values.values()))
        stages = [[values[m][stage] if m in values else "-" for m in methods] for stage in (1, 2)]
        rows.append((label, [original, *stages[0], *stages[1]]))
    summaries = {method: dict(summary_rows(run)) for method, run in runs.items()}
    for label in next(iter(summaries.values())):
        final = [summaries[m][label] if m in summaries else "-" for m in methods]
        rows.append((label, ["", *[""] * len(methods), *final]))
    return rows


def difference_rows(record: Record) -> list[list[str]]:
    """For each pair of networks the values of DIFFERENCE_COLUMNS, "-" where they are not known."""
    known = {(d["stage"], d["first"], d["second"]): d for d in record["differences"]}
    rows = []
    for stage in COMPARED:
        for first, second in pairs_of(list(record["runs"])):
            difference = known.get((stage, first, second))
            name = difference_name({"stage": stage, "first": first, "second": second})
            if difference is None:
                rows.append([name, *["-"] * (len(DIFFERENCE_COLUMNS) - 1)])
                continue
            low, high = difference["interval_points"]
            p = "< 0.001" if difference["p_value"] < 0.001 else f"{difference['p_value']:.3f}"
            discordant = f"{difference['only_second']} / {difference['only_first']}"
            significant = "yes" if difference["significant"] else "no"
            points = f"{difference['difference_points']:+.2f}"
            rows.append([name, points, f"{low:+.2f} to {high:+.2f}", discordant, p, significant])
    return rows


def difference_name(difference: Record) -> str:
    """The two networks of a difference: the first minus the second."""
    second = "Original" if difference["first"] == "original" else method_title(difference["first"])
    return f"{STAGES[difference['stage']]}: {method_title(difference['second'])} - {second}"


def explanation(record: Record) -> str:
    """What the columns of the differences mean, and what they do not cover."""
    runs = [run for run in record["runs"].values() if run]
    counts = {(heldout_images(run), run["dataset"]["calibration_images"]) for run in runs}
    if len(counts) == 1:
        ((heldout, calibration),) = counts
        where = f"the {heldout:,} held-out test images; the other {calibration:,} served for calibration"
    else:
        where = "the held-out test images of each method's run, which differ"
    sentences = [f"Differences are in percentage points, on {where}."]
    if any(" / " in values[0] for _, values in side_by_side_rows(record)):
        sentences.insert(0, "Two values of the original network: each run timed it beside its own networks.")
    if record["differences"]:
        sentences.append(
            "The 95% interval is from a bootstrap over the images. Discordant: images that only the first / only the "
            f"second network classifies correctly. p: exact McNemar test on these; significant below {LEVEL:g}, each "
            "difference by itself. This covers variation between test images, not between training seeds."
        )
    return " ".join(sentences)


def original_line(record: Record) -> str:
    """How the network that all methods started from was made."""
    run, preparation = any_run(record), record["preparation"]
    line = f"Original network: {prepared_with(run)}"
    if preparation and all(run["prepared_with"].get(key) == value for key, value in preparation["config"].items()):
        before = preparation["models"]["before"]["accuracy_percent"]
        return f"{line}; test accuracy {before:.2f}% before that training"
    return f"{line}; test accuracy before that training: -"


def comparison_text(record: Record) -> str:
    """All that the comparing script prints: the answer, the two tables, and their explanation."""
    titles = [method_title(method) for method in record["runs"]]
    widths = [max(10, len(title) + 2) for title in titles]
    rows = side_by_side_rows(record)
    # One table, or when that is too wide one per stage.
    together = 32 + 14 + 2 * sum(widths) <= WIDTH
    tables = [COMPARED] if together else [[stage] for stage in COMPARED]
    lines = [f"{listed(titles).upper()} - COMPARISON TABLE", "=" * WIDTH]
    for stages in tables:
        heading = [f"{STAGES[stage]:>{sum(widths)}}" for stage in stages]
        shown = [COMPARED.index(stage) * len(titles) + 1 for stage in stages]
        columns = [32, 14, *widths * len(stages)]
        lines += [
            f"{'':<46}{''.join(heading)}",
            row_text(["Metric", STAGES["original"], *titles * len(stages)], columns),
            "-" * WIDTH,
        ]
        for label, values in rows:
            of_stages = [value for start in shown for value in values[start : start + len(titles)]]
            lines.append(row_text([label, values[0], *of_stages], columns))
        lines.append("-" * WIDTH)
    names = [row[0] for row in difference_rows(record)]
    first = max(44, *(len(name) + 1 for name in names))
    return "\n".join(
        [
            *map(wrapped, record["answer"]),
            "",
            *map(wrapped, origin_lines({"dataset": any_run(record)["dataset"]})),
            wrapped(original_line(record)),
            "",
            *lines,
            "",
            *table_text([DIFFERENCE_COLUMNS, *difference_rows(record)], [first, 7, 17, 11, 8, 12]),
            wrapped(explanation(record)),
            *(f"- {remark}" for remark in record["remarks"]),  # not wrapped: they hold commands to copy
        ]
    )


def comparison_csv(record: Record) -> str:
    """One line per network, units in the names of the columns; empty where a value is not known."""
    names = {first: f"minus_{first.lower()}" for first, _ in pairs_of(list(record["runs"]))}
    measures = ("points", "low_points", "high_points", "p_value")
    columns = ["network", "method", *_COSTS, "latency_mean_ms", "throughput_images_per_s"]
    columns += [f"{prefix}_{measure}" for prefix in names.values() for measure in measures]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for method, run in record["runs"].items():
        for name, model in run["models"].items() if run else ():
            row = {"network": name, "method": method_title(method), **{key: model[key] for key in _COSTS}}
            row["latency_mean_ms"] = model["latency_ms"]["mean"]
            row["throughput_images_per_s"] = model["throughput_images_per_s"]
            for difference in record["differences"]:
                if (difference["stage"], difference["second"]) == (name, method):
                    values = (difference["difference_points"], *difference["interval_points"], difference["p_value"])
                    prefix = names[difference["first"]]
                    row.update({f"{prefix}_{measure}": value for measure, value in zip(measures, values)})
            writer.writerow(row)
    return file.getvalue()


def any_run(record: Record) -> Record:
    """The record of the first method that has run."""
    return next(run for run in record["runs"].values() if run)
