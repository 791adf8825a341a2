"""The committed runs in one table, and the answers to a sceptic, against the figures of the records themselves."""

import copy
import json

import pytest
import runs
from make_docs import NAME, RESULTS, SHOWN, load

FOLDER = (RESULTS / SHOWN).parent


@pytest.fixture(scope="module")
def committed():
    return runs.load_runs(FOLDER)


def test_each_committed_run_has_a_row_with_its_changes(committed):
    rows = runs.table(committed).splitlines()[1:]
    assert len(rows) == len(list(FOLDER.glob("*/TS1_Coverage_*.json")) + list(FOLDER.glob("*/TS1_Wanda_*.json")))
    models = load(f"TS1_Wanda_{NAME}")["models"]
    percent = {name: model["accuracy_heldout_percent"] for name, model in models.items()}
    (row,) = (row.split() for row in rows if row.split()[:2] == [SHOWN.split("/")[1], "WANDA"])
    changes = [f"{percent[name] - percent['original']:+.2f}" for name in ("pruned", "fine_tuned")]
    assert row[7:10] == [f"{percent['original']:.2f}", *changes]


def test_a_run_without_fine_tuning_has_no_change_by_it(committed):
    run = copy.deepcopy(next(iter(committed.values())))
    run["config"]["epochs"] = 0
    run["models"]["fine_tuned"] = run["models"]["pruned"]
    values = runs.table({"one": run}).splitlines()[1].split()
    changes = [value for value in values if value[0] in "+-"]
    assert len(changes) == 1
    assert runs.by_epochs({**committed, "one": run}, []) == runs.by_epochs(committed, [])


def test_criteria_of_several_seeds_come_before_the_sweep_of_one():
    sweep = load(f"TS1_Sweep_{NAME}")
    (half,) = (p for p in sweep["points"] if p["ratio"] == 0.5 and p["criterion"] == "WANDA")
    lost = f"{sweep['original']['accuracy_percent'] - half['accuracy_percent']:.2f}"
    assert f"{lost} points by WANDA" in runs.by_chance(sweep, [])
    rows = [
        {
            "criterion": name,
            "seed": str(seed),
            "original_percent": "90.00",
            "parameters_asked_percent": f"{share:.2f}",
            "reconstructed_percent": f"{80 + 2 * seed + better - share / 10:.2f}",
        }
        for name, better in (("WANDA", 5), ("random", 0))
        for seed in range(3)
        for share in (20, 50, 70)
    ]
    answer = runs.by_chance(sweep, rows)
    assert "With 50% and 70% of " in answer and "(3 seeds, " in answer
    assert "8.00 (2.00) and 10.00 (2.00) points by WANDA, 13.00 (2.00) and 15.00 (2.00) points by random" in answer
    assert lost not in answer


def test_what_further_training_brings_to_the_network_that_was_not_pruned_is_said(committed):
    rows = [
        {"network": "Not pruned", "trained": "as script 1 left it", "heldout_percent": "91.64"},
        {"network": "Pruned by WANDA", "trained": "trained on", "heldout_percent": "91.50"},
        {"network": "Not pruned", "trained": "trained on", "heldout_percent": "91.97"},
    ]
    assert "from 91.64% to 91.97%" in runs.by_epochs(committed, rows)


def test_slower_widths_are_named(committed):
    record = json.loads((RESULTS / "speed" / "latency_CIFAR10_cpu.json").read_text(encoding="utf-8"))
    timed = record["precisions"]["float32"]
    for name in list(timed):
        timed[name]["latency_ms"]["p50"] = 4.0
    timed["multiples of 8"]["latency_ms"]["p50"] = 5.0
    record["precisions"] = {"float32": timed}
    answer = runs.faster(committed, record)
    assert "multiples of 8 in float32 (0.80x)" in answer
    assert "multiples of 32" not in answer
    assert "slower" not in runs.faster(committed, {**record, "precisions": {}})
