"""What the scripts share: publishing the results of a finished run, and the images of one at work."""

import contextlib
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cleanai import UserError, image_set, stages
from cleanai.data.images import Images
from cleanai.measure import deployment
from cleanai.measure.latency import Times
from cleanai.measure.provenance import checkpoint_facts, image_digests
from cleanai.measure.results import Split
from cleanai.pruning.criteria import WandaImportance
from cleanai.run import Run
from cleanai.runtime.checkpoints import read_record, save_checkpoint, write_record
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import Scenario
from tests.helpers import EXPORT, SMALL_MODEL, run_record
from tests.small_network import SmallNetwork


@pytest.fixture
def scenario(tmp_path):
    """A finished run of script 3, without its report."""
    scenario = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Wanda")
    scenario.record.parent.mkdir(parents=True)
    stages.save_record(scenario, run_record("Wanda"))
    return scenario


def _options(scenario, export="onnx", strict=False):
    return Namespace(export=export, data_dir=scenario.checkpoints_dir, timing_seconds=7.0, strict=strict)


@pytest.mark.parametrize(("result", "strict", "status"), [
    ("PASS", True, None), ("FAIL", True, 3), ("NOT SHOWN", True, 3), ("FAIL", False, None),
])  # fmt: skip
def test_a_strict_run_without_a_pass_ends_with_its_own_status_after_its_report(scenario, result, strict, status):
    record = run_record("Wanda")
    judged = {"accept_drop_points": 1.0, "difference_points": -0.3, "interval_points": [-0.8, 0.2]}
    record["verdict"] = {"result": result, **judged}
    options = _options(scenario, "none", strict)
    for _ in range(2):  # the second time as a finished run
        ending = pytest.raises(SystemExit) if status else contextlib.nullcontext()
        with ending as caught:
            stages.publish(scenario, record, options)
        assert not status or caught.value.code == status
        assert scenario.report.exists()


