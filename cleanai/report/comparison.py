"""The records of the pruning scripts side by side: one record made from theirs, and its answer in words."""

from __future__ import annotations

import copy
import re
from itertools import combinations
from pathlib import Path
from typing import Any, Dict

import numpy as np

from cleanai import UserError
from cleanai.measure.significance import LEVEL, compare_paired, heldout_flags, verdict
from cleanai.report.notes import notes
from cleanai.report.wording import (
    Record,
    have_same_pictures,
    heldout_images,
    interval_text,
    is_narrow,
    method_title,
    speedup,
)
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.methods import METHODS
from cleanai.runtime.scenario import DATA_DIR, Scenario, weights_hint

COMPARED = ("pruned", "fine_tuned")
_SAME_TIME = 1.15  # a larger ratio of two times of one network is not by chance

_Runs = Dict[str, Record]
_Flags = Dict[str, Dict[str, np.ndarray]]


def pairs_of(methods: list[str]) -> list[tuple[str, str]]:
    """The pairs whose accuracies are compared: each method with the original network, then each two methods."""
    return [*(("original", method) for method in methods), *combinations(methods, 2)]


def compare_methods(scenario: Scenario) -> Record:
    """The record of a comparison, made from the records of the other scripts of `scenario`; nothing is measured.

    Raises UserError when no method has run, when the methods pruned different networks, or when a record is damaged.
    """
    parts = {method: scenario.of(method) for method in METHODS}
    preparation = read_record(scenario.of("").record)
    records = {method: read_record(part.record) for method, part in parts.items()}
    runs = {method: record for method, record in records.items() if record}
    data_dir = _data_dir(runs)
    one = next(iter(runs.values()), {})  # whose settings the others get, to be comparable
    settings = {method: runs.get(method, one).get("config") for method in METHODS}
    commands = {m: part.command(settings[m], data_dir, without_defaults=True) for m, part in parts.items()}
    if not runs:
        missing = [*([] if preparation else [scenario.of("").command()]), *commands.values()]
        raise UserError(f"There is nothing to compare yet. Run first: {'; then: '.join(missing)}")
    if len({run["config"]["fine_tuned_model"] for run in runs.values()}) > 1:
        again = "; and: ".join(f"{commands[method]} --fresh" for method in runs)
        raise UserError(f"The methods pruned different fine-tuned models and cannot be compared. Run: {again}")
    flags = {method: heldout_flags(run) for method, run in runs.items()}
    prepare = scenario.of("").command(one.get("prepared_with"), data_dir, without_defaults=True)
    hint = weights_hint(one.get("prepared_with"))
    remarks = [] if preparation else [f"The preparation has no record. To make it{hint}: {prepare}"]
    remarks += [f"{method_title(m)} has not run. To run it: {commands[m]}" for m in METHODS if m not in runs]
    comparable = _same_images(runs)
    if not comparable:
        remarks.append(
            "The methods used different held-out images (another seed, number of calibration images, dataset or other "
            "pictures in it), so they are not compared with each other"
        )
    record = {
        "scenario": scenario.name,
        "preparation": preparation and _only(preparation, "config", "models"),
        "runs": {method: _without_bits(runs[method]) if method in runs else None for method in METHODS},
        "differences": [
            {"stage": stage, "first": first, "second": second, **_difference(flags, stage, first, second)}
            for stage in COMPARED
            for first, second in pairs_of(list(METHODS))
            if second in runs and (first == "original" or (first in runs and comparable))
        ],
        "warnings": [f"{method_title(method)}: {text}" for method, run in runs.items() for text in run["warnings"]],
        "notes": [*_notes(runs), *_other_times(runs)],
        "remarks": remarks,
    }
    return {**record, "answer": _answer(record)}


def _data_dir(runs: _Runs) -> Path:
    """The folder of the images that the runs name in their commands."""
    named = (re.search(r' --data-dir "([^"]*)"', command) for run in runs.values() for command in run["commands"])
    return next((Path(found[1]) for found in named if found), DATA_DIR)


def heldout_change(run: Record) -> Record:
    """The final network compared with the original one on the held-out images, as `compare_paired` does it."""
    flags = heldout_flags(run)
    return compare_paired(flags["original"], flags["fine_tuned"])


def _same_images(runs: _Runs) -> bool:
    """Whether the held-out images of all runs are the same."""
    chosen = {(run["dataset"]["name"], run["dataset"]["source"], run["heldout_bits"]) for run in runs.values()}
    return len(chosen) == 1 and have_same_pictures(list(runs.values()))


