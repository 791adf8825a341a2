"""Pruning up to a limit: as far as the accuracy allows, or until the network is fast enough."""

import copy

import pytest
import torch

import cleanai.search
from cleanai import UserError, prune
from cleanai.network.evaluation import evaluate
from cleanai.network.training import TrainSettings, fine_tune
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.layers import layer_widths
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.scenario import Scenario
from cleanai.search import Limits, prune_to_limits
from tests.helpers import parameter_count
from tests.small_network import SmallNetwork


@pytest.fixture(scope="module")
def images(digits):
    return PruneImages(digits.test.select(torch.arange(200)), digits.repair_sample(128, seed=0))


@pytest.fixture(scope="module")
def trained(digits, compute, tmp_path_factory):
    torch.manual_seed(0)
    network = SmallNetwork(10)
    scenario = Scenario("T", "SmallNetwork", "Digits", tmp_path_factory.mktemp("small"))
    settings = TrainSettings(epochs=3, batch_size=32, lr=0.01)
    fine_tune(network, digits.with_train_samples(512, seed=0), compute, settings, scenario, {"config": {}})
    return network.eval()


def _search(network, images, compute, limits, repair="full", ratio=0.9):
    settings = PruneSettings(ratio, 0.9, round_to=(4, 1), repair=repair, batch_size=64)
    return prune_to_limits(network, WandaImportance(), images, compute, settings, limits)


def test_pruning_ends_with_the_last_step_within_the_accepted_drop(trained, images, compute, capsys, monkeypatch):
    monkeypatch.setattr(cleanai.search, "STEP", 0.1)
    before = copy.deepcopy(trained.state_dict())
    pruned, report, unrepaired = _search(trained, images, compute, Limits(4.0))
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())

    original, *steps = report["path"]
    assert original["accuracy_calibration_percent"] == evaluate(trained, images.calibration, compute).accuracy_percent
    lost = [original["accuracy_calibration_percent"] - step["accuracy_calibration_percent"] for step in steps]
    assert report["ended_by"] == "accuracy" and len(steps) > 2
    assert max(lost[:-1]) <= 4 < lost[-1]
    assert [step["taken"] for step in steps] == [True] * (len(steps) - 1) + [False]
    assert capsys.readouterr().out.count("accuracy on the calibration images") == len(steps)

    accuracy = evaluate(pruned, images.calibration, compute).accuracy_percent
    assert accuracy == steps[-2]["accuracy_calibration_percent"], "the network is that of the last step taken"
    assert len(report["steps"]) == len(steps) - 1
    removed = 100 * (1 - parameter_count(pruned) / parameter_count(trained))
    assert removed == pytest.approx(steps[-2]["parameters_removed_percent"])
    assert steps[0]["macs_removed_percent"] == pytest.approx(10, abs=3)
    assert layer_widths(unrepaired) == layer_widths(pruned)
    assert {layer["name"]: layer["channels_after"] for layer in report["layers"]} == layer_widths(pruned)
    assert {layer["name"]: layer["channels_before"] for layer in report["layers"]} == layer_widths(trained)


def test_a_first_step_that_costs_too_much_is_one_line(trained, images, compute, monkeypatch):
    monkeypatch.setattr(cleanai.search, "STEP", 0.45)
    with pytest.raises(UserError, match=r"^The first step alone, .*% of the parameters .* and 0\.5 may be lost"):
        _search(trained, images, compute, Limits(0.5), repair="none")


def test_a_goal_that_the_network_cannot_meet_is_lowered(trained, images, compute, monkeypatch):
    monkeypatch.setattr(cleanai.search, "STEP", 0.2)
    monkeypatch.setattr(cleanai.search, "FURTHEST", 0.998)  # some channels of each layer are always kept
    _, report, _ = _search(trained, images, compute, Limits(100.0), ratio=None)
    assert report["ended_by"] == "furthest"
    assert report["path"][-1]["macs_removed_percent"] == pytest.approx(60, abs=2.5)
    assert len(report["steps"]) == 3, "the next whole number of steps that can be met"


def _timed(monkeypatch, *speedups):
    """Give these in place of measured speed-ups, in turn; returns what each was measured on."""
    timings, of = iter(speedups), []

    def compare(original, network, images, compute, speedup_of):
        of.append((parameter_count(original), parameter_count(network), speedup_of))
        return {"speedup": next(timings), "latency_median_ms": 1.0, "latency_images": 1}

    monkeypatch.setattr(cleanai.search, "compare_speed", compare)
    return of


def test_pruning_ends_when_the_network_is_fast_enough_in_two_timings(trained, images, compute, monkeypatch):
    # The second step seems fast enough once, the third one twice.
    of = _timed(monkeypatch, 1.1, 1.6, 1.2, 1.7, 1.5)
    pruned, report, _ = _search(trained, images, compute, Limits(None, 1.5, "batch"))
    assert report["ended_by"] == "speedup"
    assert [step.get("speedup") for step in report["path"]] == [None, 1.1, 1.2, 1.5]
    assert {(original, kind) for original, _, kind in of} == {(parameter_count(trained), "batch")}
    assert of[-1][1] == parameter_count(pruned) < of[0][1]


def test_a_speed_up_that_no_step_reaches_is_one_line(trained, images, compute, monkeypatch):
    monkeypatch.setattr(cleanai.search, "STEP", 0.3)
    _timed(monkeypatch, 1.1, 1.31, 1.2)
    with pytest.raises(UserError, match=r"^No step makes .* 2 times as fast on single images .*: the best is 1\.31 "):
        _search(trained, images, compute, Limits(None, 2.0))


def test_the_accuracy_ends_it_before_the_speed_up(trained, images, compute, monkeypatch):
    monkeypatch.setattr(cleanai.search, "STEP", 0.3)
    _timed(monkeypatch, 1.1, 1.2, 1.3)
    _, report, _ = _search(trained, images, compute, Limits(8.0, 2.0))
    assert report["ended_by"] == "accuracy"
    assert report["path"][-1]["speedup"] > 1.1


def test_the_function_prunes_as_far_as_the_labels_of_its_images_allow(trained, images, monkeypatch):
    monkeypatch.setattr(cleanai.search, "STEP", 0.15)
    pruned, report = prune(trained, images.calibration, ratio="auto", accept_drop=4.0)
    assert 0 < len(report["steps"]) < len(report["path"])
    removed = 100 * (1 - parameter_count(pruned) / parameter_count(trained))
    assert removed == pytest.approx(report["steps"][-1]["parameters_removed_percent"], abs=0.01)
