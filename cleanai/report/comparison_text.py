"""The comparison of the methods as text and as CSV, made from its record alone."""

from __future__ import annotations

import csv
import io
import textwrap

from cleanai.measure.significance import LEVEL, stricter_test
from cleanai.report.comparison import COMPARED, pairs_of
from cleanai.report.run_text import comparison_rows, summary_rows
from cleanai.report.wording import (
    STAGES,
    WIDTH,
    Record,
    calibrated_on_train,
    heldout_images,
    interval_text,
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
        # Each run measured the original network beside its own: all values, where they differ.
        known = list(dict.fromkeys(of_stages[0] for of_stages in values.values() if of_stages[0] != "-"))
        original = f"{min(known, key=float)} to {max(known, key=float)}" if len(known) > 2 else " / ".join(known)
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
            p = "< 0.001" if difference["p_value"] < 0.001 else f"{difference['p_value']:.3f}"
            discordant = f"{difference['only_second']} / {difference['only_first']}"
            significant = "yes" if difference["significant"] else "no"
            points = f"{difference['difference_points']:+.2f}"
            rows.append([name, points, interval_text(difference["interval_points"]), discordant, p, significant])
    return rows


def difference_name(difference: Record) -> str:
    """The two networks of a difference: the first minus the second."""
    second = "Original" if difference["first"] == "original" else method_title(difference["first"])
    return f"{STAGES[difference['stage']]}: {method_title(difference['second'])} - {second}"


def explanation(record: Record) -> str:
    """What the columns of the differences mean, and what they do not cover."""
    runs = [run for run in record["runs"].values() if run]
    counts = {(heldout_images(run), run["dataset"]["calibration_images"], calibrated_on_train(run)) for run in runs}
    if len(counts) == 1:
        ((heldout, calibration, on_train),) = counts
        served = f"{calibration:,} training images" if on_train else f"the other {calibration:,}"
        where = f"the {heldout:,} held-out test images; {served} served for calibration"
    else:
        where = "the held-out test images of each method's run, which differ"
    sentences = [f"Differences are in percentage points, on {where}."]
    if any(" " in values[0] for _, values in side_by_side_rows(record)):
        sentences.insert(0, "Several values of the original network: each run timed it beside its own networks.")
    if record["differences"]:
        sentences.append(
            "The 95% interval is Tango's score interval. Discordant: images that only the first / only the second "
            f"network classifies correctly. p: exact McNemar test on these; significant below {LEVEL:g}, each "
            "difference by itself. This covers variation between test images, not between training seeds."
        )
    sentences += [f"{difference_name(d)}: {stricter_test(d)}" for d in record["differences"] if stricter_test(d)]
    return " ".join(sentences)


def original_line(record: Record) -> str:
    """How the network that all methods started from was made."""
    run, preparation = any_run(record), record["preparation"]
    line = f"Original network: {prepared_with(run)}"
    if not run["prepared_with"]["epochs"]:
        return line
    if preparation and all(run["prepared_with"].get(key) == value for key, value in preparation["config"].items()):
        before = preparation["models"]["before"]["accuracy_percent"]
        return f"{line}; test accuracy {before:.2f}% before that training"
    return f"{line}; test accuracy before that training: -"


def comparison_text(record: Record) -> str:
    """All that the comparing script prints: the answer, the warnings, the tables, and their explanation."""
    titles = [method_title(method) for method in record["runs"]]
    differences = [DIFFERENCE_COLUMNS, *difference_rows(record)]
    longest = [max(map(len, column)) for column in zip(*differences)]
    widths = [max(least, 1 + length) for least, length in zip((7, 17, 11, 8), longest[1:])]
    return "\n".join(
        [
            *map(wrapped, record["answer"]),
            *("\n" + wrapped(f"!!! WARNING: {warning}") for warning in record["warnings"]),
            *("\n" + wrapped(f"Note: {note}") for note in record["notes"]),
            "",
            *map(wrapped, origin_lines({"dataset": any_run(record)["dataset"]})),
            wrapped(original_line(record)),
            "",
            textwrap.fill(f"{listed(titles).upper()} - COMPARISON TABLE", WIDTH),
            "=" * WIDTH,
            *_side_by_side(record, titles),
            "",
            *table_text(differences, [WIDTH - sum(widths) - 12, *widths, 12]),
            wrapped(explanation(record)),
            *(f"- {remark}" for remark in record["remarks"]),  # not wrapped: they hold commands to copy
        ]
    )


def table_columns(widths: list[int], room: int) -> list[list[int]]:
    """The networks of each table of the methods side by side, from the widths of the methods' columns.

    Networks are numbered as the values of `side_by_side_rows`. All are in one table if they fit in `room`, otherwise
    those of a stage, otherwise as many of them as fit.
    """
    count = len(widths)
    if len(COMPARED) * sum(widths) <= room:
        return [list(range(1, 1 + len(COMPARED) * count))]
    tables: list[list[int]] = []
    for stage in range(len(COMPARED)):
        left = 0
        for method, width in enumerate(widths):
            if not method or width > left:
                tables.append([])
                left = room
            tables[-1].append(1 + stage * count + method)
            left -= width
    return tables


def _side_by_side(record: Record, titles: list[str]) -> list[str]:
    """The lines of the tables of all methods, each as wide as a table may be; long titles are broken."""
    rows = side_by_side_rows(record)
    original = max(15, *(1 + len(values[0]) for _, values in rows)) - 1
    widths = [min(18, max(10, len(title) + 2)) for title in titles]
    lines = []
    for table in table_columns(widths, WIDTH - 32 - original):
        columns = [32, original, *(widths[(number - 1) % len(titles)] for number in table)]
        heading = ""
        for stage, key in enumerate(COMPARED):
            own = [widths[(number - 1) % len(titles)] for number in table if (number - 1) // len(titles) == stage]
            heading += f"{STAGES[key]:>{sum(own)}}" if own else ""
        shown = [titles[(number - 1) % len(titles)] for number in table]
        lines += [
            f"{'':<{32 + original}}{heading}",
            row_text(["Metric", STAGES["original"], *shown], columns),
            "-" * WIDTH,
            *(
                row_text([label, values[0], *(values[number] for number in table)], columns)
                for label, values in rows
                if any(values[number] for number in table)  # the summary is of the fine-tuned networks
            ),
            "-" * WIDTH,
        ]
    return lines


def comparison_csv(record: Record) -> str:
    """One line per network, units in the names of the columns; empty where a value is not known."""
    names = {first: f"minus_{first.lower()}" for first, _ in pairs_of(list(record["runs"]))}
    measures = ("points", "low_points", "high_points", "p_value")
    columns = ["network", "method", *_COSTS, "latency_mean_ms", "latency_median_ms", "throughput_images_per_s"]
    columns += [f"{prefix}_{measure}" for prefix in names.values() for measure in measures]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for method, run in record["runs"].items():
        for name, model in run["models"].items() if run else ():
            row = {"network": name, "method": method_title(method), **{key: model[key] for key in _COSTS}}
            row["latency_mean_ms"] = model["latency_ms"]["mean"]
            row["latency_median_ms"] = model["latency_ms"]["p50"]
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
