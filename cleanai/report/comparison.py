"""What the pruning scripts found, side by side: one record made of theirs, and its answer in words."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Optional

import numpy as np

from cleanai import UserError
from cleanai.measure.significance import LEVEL, compare_paired, shown_p, unpack
from cleanai.report.run_text import MODELS, Record
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.scenario import Scenario

METHODS = {"Coverage": "Neuron Coverage", "Wanda": "WANDA"}
STAGES = ("pruned", "fine_tuned")
PAIRS = (("original", "Coverage"), ("original", "Wanda"), ("Coverage", "Wanda"))  # what the second gains on the first

_Runs = Dict[str, Record]
_Flags = Dict[str, Optional[Dict[str, np.ndarray]]]


def compare_methods(scenario: Scenario, scripts: dict[str, str]) -> Record:
    """The record of a comparison, made of those that the other scripts of `scenario` left; nothing is measured.

    `scripts` names the script of each method, and of the preparation as "". Raises UserError when no method has run,
    when the methods pruned different networks, or when a record is damaged.
    """
    parts = {method: replace(scenario, method=method) for method in scripts}
    commands = {method: scenario.command(script) for method, script in scripts.items()}
    records = {method: read_record(part.record) for method, part in parts.items()}
    runs = {method: records[method] for method in METHODS if records[method]}
    if not runs:
        missing = [command for method, command in commands.items() if not records[method]]
        raise UserError(f"There is nothing to compare yet. Run first: {'; then: '.join(missing)}")
    if len({run["config"].get("fine_tuned_model") for run in runs.values()}) > 1:
        again = "; and: ".join(f"{commands[method]} --fresh" for method in runs)
        raise UserError(f"The methods pruned different fine-tuned models, which tells nothing of them. Run: {again}")
    try:
        flags = {method: heldout_flags(run) for method, run in runs.items()}
        remarks = _missing(parts, commands, records, flags)
        comparable = _same_images(runs)
        if not comparable:
            remarks.append(
                "The methods were measured on different held-out images (another seed, other calibration images or "
                "another dataset), so they are not compared with each other"
            )
        record = {
            "scenario": scenario.name,
            "preparation": records[""] and _only(records[""], "config", "models"),
            "runs": {method: _without_bits(runs[method]) if method in runs else None for method in METHODS},
            "differences": [
                {"stage": stage, "first": first, "second": second, **_difference(runs, flags, stage, first, second)}
                for stage in STAGES
                for first, second in PAIRS
                if second in runs and (first == "original" or (first in runs and comparable))
            ],
            "remarks": [*remarks, *_other_settings(runs)],
        }
        return {**record, "answer": _answer(record)}
    except (KeyError, ValueError, TypeError) as error:
        names = " or ".join(str(parts[method].record) for method in runs)
        raise UserError(f"{names} is damaged: delete it, and run its script again to measure anew") from error


def _chance(difference: Record) -> str:
    """Whether a difference is more than chance, in words; nothing when it is not known."""
    if "p_value" not in difference:
        return ""
    p = difference["p_value"]
    return f", {'more' if difference['more_than_chance'] else 'no more'} than chance would make ({shown_p(p)})"


def heldout_flags(run: Record) -> dict[str, np.ndarray] | None:
    """Of each network, which held-out images it got right: (N,); None when the record does not say."""
    if "heldout_bits" not in run:
        return None
    count = run["dataset"]["test_images"]
    heldout = unpack(run["heldout_bits"], count)
    return {name: unpack(run["models"][name]["correct_bits"], count)[heldout] for name in MODELS}


def _same_images(runs: _Runs) -> bool:
    """Whether the held-out images of all runs are the same, as far as their records say."""
    facts = {
        (*_only(run["dataset"], "name", "source", "test_images", "calibration_images").values(), run["config"]["seed"])
        for run in runs.values()
    }
    return len(facts) == 1 and len({run["heldout_bits"] for run in runs.values() if "heldout_bits" in run}) < 2


def _difference(runs: _Runs, flags: _Flags, stage: str, first: str, second: str) -> dict[str, Any]:
    networks = ((second, "original") if first == "original" else (first, stage), (second, stage))
    accuracies = [runs[method]["models"][name]["accuracy_heldout_percent"] for method, name in networks]
    if any(flags[method] is None for method, _ in networks):
        return {"difference_points": accuracies[1] - accuracies[0]}
    compared = compare_paired(*(flags[method][name] for method, name in networks))
    return {**compared, "more_than_chance": compared["p_value"] < LEVEL}


def _missing(
    parts: dict[str, Scenario], commands: dict[str, str], records: dict[str, Record | None], flags: _Flags
) -> list[str]:
    """What the records do not tell, and the command that changes it."""
    remarks = [] if records[""] else [f"The preparation has left no record; what makes it: {commands['']}"]
    remarks += [f"{METHODS[m]} has not run; what runs it: {commands[m]}" for m in METHODS if not records[m]]
    remarks += [
        f"The record of {METHODS[method]} does not hold which images its networks got right, so nothing is said about "
        f"chance. To add it, delete {parts[method].record} and run, with the options of that run: {commands[method]} "
        "(the networks are evaluated again, not pruned and not trained)"
        for method, known in flags.items()
        if known is None
    ]
    return remarks


def _other_settings(runs: _Runs) -> list[str]:
    if len(runs) < 2:
        return []
    (first, one), (second, two) = ((METHODS[method], run["config"]) for method, run in runs.items())
    return [
        f"The settings differ: --{key.replace('_', '-')} {one[key]} for {first}, {two[key]} for {second}"
        for key in one
        if key in two and one[key] != two[key]
    ]


def _answer(record: Record) -> list[str]:
    """What a reader wants to know, in a sentence on each method and one on the two."""
    differences = {(d["first"], d["second"]): d for d in record["differences"] if d["stage"] == "fine_tuned"}
    sentences = []
    for method, run in record["runs"].items():
        if run is None:
            continue
        before, after = (run["models"][name]["accuracy_heldout_percent"] for name in ("original", "fine_tuned"))
        points = after - before
        change = f"{'lost' if points < 0 else 'gained'} {abs(points):.2f} points of held-out accuracy "
        change += f"({before:.2f}% to {after:.2f}%){_chance(differences['original', method])}"
        kept = f"kept its held-out accuracy of {after:.2f}%"
        sentences.append(
            f"{METHODS[method]} removed {run['summary']['parameter_reduction_percent']:.1f}% of the parameters and "
            f"{run['summary']['macs_reduction_percent']:.1f}% of the FLOPs, made inference "
            f"{run['summary']['speedup']:.2f} times as fast, and {change if points else kept}."
        )
    between = differences.get(PAIRS[-1])
    if between:
        points = between["difference_points"]
        ahead, behind = (METHODS[method] for method in (PAIRS[-1] if points < 0 else PAIRS[-1][::-1]))
        unknown = "; the records do not tell whether any of this is more than chance"
        who = f"{ahead} is {abs(points):.2f} points ahead of {behind}{_chance(between) or unknown}"
        sentences.append(f"After fine-tuning {who if points else 'the two methods are level'}.")
    return sentences


def _without_bits(run: Record) -> Record:
    models = {
        name: {key: value for key, value in model.items() if key not in ("correct_bits", "latency_quantiles_ms")}
        for name, model in run["models"].items()
    }
    kept = _only(run, "scenario", "method", "config", "environment", "dataset", "prepared_with", "summary", "pruning")
    return {**kept, "models": models}


def _only(entries: Record, *keys: str) -> Record:
    return {key: entries[key] for key in keys}
