import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.network import training
from cleanai.network.evaluation import Evaluation, evaluate
from cleanai.network.models import load_network, resnet18_for_small_images
from cleanai.network.training import TrainSettings, distil, fine_tune, learning_rate, train
from cleanai.network.training_step import Teacher, TrainingStep
from cleanai.runtime.checkpoints import load_checkpoint
from cleanai.runtime.scenario import Scenario
from tests.small_network import SmallNetwork, thin_resnet18

FACTS = {
    "model": "ResNet18", "dataset": "Digits", "classes": list("0123456789"), "image_size": [16, 16],
    "config": {"epochs": 6},
}  # fmt: skip
SETTINGS = TrainSettings(epochs=6, batch_size=16)


@pytest.fixture
def few(digits):
    images = digits.with_train_samples(48, seed=0)
    return replace(images, test=images.test.select(torch.arange(20)))


@pytest.fixture
def start():
    torch.manual_seed(0)
    return thin_resnet18(10)


def _scenario(folder):
    return Scenario("TS1", "ResNet18", "Digits", folder)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero_after_the_last_step():
    rates = [learning_rate(step, 50, 0.1) for step in range(50)]
    assert max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) == 9
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    falls = [before - after for before, after in zip(rates[9:], rates[10:])]
    assert falls == pytest.approx([rates[-1]] * 40)  # the next would be zero
    assert learning_rate(0, 1, 0.1) == pytest.approx(0.1)  # the only step trains


def test_evaluation_is_accuracy_and_mean_cross_entropy(network, digits, compute):
    network.train()
    result = evaluate(network, digits.test, compute)
    assert network.training, "its mode has changed"
    network.eval()
    with torch.no_grad():
        outputs = torch.cat([network(inputs) for inputs, _ in digits.test.batches(90)])
    correct = outputs.argmax(1) == digits.test.labels
    assert torch.equal(result.correct, correct)
    assert torch.equal(result.predicted, outputs.argmax(1).int())
    assert result.accuracy_percent == pytest.approx(100 * correct.double().mean().item())
    loss = nn.functional.cross_entropy(outputs, digits.test.labels).item()
    assert result.loss == pytest.approx(loss, rel=1e-4)


def test_training_without_files_is_the_same_training(start, few, compute, tmp_path):
    without_files, settings = copy.deepcopy(start), replace(SETTINGS, epochs=2)
    fine_tune(start, few, compute, settings, _scenario(tmp_path), FACTS)
    train(without_files, few, compute, settings)
    torch.testing.assert_close(dict(without_files.state_dict()), dict(start.state_dict()))


def test_distillation_compares_softened_outputs_and_leaves_the_teacher_alone(start, few, compute):
    torch.manual_seed(3)
    teacher = thin_resnet18(10)
    before = copy.deepcopy(teacher.state_dict())
    chosen, unshifted = torch.arange(8), torch.tensor([[2, 2, 0]] * 8)
    inputs, labels = next(few.train.select(chosen).batches(8))
    with torch.no_grad():
        own = copy.deepcopy(start).train()(inputs)
        goal = (teacher.eval()(inputs) / 4).softmax(1)
    distilled = 16 * (goal * (goal.log() - (own / 4).log_softmax(1))).sum(1).mean()
    expected = 0.25 * nn.functional.cross_entropy(own, labels) + 0.75 * distilled
    step = TrainingStep(start.train(), few.train, compute, teacher=Teacher(teacher.train(), 0.75))
    losses = [step(chosen, unshifted, rate=0.001)[0] for _ in range(4)]
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-4)
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_distilling_as_a_repair_approaches_the_original_without_labels(digits, compute, monkeypatch):
    """By the divergence of the outputs on images that it did not use."""
    monkeypatch.setattr(training, "DISTIL_STEPS", 40)
    torch.manual_seed(0)
    original = SmallNetwork(10)
    train(original, digits.with_train_samples(480, seed=0), compute, replace(SETTINGS, epochs=4))
    damaged = copy.deepcopy(original)
    for module in damaged.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.add_(0.5 * module.weight.std() * torch.randn_like(module.weight))
    inputs = next(digits.test.batches(200))[0]

    def distance(network):
        with torch.inference_mode():
            own, expected = (each.eval()(inputs).log_softmax(1) for each in (network, original))
        return (expected.exp() * (expected - own)).sum(1).mean().item()

    mislabelled = replace(digits, train=replace(digits.train, labels=digits.train.labels.roll(1)))
    distilled = {name: copy.deepcopy(damaged) for name in ("labels", "wrong labels")}
    distil(distilled["labels"], original, digits, compute, 16, seed=0)
    distil(distilled["wrong labels"], original, mislabelled, compute, 16, seed=0)
    assert max(map(distance, distilled.values())) < distance(damaged) / 2


