"""What the networks of scripts 2 and 3 are measured by."""
import json
import sys

import controls
import pytest

from cleanai import UserError
from cleanai.network.evaluation import evaluate
from cleanai.network.models import save_network
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.runtime.checkpoints import write_record
from cleanai.runtime.scenario import Scenario

CONFIG = {
    "epochs": 1,
    "batch_size": 64,
    "lr": 0.001,
    "weight_decay": 0.0,
    "train_samples": 512,
    "seed": 0,
    "precision": "float32",
    "calibration_batches": 2,
}


@pytest.fixture
def scenarios(network, digits, compute, tmp_path, monkeypatch):
    """Scripts 2 and 3, which have left networks and records of `CONFIG`; a benchmark that writes beside them."""
    scenarios = [Scenario("TS1", "ResNet18", "Digits", tmp_path / "checkpoints", method) for method in controls.SCRIPTS]
    facts = {"model": "ResNet18", "classes": list(digits.classes), "config": {}}
    save_network(scenarios[0].fine_tuned, network, facts)
    few = digits.train.sample(128, seed=0)
    prune_to_budget(network, WandaImportance(), few, few, compute, 0.2, 0.2, 1, 64)
    accuracy = evaluate(network, digits.test, compute).accuracy_percent
    measured = {"accuracy_percent": accuracy, "accuracy_heldout_percent": accuracy}
    for scenario in scenarios:
        save_network(scenario.pruned, network, facts)
        save_network(scenario.final, network, facts)
        write_record(scenario.record, {"config": CONFIG, "models": {"original": measured, "fine_tuned": measured}})
    monkeypatch.setattr(controls, "FOLDER", tmp_path / "results")
    options = ["--dataset", "Digits", "--checkpoints-dir", str(tmp_path / "checkpoints")]
    monkeypatch.setattr(sys, "argv", ["controls.py", *options])
    return scenarios


def test_controls_are_trained_as_the_scripts_trained_and_not_twice(scenarios, capsys, tmp_path):
    controls.main()
    (path,) = (tmp_path / "results").glob("*.csv")
    rows = controls.known_rows(path, {}, fresh=False)
    lines = [(row["network"], row["trained"]) for row in rows]
    assert lines == [
        ("Not pruned", "as script 1 left it"),
        ("Pruned by Neuron Coverage", "trained on"),
        ("Pruned by WANDA", "trained on"),
        ("Not pruned", "trained on"),
        ("Pruned by Neuron Coverage", "its widths alone, from random weights"),
        ("Pruned by WANDA", "its widths alone, from random weights"),
    ]
    record = json.loads(scenarios[1].record.read_text(encoding="utf-8"))
    assert rows[2]["accuracy_percent"] == f"{record['models']['fine_tuned']['accuracy_percent']:.2f}"
    assert {(row["epochs"], row["train_images"]) for row in rows} == {("1", "512")}
    before, _, _, trained_on, *from_scratch = (float(row["accuracy_percent"]) for row in rows)
    assert trained_on > before + 5, "a second epoch, of the network as it was"
    assert max(from_scratch) < trained_on - 5, "and a first one"
    assert "AFTER 1 FURTHER EPOCH OF 512 IMAGES" in capsys.readouterr().out

    controls.write_rows(path, rows[:-1])
    controls.main()
    assert controls.known_rows(path, {}, fresh=False) == rows
    assert capsys.readouterr().out.count(", its widths alone, from random weights\n") == 1


def test_controls_of_other_networks_or_without_any_are_refused(scenarios, tmp_path):
    path = tmp_path / "results" / "TS1_ResNet18_Digits.csv"
    controls.write_rows(path, [{"network": "Not pruned", "epochs": "30"}])
    with pytest.raises(UserError, match="was measured with another network or other images: start over with --fresh"):
        controls.main()
    scenarios[1].record.unlink()
    with pytest.raises(UserError, match=r"Run first: python test_scenarios/TS1_03_wanda_pruning.py --dataset Digits"):
        controls.main()
