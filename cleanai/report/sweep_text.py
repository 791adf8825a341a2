"""The sweep over ratios as text and as CSV, made from its record alone."""

from __future__ import annotations

import csv
import io

from cleanai.report.wording import (
    STAGES,
    WIDTH,
    Record,
    calibrated_on_train,
    counted,
    counted_points,
    have_same_pictures,
    listed,
    method_title,
    origin_lines,
    prepared_with,
    table_text,
    wrapped,
)
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.methods import METHODS
from cleanai.runtime.scenario import Scenario

TOLERANCE_POINTS = 1.0  # of accuracy, in the answer
_FEW_IMAGES = 1000
_ABREAST = 5  # criteria in a table
COSTS = {"parameters": "Parameters", "macs": "FLOPs"}


# Settings on which a network and the held-out images depend, and what they were before they were settings.
_SAME = {
    "fine_tuned_model": None,
    "calibration_batches": None,
    "batch_size": None,
    "calibrate_on": "test",
    "seed": None,
}


def chosen_networks(scenario: Scenario, sweep: Record) -> list[Record]:
    """The networks of the pruning scripts that can be shown beside the sweep with this record, if there are such.

    They were made from the same fine-tuned model, and their held-out accuracy is on the same test images. Each has
    `criterion`, `stage` ("pruned" or "fine_tuned"), `parameters`, `macs`, and that accuracy.
    """
    chosen = []
    for method in METHODS:
        record = read_record(scenario.of(method).record)
        if record and _is_comparable(record, sweep):
            for stage in ("pruned", "fine_tuned") if record["config"]["epochs"] else ("pruned",):
                model = record["models"][stage]
                network = {"criterion": method_title(method), "stage": stage, **{cost: model[cost] for cost in COSTS}}
                chosen.append({**network, "accuracy_percent": model["accuracy_heldout_percent"]})
    return chosen


def _is_comparable(record: Record, sweep: Record) -> bool:
    of_record, of_sweep = record["config"], sweep["config"]
    same = all(of_record.get(name, usual) == of_sweep.get(name, usual) for name, usual in _SAME.items())
    return same and have_same_pictures([record, sweep])


def criteria(record: Record) -> list[str]:
    """The names of the criteria in a sweep, in their order."""
    return list(dict.fromkeys(point["criterion"] for point in record["points"]))


def points_of(record: Record, criterion: str) -> list[Record]:
    """The points of a criterion, in the order of the ratios."""
    return [point for point in record["points"] if point["criterion"] == criterion]


def sweep_answer(record: Record) -> str:
    """The highest ratio up to which each criterion stays near the original network at every ratio, in words."""
    original, epochs = record["original"]["accuracy_percent"], record["config"]["epochs"]
    ratios, images = record["config"]["ratios"], record["dataset"]["accuracy_images"]
    tolerance = _tolerance(record)
    reach: dict[float, list[str]] = {}
    outside = []
    for name in criteria(record):
        lost = [original - point["accuracy_percent"] for point in points_of(record, name)]
        count = [*(points <= tolerance + 1e-6 for points in lost), False].index(False)  # 80 - 79.3 is more than 0.7
        reach.setdefault(ratios[count - 1] if count else 0, []).append(name)
        if count < len(lost):
            outside.append(
                f"{name} loses {counted(round(lost[count] * images / 100), 'image')} at {100 * ratios[count]:g}%"
            )
    how = f"With {counted(epochs, 'epoch')} of fine-tuning at each ratio" if epochs else "Without fine-tuning"
    what = f"within {counted_points(tolerance)} of the original network's {original:.2f}% accuracy"
    few = ""
    if images < _FEW_IMAGES:
        few = f" Few images decide this: one of the {images:,} test images is {100 / images:.1f} points"
        few += f"; {listed(outside)}." if outside else "."
    (furthest, best), *others = sorted(reach.items(), reverse=True)
    if not furthest:
        return f"{how}, no criterion stays {what}, not even with {100 * ratios[0]:g}% removed.{few}"
    limit = ", the highest ratio tried," if furthest == ratios[-1] else ""
    rest = [
        f"; {listed(names)} {f'{100 * ratio:g}%' if ratio else f'not even {100 * ratios[0]:g}%'}"
        for ratio, names in others
    ]
    return (
        f"{how}, {listed(best)} can remove {100 * furthest:g}% of the parameters and of the FLOPs{limit} "
        f"and stay {what}{''.join(rest)}.{few}"
    )