@pytest.mark.parametrize(("batch_size", "steps"), [(16, 300), (50, 308), (200, 301), (1024, 300)])
def test_a_distillation_takes_its_batches_from_as_many_images_as_there_are(batch_size, steps, digits, monkeypatch):
    trained = []
    monkeypatch.setattr(training, "train", lambda *args: trained.append(args))
    distil(None, None, digits, None, batch_size, seed=0)  # 1,437 images
    ((_, images, _, settings, _),) = trained
    assert settings.epochs * (len(images.train) // batch_size) == steps


def test_weight_decay_is_that_of_adam(start, few, compute):
    expected = copy.deepcopy(start).train()
    step = TrainingStep(start.train(), few.train, compute, weight_decay=0.1)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.001, weight_decay=0.1)
    unshifted = torch.tensor([[2, 2, 0]] * 8)  # the border is 2 pixels wide
    for first in (0, 8):
        chosen = torch.arange(first, first + 8)
        step(chosen, unshifted, rate=0.001)
        inputs, labels = next(few.train.select(chosen).batches(8))
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(inputs), labels).backward()
        optimizer.step()
    torch.testing.assert_close(dict(start.state_dict()), dict(expected.state_dict()), rtol=1e-3, atol=1e-4)


def test_with_0_epochs_a_network_is_only_measured_and_saved(start, few, compute, tmp_path):
    scenario, weights = _scenario(tmp_path), copy.deepcopy(start.state_dict())
    history, result = fine_tune(start, few, compute, replace(SETTINGS, epochs=0), scenario, FACTS)
    assert history == []
    assert result.loss == evaluate(start, few.test, compute).loss
    assert [path.name for path in scenario.folder.iterdir()] == ["ResNet18_Digits_FT_final.pth"]
    saved = load_network(scenario.final).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())


def test_training_learns_saves_every_fifth_epoch_and_reports_each(few, compute, tmp_path, capsys):
    torch.manual_seed(0)
    scenario, start = _scenario(tmp_path), resnet18_for_small_images(10)
    history, result = fine_tune(start, few, compute, SETTINGS, scenario, FACTS)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert set(history[0]) == {
        "epoch", "train_loss", "train_accuracy_percent", "test_loss", "test_accuracy_percent", "learning_rate",
        "seconds",
    }  # fmt: skip
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert 0 < history[-1]["learning_rate"] < history[0]["learning_rate"]
    assert result.accuracy_percent == history[-1]["test_accuracy_percent"]
    assert sorted(path.name for path in scenario.folder.iterdir()) == [
        "ResNet18_Digits_FT_epoch5.pth",
        "ResNet18_Digits_FT_final.pth",
    ]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch ")]
    assert len(printed) == 6
    for line, epoch in zip(printed, history):
        assert line.startswith(f"Epoch {epoch['epoch']}/6: train loss {epoch['train_loss']:.4f}, ")
        assert f"test loss {epoch['test_loss']:.4f}, accuracy {epoch['test_accuracy_percent']:.2f}%" in line
    # The last epoch's network is the result, not the one that did best on the test images.
    saved = load_network(scenario.final)
    assert evaluate(saved, few.test, compute).loss == pytest.approx(history[-1]["test_loss"], rel=1e-4)


def _with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 10))