def _difference(flags: _Flags, stage: str, first: str, second: str) -> dict[str, Any]:
    before = flags[second]["original"] if first == "original" else flags[first][stage]
    compared = compare_paired(before, flags[second][stage])
    return {**compared, "significant": compared["p_value"] < LEVEL}


def _other_settings(runs: _Runs) -> list[str]:
    """The settings that differ between the methods, but for those that change no network: a sentence, or none."""
    configs = {method_title(method): run["config"] for method, run in runs.items()}
    differing = []
    auto = any(config["ratio"] == "auto" for config in configs.values())
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        if key == "accept_drop" and not auto:
            continue
        values = {name: config[key] for name, config in configs.items() if key in config}
        if len({str(value) for value in values.values()}) > 1:
            shown = ", ".join(f"{value} for {name}" for name, value in values.items())
            differing.append(f"--{key.replace('_', '-')} {shown}")
    if not differing:
        return []
    return [f"Their settings differ: {'; '.join(differing)}."]


def _notes(runs: _Runs) -> list[str]:
    return [f"{method_title(method)}: {text}" for method, run in runs.items() for text in notes(run)]


def _other_times(runs: _Runs) -> list[str]:
    """A note where the original network, the same in all runs, did not take the same time in them."""
    times = {method_title(method): run["models"]["original"]["latency_ms"]["p50"] for method, run in runs.items()}
    if max(times.values()) <= _SAME_TIME * min(times.values()):
        return []
    shown = ", ".join(f"{time:.2f} ms for {title}" for title, time in times.items())
    return [
        f"The machine was not equally fast in the runs: the original network took {shown} (medians). Compare "
        "speed-ups, not times."
    ]


def _answer(record: Record) -> list[str]:
    """The result in words: a sentence on each method, and one on each two of them."""
    differences = {(d["first"], d["second"]): d for d in record["differences"] if d["stage"] == "fine_tuned"}
    runs = {method: run for method, run in record["runs"].items() if run}
    sentences = []
    for method, run in runs.items():
        before, after = (run["models"][name]["accuracy_heldout_percent"] for name in ("original", "fine_tuned"))
        points, tested = after - before, differences["original", method]
        if points:
            change = f"{'lost' if points < 0 else 'gained'} {abs(points):.2f} points of held-out accuracy "
            change += f"({before:.2f}% to {after:.2f}%), {verdict(tested['p_value'])}"
        elif is_narrow(tested["interval_points"]):
            change = f"kept its held-out accuracy of {after:.2f}%"
        else:
            change = f"showed the same held-out accuracy of {after:.2f}%"
        sentences.append(
            f"{method_title(method)} removed {run['summary']['parameter_reduction_percent']:.1f}% of the parameters "
            f"and {run['summary']['macs_reduction_percent']:.1f}% of the FLOPs, made inference "
            f"{speedup(run['models']):.2f} times as fast, and {change}.{_allowed(run, tested)}"
        )
    between = []
    for first, second in combinations(runs, 2):
        if (first, second) in differences:
            tested = differences[first, second]
            tuned = {bool(runs[method]["config"]["epochs"]) for method in (first, second)}
            when = "" if len(tuned) > 1 else "After fine-tuning " if tuned.pop() else "Without fine-tuning "
            between.append(f"{when}{_between(first, second, tested)}{_allowed(runs[first], tested)}")
    return [*sentences, *(_other_settings(runs) if between else []), *between]


def _between(first: str, second: str, difference: Record) -> str:
    points = difference["difference_points"]
    if not points:
        same = "are equal" if is_narrow(difference["interval_points"]) else "classify as many held-out images correctly"
        return f"{method_title(first)} and {method_title(second)} {same}."
    ahead, behind = map(method_title, (first, second) if points < 0 else (second, first))
    return f"{ahead} is {abs(points):.2f} points ahead of {behind}, {verdict(difference['p_value'])}."


def _allowed(run: Record, difference: Record) -> str:
    """What a difference may be, where it is not significant and the interval is wide."""
    if difference["significant"] or is_narrow(difference["interval_points"]):
        return ""
    interval = interval_text(difference["interval_points"])
    return f" {heldout_images(run):,} images are too few to be sure: the 95% interval is {interval} points."


def _without_bits(run: Record) -> Record:
    models = copy.deepcopy(run["models"])  # so that a missing entry is still named with its file
    for model in models.values():
        for key in ("correct_bits", "latency_quantiles_ms"):
            model.pop(key, None)
    kept = _only(run, "scenario", "method", "config", "environment", "dataset", "prepared_with", "summary", "pruning")
    return {**kept, "models": models}


def _only(entries: Record, *keys: str) -> Record:
    return {key: entries[key] for key in keys}