def test_a_network_that_cannot_be_exported_leaves_the_finished_run_and_its_report(scenario, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("it cannot be exported")

    monkeypatch.setattr(deployment, "export_scenario", refuse)
    record = read_record(scenario.record)
    with pytest.raises(UserError, match="it cannot be exported"):
        stages.publish(scenario, dict(record), _options(scenario))
    assert "WANDA PRUNING" in capsys.readouterr().out
    assert scenario.report.exists()
    assert read_record(scenario.record) == record


def test_a_report_that_is_open_elsewhere_does_not_keep_a_run_from_its_end(scenario, monkeypatch):
    options, record, unlink = _options(scenario, "none"), read_record(scenario.record), Path.unlink
    stages.publish(scenario, record, options)
    of_the_first = scenario.report.read_bytes()

    def held(self, *args):
        if self == scenario.report:
            raise PermissionError(13, "The process cannot access the file")
        unlink(self, *args)

    monkeypatch.setattr(Path, "unlink", held)
    record["models"]["fine_tuned"]["loss"] += 1
    stages.save_record(scenario, record)
    monkeypatch.undo()
    assert read_record(scenario.record) == record
    assert scenario.report.read_bytes() == of_the_first
    os.utime(scenario.record, (scenario.report.stat().st_mtime + 1,) * 2)  # the clock of some file systems is coarse
    stages.publish(scenario, record, options)
    assert scenario.report.read_bytes() != of_the_first


def test_an_export_takes_as_long_as_it_may(scenario, monkeypatch):
    given = []

    def timed(calls, turns, calls_per_turn, compute, title):
        given.append(compute.timing_s)
        for call in calls.values():
            call()
        return {key: Times([0.001, 0.002], 0.0) for key in calls}

    part = image_set(torch.randint(0, 256, (10_000, 3, 8, 8), dtype=torch.uint8))
    images, record = Images(part, part, ["a", "b"], False, "random images"), run_record("Wanda")
    record["dataset"].update(train_images=10_000, **image_digests(images))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    monkeypatch.setattr(deployment, "time_in_turns", timed)
    monkeypatch.setattr(deployment, "load_network", lambda path, model: network)
    monkeypatch.setattr(deployment, "scenario_images", lambda scenario, data_dir: images)
    stages.publish(scenario, record, _options(scenario))
    assert given == [7.0]
    assert read_record(scenario.record)["export"].keys() == EXPORT.keys()
    assert scenario.exported.exists()


def test_a_pattern_that_no_layer_matches_is_refused_before_any_work(digits, compute, tmp_path, monkeypatch):
    scenario = Scenario("TS1", SMALL_MODEL, "Digits", tmp_path, "Wanda")
    facts = checkpoint_facts(scenario, digits, compute, {})
    prepared = {**facts, "state_dict": SmallNetwork(10).state_dict()}
    args = Namespace(config={"keep_layers": ["first*", "conv9"]}, epochs=1, batch_size=16, fresh=False)
    run = Run(scenario, args, compute, digits, facts, prepared)
    monkeypatch.setattr("cleanai.run.in_fitting_order", lambda *_: pytest.fail("a network was run"))
    with pytest.raises(
        UserError, match=r"No layer matches 'conv9', .* the layers are stem.0, first.0, second.0, last.0"
    ):
        run.load_original()


def test_a_network_that_cannot_be_pruned_is_refused_before_it_is_trained(digits, compute, tmp_path):
    network = SmallNetwork(10)
    nn.utils.parametrizations.spectral_norm(network.first[0])
    scenario = Scenario("TS1", SMALL_MODEL, "Digits", tmp_path)
    args = Namespace(config={}, epochs=1, batch_size=16, fresh=False)
    run = Run(scenario, args, compute, digits, checkpoint_facts(scenario, digits, compute, {}))
    with pytest.raises(UserError, match=r"the weight of first\.0 is computed from others"):
        run.save_pretrained(network)
    assert not scenario.pretrained.exists()


def test_other_test_images_than_those_of_script_1_are_noted(digits, compute, tmp_path, capsys):
    scenario = Scenario("TS1", SMALL_MODEL, "Digits", tmp_path, "Wanda")
    network, notes = SmallNetwork(10), []
    settings = {"calibration_batches": 2, "batch_size": 16, "seed": 0, "calibrate_on": "test", "repair": "none"}
    args = Namespace(config=settings, epochs=0, fresh=False, repair_batches=1, train_samples=None, **settings)
    for before in (digits, replace(digits, test=digits.test.select(torch.arange(300)))):
        prepared = {**checkpoint_facts(scenario.of(""), before, compute, {}), "state_dict": network.state_dict()}
        run = Run(scenario, args, compute, digits, checkpoint_facts(scenario, digits, compute, settings), prepared)
        run.load_original()
        notes.append("not those of script 1" in capsys.readouterr().out)
    assert notes == [False, True]


@pytest.mark.parametrize(
    ("batches", "source", "expected"),
    [
        (2, "test", "Calibration uses 32 test images; the other 328 test images are held out"),
        (50, "test", "the other 90 test images are held out (all 360 with --calibrate-on train)"),
        (50, "train", "Calibration uses 800 training images; all 360 test images are held out"),
    ],
)
def test_where_few_images_are_held_out_the_option_that_holds_out_all_is_named(
    batches, source, expected, digits, compute, tmp_path, capsys
):
    scenario, network = Scenario("TS1", SMALL_MODEL, "Digits", tmp_path, "Wanda"), SmallNetwork(10)
    settings = {"calibration_batches": batches, "batch_size": 16, "seed": 0, "calibrate_on": source, "repair": "none"}
    args = Namespace(config=settings, epochs=0, fresh=False, repair_batches=1, train_samples=None, **settings)
    facts = checkpoint_facts(scenario, digits, compute, settings)
    Run(scenario, args, compute, digits, facts, {**facts, "state_dict": network.state_dict()}).load_original()
    assert f"{expected}\n" in capsys.readouterr().out


def test_a_network_whose_loss_is_not_finite_is_not_measured_for_hours(digits, compute, tmp_path):
    scenario, network = Scenario("TS1", SMALL_MODEL, "Digits", tmp_path, "Wanda"), SmallNetwork(10)
    network.classifier.bias.data[0] = torch.inf
    run = Run(scenario, Namespace(config={}), compute, digits, {})
    with pytest.raises(UserError, match=r"original, is not finite: .*--precision float32"):
        run.evaluate("original", network)


@pytest.mark.parametrize("method", ["", "Wanda"])
def test_a_damaged_network_of_script_1_is_named_by_a_finished_script_too(method, tmp_path):
    scenario = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, method)
    for path in {scenario.fine_tuned, scenario.final, *([scenario.pruned] if method else [])}:
        save_checkpoint(path, {"config": {}})
    config = {"epochs": 1, **({"fine_tuned_model": file_digest(scenario.fine_tuned)[:16]} if method else {})}
    write_record(scenario.record, {"config": config})
    args = Namespace(config={"epochs": 1}, fresh=False, data_dir=tmp_path)
    assert stages.finished_record(scenario, args)
    scenario.fine_tuned.write_bytes(scenario.fine_tuned.read_bytes()[:-50] + bytes(50))
    with pytest.raises(UserError, match=r"FT_final\.pth is damaged"):
        stages.finished_record(scenario, Namespace(config={"epochs": 1}, fresh=False, data_dir=tmp_path))


