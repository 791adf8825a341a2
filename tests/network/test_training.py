import copy
from dataclasses import replace

import pytest
import torch

from cleanai import UserError
from cleanai.network.evaluation import evaluate
from cleanai.network.models import load_network, resnet18_for_small_images
from cleanai.network.training import TrainSettings, fine_tune, learning_rate, train
from cleanai.network.training_step import TrainingStep
from cleanai.runtime.checkpoints import load_checkpoint
from cleanai.runtime.scenario import Scenario

FACTS = {"model": "ResNet18", "dataset": "Digits", "classes": list("0123456789"), "config": {"epochs": 6}}
SETTINGS = TrainSettings(epochs=6, batch_size=16)


@pytest.fixture
def few(digits):
    images = digits.with_train_samples(48, seed=0)
    return replace(images, test=images.test.select(torch.arange(20)))


@pytest.fixture
def start():
    torch.manual_seed(0)
    return resnet18_for_small_images(10)


def _scenario(folder):
    return Scenario("TS1", "ResNet18", "Digits", folder)


def test_the_learning_rate_rises_to_its_peak_and_ends_at_zero():
    rates = [learning_rate(step, 50, 0.1) for step in range(50)]
    assert max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) == 9
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    assert rates[-1] == 0


def test_evaluation_is_accuracy_and_mean_cross_entropy(network, digits, compute):
    network.train()
    result = evaluate(network, digits.test, compute)
    assert network.training, "its mode is left as it was"
    network.eval()
    with torch.no_grad():
        outputs = torch.cat([network(inputs) for inputs, _ in digits.test.batches(90)])
    hits = outputs.argmax(1) == digits.test.labels
    assert torch.equal(result.correct, hits)
    assert result.accuracy_percent == pytest.approx(100 * hits.double().mean().item())
    loss = torch.nn.functional.cross_entropy(outputs, digits.test.labels).item()
    assert result.loss == pytest.approx(loss, rel=1e-4)


def test_training_without_files_is_the_same_training(start, few, compute, tmp_path):
    other, settings = copy.deepcopy(start), replace(SETTINGS, epochs=2)
    fine_tune(start, few, compute, _scenario(tmp_path), FACTS, settings)
    train(other, few, compute, settings)
    torch.testing.assert_close(dict(other.state_dict()), dict(start.state_dict()))


def test_weight_decay_is_that_of_adam(start, few, compute):
    expected = copy.deepcopy(start).train()
    step = TrainingStep(start.train(), few.train, compute, weight_decay=0.1)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.001, weight_decay=0.1)
    for first in (0, 8):
        chosen = torch.arange(first, first + 8)
        step(chosen, torch.tensor([[2, 2, 0]] * 8), rate=0.001)  # moved back to where they were
        inputs, labels = next(few.train.select(chosen).batches(8))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(expected(inputs), labels).backward()
        optimizer.step()
    torch.testing.assert_close(dict(start.state_dict()), dict(expected.state_dict()), rtol=1e-3, atol=1e-4)


def test_no_epochs_leave_a_network_as_it_is_measured_and_saved(start, few, compute, tmp_path):
    scenario, weights = _scenario(tmp_path), copy.deepcopy(start.state_dict())
    history, result = fine_tune(start, few, compute, scenario, FACTS, replace(SETTINGS, epochs=0))
    assert history == []
    assert result.loss == evaluate(start, few.test, compute).loss
    assert [path.name for path in scenario.folder.iterdir()] == ["ResNet18_Digits_FT_final.pth"]
    saved = load_network(scenario.final).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())