def _tolerance(record: Record) -> float:
    return record.get("tolerance_points", TOLERANCE_POINTS)


def criteria_groups(record: Record) -> list[list[str]]:
    """The criteria of each table."""
    names = criteria(record)
    return [names[start : start + _ABREAST] for start in range(0, len(names), _ABREAST)]


def sweep_text(record: Record) -> str:
    """All that the script prints of a sweep: the answer, the tables, and their explanation."""
    tables = [
        line
        for names in criteria_groups(record)
        for line in table_text(sweep_rows(record, names), [14, *[min(21, 80 // len(names))] * len(names)])
    ]
    return "\n".join(
        [
            wrapped(record["answer"]),
            "",
            origin_lines({"dataset": record["dataset"]})[0],
            wrapped(f"Original network: {prepared_with(record)}"),
            "",
            f"ACCURACY BY RATIO - {heading(record).upper()}",
            "=" * WIDTH,
            *tables,
            "",
            *(table_text(chosen_rows(record), [44, 18, 18, 18]) if record["chosen"] else []),
            wrapped(explanation(record)),
        ]
    )


def heading(record: Record) -> str:
    """The heading of the table of accuracies."""
    original = record["original"]["accuracy_percent"]
    return f"Accuracy (%), and the difference to the original network's {original:.2f}"


def sweep_rows(record: Record, names: list[str]) -> list[list[str]]:
    """A heading, and a row per ratio: the accuracies of these criteria, with their change."""
    original = record["original"]["accuracy_percent"]
    rows = [["Removed", *names]]
    for number, ratio in enumerate(record["config"]["ratios"]):
        accuracies = [points_of(record, name)[number]["accuracy_percent"] for name in names]
        rows.append([f"{100 * ratio:g}%", *(f"{value:.2f} ({value - original:+.2f})" for value in accuracies)])
    return rows


def removed_percent(network: Record, original: Record, cost: str) -> float:
    """How much less of a cost a network has, in percent; 0 where nothing is counted."""
    return 100 * (1 - network[cost] / original[cost]) if original[cost] else 0.0


def chosen_rows(record: Record) -> list[list[str]]:
    """A heading, and a row for each network of the pruning scripts."""
    rows = [["Network of the pruning scripts", *(f"{title} (%)" for title in COSTS.values()), "Accuracy (%)"]]
    for network in record["chosen"]:
        changes = [f"{0 - removed_percent(network, record['original'], cost):+.1f}" for cost in COSTS]
        name = f"{network['criterion']}, {STAGES[network['stage']]}"
        rows.append([name, *changes, f"{network['accuracy_percent']:.2f}"])
    return rows


def explanation(record: Record) -> str:
    """How the accuracies were measured, and what they do not cover."""
    count, calibration = (record["dataset"][key] for key in ("accuracy_images", "calibration_images"))
    others = "training images" if calibrated_on_train(record) else "others"
    sentences = [
        f"Accuracy is on {count:,} test images, calibration used {calibration:,} {others}. One point is "
        f"{count / 100:g} images. The answer names the highest ratio up to which every accuracy is within "
        f"{counted_points(_tolerance(record))}.",
        "Each criterion removes the same share of the parameters and of the FLOPs, from ratio to ratio, with repair "
        "after each. There is one run per criterion: another seed changes the numbers, most of all for random choice.",
    ]
    if record["chosen"]:
        sentences.append("Stars are the networks of the pruning scripts, on the test images held out there.")
    return " ".join(sentences)


def sweep_csv(record: Record) -> str:
    """A line per network, units in the names of the columns. `stage` distinguishes the scripts' networks."""
    file = io.StringIO()
    columns = ["criterion", "stage", "ratio", "accuracy_percent", "parameters", "macs"]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerow({"stage": "original", "ratio": 0, **record["original"]})
    writer.writerows({"stage": "sweep", **point} for point in record["points"])
    writer.writerows(record["chosen"])
    return file.getvalue()