@pytest.mark.parametrize("build", [lambda: SmallNetwork(10), _with_dropout], ids=["batch norm", "dropout"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(build, few, compute, tmp_path, monkeypatch):
    settings, facts = replace(SETTINGS, epochs=4), {**FACTS, "config": {"epochs": 4}}
    whole = build()
    parts = copy.deepcopy(whole)
    expected, _ = fine_tune(whole, few, compute, settings, _scenario(tmp_path / "whole"), facts)

    def evaluate_or_interrupt(network, images, compute, title):
        if title.startswith("Epoch 3"):
            raise KeyboardInterrupt
        return evaluate(network, images, compute, title)

    scenario = _scenario(tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate", evaluate_or_interrupt)
        fine_tune(parts, few, compute, settings, scenario, facts)
    assert load_checkpoint(scenario.resume)["epoch"] == 2

    resumed = build()
    for parameter in resumed.parameters():
        parameter.data.fill_(7)  # a new process starts with other weights
    torch.manual_seed(99)  # and with other random numbers
    history, _ = fine_tune(resumed, few, compute, settings, scenario, facts)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert [epoch["train_loss"] for epoch in history] == [epoch["train_loss"] for epoch in expected]
    assert not scenario.resume.exists()


def test_a_finished_training_is_found_and_not_repeated(start, few, compute, tmp_path):
    scenario, settings = _scenario(tmp_path), replace(SETTINGS, epochs=1)
    facts = {**FACTS, "config": {"epochs": 1}}
    history, result = fine_tune(start, few, compute, settings, scenario, facts)
    written = scenario.final.stat().st_mtime_ns
    again = thin_resnet18(10)
    scenario.resume.write_bytes(b"of a run that was killed before its last line")
    history_found, result_found = fine_tune(again, few, compute, settings, scenario, facts)
    assert history_found == [{key: epoch[key] for key in epoch if key != "seconds"} for epoch in history]
    assert result_found.accuracy_percent == result.accuracy_percent
    assert torch.equal(result_found.correct, result.correct)
    assert scenario.final.stat().st_mtime_ns == written
    assert not scenario.resume.exists()
    assert torch.equal(again.fc.weight, start.fc.weight)
    with pytest.raises(UserError, match=r"FT_final\.pth .*--epochs 1.*--epochs 2"):
        fine_tune(again, few, compute, replace(SETTINGS, epochs=2), scenario, {**FACTS, "config": {"epochs": 2}})


def test_trained_again_with_the_same_settings_the_file_is_the_same(start, few, compute, tmp_path):
    files = []
    for folder in ("one", "two"):
        scenario = _scenario(tmp_path / folder)
        fine_tune(copy.deepcopy(start), few, compute, replace(SETTINGS, epochs=2), scenario, FACTS)
        files.append(scenario.final.read_bytes())
    assert files[0] == files[1], "what was pruned from the one was not pruned from another"


def test_a_loss_that_is_not_finite_stops_the_training(start, few, compute, tmp_path):
    start.fc.weight.data[0, 0] = float("nan")
    expected = r"not finite in epoch 1, step 1 of 3, at a learning rate of 0\.00025: use a lower --lr"
    with pytest.raises(UserError, match=expected):
        fine_tune(start, few, compute, SETTINGS, _scenario(tmp_path), FACTS)
    assert not _scenario(tmp_path).final.exists()


def test_a_network_whose_outputs_are_not_finite_is_not_taken_as_it_is(start, few, compute, tmp_path):
    start.fc.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="--precision float32"):
        fine_tune(start, few, compute, replace(SETTINGS, epochs=0), _scenario(tmp_path), FACTS)
    assert not _scenario(tmp_path).final.exists()


def test_exports_of_an_earlier_network_go_before_another_takes_its_place(start, few, compute, tmp_path):
    scenario = _scenario(tmp_path).of("Wanda")
    scenario.folder.mkdir()
    exports = [scenario.exported, scenario.quantized, scenario.standalone]
    for path in exports:
        path.write_bytes(b"of a network whose checkpoint the user has deleted")
    fine_tune(start, few, compute, replace(SETTINGS, epochs=0), scenario, FACTS)
    assert scenario.final.exists() and not any(path.exists() for path in exports)


def test_a_test_loss_that_is_not_finite_stops_the_training(start, few, compute, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *args: Evaluation(10.0, float("nan"), torch.zeros(20).bool()))
    with pytest.raises(UserError, match=r"test loss is not finite after epoch 1: .*--lr"):
        fine_tune(start, few, compute, SETTINGS, _scenario(tmp_path), FACTS)
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
        fine_tune(start, images, compute, replace(SETTINGS, epochs=2), _scenario(tmp_path / str(threads)), FACTS)
        return [*drawn, images.train.pixels, images.repair_sample(99, 0).pixels, digits.calibration_split(99, 0)[1]]

    threads = torch.get_num_threads()
    try:
        drawn = [draws(number) for number in (1, 3)]
    finally:
        torch.set_num_threads(threads)
    assert len(drawn[0]) == 2 * (6 + 2 * 62) + 3
    assert all(map(torch.equal, *drawn))


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="PyTorch before 2.3 scales gradients on CUDA alone")
def test_float16_learns_with_scaled_gradients(few, compute):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    compute = replace(compute, precision="float16")
    step = TrainingStep(compute.place(network).train(), few.train, compute)
    unmoved = torch.zeros(4, 3, dtype=torch.long)
    losses = [step(torch.arange(4), unmoved, rate=0.001)[0].item() for _ in range(10)]
    assert losses[-1] < losses[0]  # the first steps only find a scale without overflow
    assert step.state_dict()["scaler"]["scale"] > 1
