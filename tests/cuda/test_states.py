"""Training goes on from the state of another device, and of another PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cleanai import UserError
from cleanai.data.images import Images
from cleanai.network import training
from cleanai.network.evaluation import evaluate
from cleanai.network.training import TrainSettings, fine_tune
from cleanai.network.training_step import TrainingStep
from cleanai.runtime.checkpoints import load_plain_data, save_checkpoint
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.scenario import Scenario
from tests.cuda.stand_in import CPU, CUDA, cuda_stand_in, device_of, needs_fused_adam
from tests.small_network import SmallNetwork

SETTINGS, FACTS = TrainSettings(epochs=2, batch_size=16), {"config": {}}


@pytest.fixture
def few(digits) -> Images:
    images = digits.with_train_samples(32, seed=0)
    return replace(images, test=images.test.select(torch.arange(20)))


def small():
    torch.manual_seed(0)
    return SmallNetwork(10)


def tuned(device, images, folder):
    """The weights after `fine_tune` on a device, which goes on from what is in `folder`."""
    compute = choose_compute(device, "float32")
    network = compute.place(small())
    fine_tune(network, images.to(compute.device), compute, SETTINGS, Scenario("T", "S", "Digits", folder), FACTS)
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


def evaluate_once(network, images, compute, title):
    if title.startswith("Epoch 2"):
        raise KeyboardInterrupt
    return evaluate(network, images, compute, title)


@needs_fused_adam
@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_an_interrupted_training_resumes_on_another_device(first, then, few, tmp_path, monkeypatch):
    expected = tuned("cpu", few, tmp_path / "whole")
    with cuda_stand_in((6, 1)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "evaluate", evaluate_once)
            tuned(first, few, tmp_path)
        found = tuned(then, few, tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)  # a fused Adam rounds otherwise


@needs_fused_adam
@pytest.mark.parametrize("shape", [(), (1,)])
def test_steps_are_where_adam_wants_them(shape, few):
    """A fused Adam wants its numbers of steps on the card, and any other on the CPU."""
    with cuda_stand_in((6, 1)):
        for device in ("cpu", "cuda"):
            compute = choose_compute(device, "float32")
            step = TrainingStep(compute.place(small()), few.to(compute.device).train, compute)
            step.load_state_dict(state_with(few, shape))
            moments = [(each["step"], each["exp_avg"]) for each in step._optimizer.state.values()]
            assert {device_of(tensor) for pair in moments for tensor in pair} == {CUDA if device == "cuda" else CPU}
            assert {(number.shape, number.item()) for number, _ in moments} == {((), 1.0)}
            batch = torch.arange(8, device=compute.device)
            step(batch, few.train.draw_moves(8, False, torch.Generator()).to(compute.device), 0.001)


def state_with(images, shape, **settings):
    """The state after one step on the CPU, with numbers of steps of this shape, as those of a fused Adam may have."""
    step = TrainingStep(small(), images.train, choose_compute("cpu", "float32"))
    step(torch.arange(8), images.train.draw_moves(8, False, torch.Generator()), 0.001)
    state = step.state_dict()
    state["optimizer"]["param_groups"][0].update(settings)
    for each in state["optimizer"]["state"].values():
        each["step"] = each["step"].expand(shape).clone()
    return state


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("settings", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_the_state_of_any_adam_trains_on_like_that_of_the_cpu(settings, shape, few):
    trained = []
    for state in (state_with(few, ()), state_with(few, shape, **settings)):
        network = small()
        step = TrainingStep(network, few.train, choose_compute("cpu", "float32"))
        step.load_state_dict(state)
        step(torch.arange(8, 16), few.train.draw_moves(8, False, torch.Generator()), 0.001)
        trained.append(network.state_dict())
    assert all(map(torch.equal, *(state.values() for state in trained)))


@pytest.mark.parametrize("spoil", ["step", "exp_avg"])
def test_the_state_of_another_network_is_refused(spoil, few, tmp_path, monkeypatch):
    scenario = Scenario("T", "S", "Digits", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate", evaluate_once)
        tuned("cpu", few, tmp_path)
    content = load_plain_data(scenario.resume)
    content["training"]["optimizer"]["state"][0][spoil] = torch.ones(2, 3)
    save_checkpoint(scenario.resume, content)
    with pytest.raises(UserError, match=r"resume.* does not fit this network"):
        tuned("cpu", few, tmp_path)