def test_a_record_is_not_replaced_by_other_settings_where_a_network_was_lost(tmp_path):
    scenario = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path)
    write_record(scenario.record, {"config": {"epochs": 1}})
    assert stages.finished_record(scenario, Namespace(config={"epochs": 1}, fresh=False, data_dir=tmp_path)) is None
    with pytest.raises(UserError, match=r"--epochs 1, and this run is with --epochs 2"):
        stages.finished_record(scenario, Namespace(config={"epochs": 2}, fresh=False, data_dir=tmp_path))


def test_a_report_that_fails_loses_neither_the_record_nor_the_table(tmp_path):
    def fail(record):
        raise RuntimeError("no font")

    scenario, record = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Comparison"), {"answer": ["so"]}
    with pytest.raises(RuntimeError, match="no font"):
        stages.save_reports(scenario, record, lambda record: "a,b\n", fail)
    assert read_record(scenario.record) == record and scenario.table.read_text(encoding="utf-8") == "a,b\n"


def test_a_lost_network_of_script_1_is_made_again_with_its_settings(tmp_path):
    scenario = Scenario("TS1", "ResNet18", "Digits", tmp_path, "Wanda")
    write_record(scenario.of("").record, {"config": {"dataset": "Digits", "weights": "none", "epochs": 3, "seed": 0}})
    with pytest.raises(UserError, match=r"TS1_01_prepare_model\.py --dataset Digits .* --weights none --epochs 3$"):
        stages.finished_record(scenario, Namespace(config={}, fresh=False, data_dir=tmp_path))


def test_a_small_network_loses_what_comes_nearest(digits, compute, tmp_path):
    few = digits.with_train_samples(32, seed=0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(576, 10))
    settings = {"ratio": 0.24, "macs_ratio": None, "steps": 1, "round_to": [1], "repair": "none", "keep_layers": None}
    shared = {"batch_size": 16, "calibration_batches": 2, "calibrate_on": "test", "seed": 0, "fresh": False}
    args = Namespace(config=settings, **shared, **settings)
    run = Run(Scenario("TS1", SMALL_MODEL, "Digits", tmp_path, "Wanda"), args, compute, few, {})
    run.split, run.repair_images = Split.of(few, vars(args)), 32
    _, report = run.prune(network, WandaImportance())
    assert report["steps"][-1]["parameters_removed_percent"] == pytest.approx(24, abs=2)