def test_training_learns_saves_every_fifth_epoch_and_reports_each(start, few, compute, tmp_path, capsys):
    scenario = _scenario(tmp_path)
    history, result = fine_tune(start, few, compute, scenario, FACTS, SETTINGS)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert set(history[0]) == {
        "epoch", "train_loss", "train_accuracy_percent", "test_loss", "test_accuracy_percent", "learning_rate",
        "seconds",
    }  # fmt: skip
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["learning_rate"] == 0
    assert result.accuracy_percent == history[-1]["test_accuracy_percent"]
    assert sorted(path.name for path in scenario.folder.iterdir()) == [
        "ResNet18_Digits_FT_epoch5.pth",
        "ResNet18_Digits_FT_final.pth",
    ]
    assert capsys.readouterr().out.count("test accuracy") == 6
    # The last epoch's network is the result, not the one that did best on the test images.
    saved = load_network(scenario.final)
    assert evaluate(saved, few.test, compute).loss == pytest.approx(history[-1]["test_loss"], rel=1e-4)


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(start, few, compute, tmp_path, monkeypatch):
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    expected, _ = fine_tune(whole, few, compute, _scenario(tmp_path / "whole"), FACTS, SETTINGS)

    scenario = _scenario(tmp_path / "parts")
    import cleanai.network.training

    def interrupting(network, images, compute, title):
        if title.startswith("Epoch 4"):
            raise KeyboardInterrupt
        return evaluate(network, images, compute, title)

    monkeypatch.setattr(cleanai.network.training, "evaluate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(parts, few, compute, scenario, FACTS, SETTINGS)
    monkeypatch.undo()
    assert load_checkpoint(scenario.resume)["epoch"] == 3

    again = resnet18_for_small_images(10)  # a new process begins with other weights
    history, _ = fine_tune(again, few, compute, scenario, FACTS, SETTINGS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [e["train_loss"] for e in history] == [e["train_loss"] for e in expected]
    assert not scenario.resume.exists()


def test_a_finished_training_is_found_and_not_repeated(start, few, compute, tmp_path):
    scenario = _scenario(tmp_path)
    first, result = fine_tune(start, few, compute, scenario, FACTS, SETTINGS)
    written = scenario.final.stat().st_mtime_ns
    again = resnet18_for_small_images(10)
    scenario.resume.write_bytes(b"left by a kill between the last two acts")
    found, result_found = fine_tune(again, few, compute, scenario, FACTS, SETTINGS)
    assert found == first
    assert result_found.accuracy_percent == result.accuracy_percent
    assert torch.equal(result_found.correct, result.correct)
    assert scenario.final.stat().st_mtime_ns == written
    assert not scenario.resume.exists()
    assert torch.equal(again.fc.weight, start.fc.weight)
    with pytest.raises(UserError, match=r"was made with --epochs 6, and this run is with --epochs 7"):
        fine_tune(again, few, compute, scenario, {**FACTS, "config": {"epochs": 7}}, replace(SETTINGS, epochs=7))


def test_a_loss_that_is_no_number_stops_the_training(start, few, compute, tmp_path):
    start.fc.weight.data[0, 0] = float("nan")
    expected = r"no longer a number in epoch 1, step 1 of 3, at a learning rate of 0\.00025: use a lower --lr"
    with pytest.raises(UserError, match=expected):
        fine_tune(start, few, compute, _scenario(tmp_path), FACTS, SETTINGS)
    assert not _scenario(tmp_path).final.exists()


def test_the_order_of_the_data_does_not_depend_on_the_number_of_threads(start, digits, compute, tmp_path, monkeypatch):
    def draws(threads):
        drawn = []

        def step(self, indices, moves, rate):
            drawn.extend([indices, moves])
            return torch.zeros(()), torch.zeros(())

        monkeypatch.setattr(TrainingStep, "__call__", step)
        torch.set_num_threads(threads)
        images = replace(digits, test=digits.test.select(torch.arange(20)), mirror=True).with_train_samples(999, seed=0)
        fine_tune(start, images, compute, _scenario(tmp_path / str(threads)), FACTS, replace(SETTINGS, epochs=2))
        return [*drawn, images.train.pixels, images.repair_sample(99, 0).pixels, digits.calibration_split(99, 0)[1]]

    threads = torch.get_num_threads()
    try:
        drawn = [draws(number) for number in (1, 3)]
    finally:
        torch.set_num_threads(threads)
    assert len(drawn[0]) == 2 * (6 + 2 * 62) + 3
    assert all(map(torch.equal, *drawn))


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="PyTorch before 2.3 scales gradients on CUDA alone")
def test_float16_learns_with_scaled_gradients(start, few, compute):
    compute = replace(compute, precision="float16")
    step = TrainingStep(compute.place(start).train(), few.train, compute)
    unmoved = torch.zeros(4, 3, dtype=torch.long)
    losses = [step(torch.arange(4), unmoved, rate=0.001)[0].item() for _ in range(10)]
    assert losses[-1] < losses[0]  # the first steps only find a scale at which nothing overflows
    assert step.state_dict()["scaler"]["scale"] > 1
