"""The controls beside the networks of scripts 2 and 3."""

import copy
import shutil
import sys

import controls
import pytest

from cleanai import UserError
from cleanai.measure.provenance import checkpoint_facts
from cleanai.measure.results import Split
from cleanai.network.evaluation import evaluate
from cleanai.network.models import save_network
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.checkpoints import read_record, write_record
from cleanai.runtime.scenario import Scenario
from tests.helpers import SCRIPTS, parameter_count

pytestmark = pytest.mark.long
CONFIG = {
    "epochs": 1,
    "batch_size": 64,
    "lr": 0.001,
    "weight_decay": 0.0,
    "train_samples": 512,
    "seed": 0,
    "precision": "float32",
    "calibration_batches": 2,
    "ratio": 0.2,
    "macs_ratio": 0.2,
    "steps": 1,
    "round_to": [8],
    "repair": "full",
    "repair_batches": 2,
}


@pytest.fixture(scope="module")
def finished(trained_network, digits, compute, tmp_path_factory):
    """A folder with networks and records of `CONFIG`, as scripts 1 to 3 write them."""
    folder = tmp_path_factory.mktemp("finished")
    preparation = Scenario("TS1", "ResNet18", "Digits", folder)
    facts = checkpoint_facts(preparation, digits, compute, {})
    network = copy.deepcopy(trained_network)
    save_network(preparation.fine_tuned, network, facts)
    few = digits.train.sample(128, seed=0)
    settings = PruneSettings(0.2, 0.2, steps=1, batch_size=64)
    prune_to_budget(network, WandaImportance(), PruneImages(few, few), compute, settings)
    measured = {}
    for name, each in (("original", trained_network), ("fine_tuned", network)):
        accuracy = evaluate(each, digits.test, compute).accuracy_percent
        measured[name] = {"accuracy_percent": accuracy, "accuracy_heldout_percent": accuracy}
    for scenario in map(preparation.of, controls.METHODS):
        save_network(scenario.pruned, network, facts)
        save_network(scenario.final, network, facts)
        write_record(scenario.record, {"config": CONFIG, "prepared_with": CONFIG, "models": measured})
    return folder


@pytest.fixture
def scenarios(finished, tmp_path, monkeypatch):
    """Scripts 2 and 3 in a copy of that folder."""
    shutil.copytree(finished, tmp_path / "checkpoints")
    options = ["--dataset", "Digits", "--checkpoints-dir", str(tmp_path / "checkpoints")]
    monkeypatch.setattr(sys, "argv", ["controls.py", *options])
    preparation = Scenario("TS1", "ResNet18", "Digits", tmp_path / "checkpoints")
    return [preparation.of(method) for method in controls.METHODS]


def test_controls_are_trained_like_the_networks_of_the_scripts_and_only_once(scenarios, capsys, tmp_path):
    controls.main()
    (path,) = (tmp_path / "checkpoints" / "TS1_Controls_ResNet18_Digits" / "reports").glob("*.csv")
    rows = controls.known_rows(path, {}, fresh=False)
    lines = [(row["network"], row["trained"]) for row in rows]
    assert lines == [
        ("Not pruned", "as script 1 left it"),
        ("Pruned by Neuron Coverage", "trained on"),
        ("Pruned by WANDA", "trained on"),
        ("Not pruned", "trained on"),
        ("Pruned at random", "trained on"),
        ("Pruned by Neuron Coverage", "its widths alone, from random weights"),
        ("Pruned by WANDA", "its widths alone, from random weights"),
    ]
    record = read_record(scenarios[1].record)
    assert rows[2]["accuracy_percent"] == f"{record['models']['fine_tuned']['accuracy_percent']:.2f}"
    assert {(row["epochs"], row["train_images"]) for row in rows} == {("1", "512")}
    before, _, _, trained_on, at_random, *from_scratch = (float(row["accuracy_percent"]) for row in rows)
    assert trained_on > before + 5, "a second epoch continues the first"
    assert at_random > before
    assert max(from_scratch) < trained_on - 5, "random weights have only one epoch"
    assert "AFTER 1 FURTHER EPOCH OF 512 IMAGES" in capsys.readouterr().out

    controls.write_rows(path, rows[:-1])
    controls.main()
    assert controls.known_rows(path, {}, fresh=False) == rows
    assert capsys.readouterr().out.count(", its widths alone, from random weights\n") == 1


def test_the_random_control_has_the_budget_and_the_repair_of_the_scripts(trained_network, digits, compute):
    network, split = copy.deepcopy(trained_network), Split.of(digits, CONFIG)
    pruned = controls.pruned_at_random(network, digits, split, {**CONFIG, "keep_layers": ["layer1.*"]}, compute)
    assert parameter_count(pruned) / parameter_count(trained_network) == pytest.approx(0.8, abs=0.001)
    assert pruned.layer1[0].conv1.out_channels == 64
    accuracies = [evaluate(each, digits.test, compute).accuracy_percent for each in (trained_network, pruned)]
    assert accuracies[1] > accuracies[0] - 5


def test_controls_of_other_networks_and_missing_records_are_refused(scenarios, tmp_path):
    path = scenarios[0].of("Controls").table
    path.parent.mkdir(parents=True)
    controls.write_rows(path, [{"network": "Not pruned", "epochs": "30"}])
    with pytest.raises(
        UserError, match="was measured with another network, other images or settings: start over with --fresh"
    ):
        controls.main()
    scenarios[1].record.unlink()
    with pytest.raises(UserError, match=rf"{SCRIPTS[2]} --dataset Digits"):
        controls.main()
