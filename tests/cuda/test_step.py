"""The training step of several processes and the compiled one, against the plain one."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.measure.provenance import checkpoint_facts, describe_environment
from cleanai.network import training_step
from cleanai.network.training import TrainSettings, train
from cleanai.network.training_step import TrainingStep
from cleanai.runtime import distributed
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.scenario import Scenario
from tests.cuda.stand_in import cuda_stand_in, needs_fused_adam
from tests.small_network import SmallNetwork

NORMS = {
    "1d": lambda: nn.BatchNorm1d(6),
    "2d": lambda: nn.BatchNorm2d(6),
    "3d": lambda: nn.BatchNorm3d(6),
    "without weights": lambda: nn.BatchNorm2d(6, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "of a sequence": lambda: nn.BatchNorm1d(6),
}
SHAPES = {"1d": (8, 6), "of a sequence": (8, 6, 5), "3d": (8, 6, 2, 3, 2)}


@pytest.fixture
def pair(monkeypatch):
    """Two processes with the same images: each sum over the processes is twice the own value."""
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda values: values.mul_(2))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda network, **_: network)


@pytest.fixture
def threads(pair, monkeypatch):
    """Two threads as two processes, each with its own images: a function that runs another in both."""
    barrier, held = threading.Barrier(2, timeout=60), {}

    def add(values):
        held[threading.get_ident()] = values.clone()
        barrier.wait()
        total = sum(held.values())
        barrier.wait()
        return values.copy_(total)

    def run(function, *arguments):
        held.clear()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, *arguments))

    monkeypatch.setattr(distributed, "sum_over_processes", add)
    return run


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_is_over_the_images_of_all_processes(name, threads):
    torch.manual_seed(0)
    whole = NORMS[name]().train()
    if whole.affine:
        nn.init.normal_(whole.weight)
        nn.init.normal_(whole.bias)
    norms = [copy.deepcopy(whole) for _ in range(2)]
    twins = [training_step._shared(nn.Sequential(norm))[0] for norm in norms]
    inputs = torch.randn(SHAPES.get(name, (8, 6, 3, 3)))
    inputs[4:] += 3  # the second process has other images
    halves = [half.clone().requires_grad_() for half in inputs.chunk(2)]
    inputs.requires_grad_()

    def train(twin, half):
        outputs = [twin(half) for _ in range(2)]
        (outputs[0] ** 3 + outputs[1]).sum().backward()
        return outputs[1]

    expected, found = train(whole, inputs), threads(train, twins, halves)
    torch.testing.assert_close(torch.cat(found), expected)
    gradients = torch.cat([half.grad for half in halves])
    torch.testing.assert_close(gradients, inputs.grad, rtol=1e-4, atol=1e-4)
    if whole.affine:
        torch.testing.assert_close(sum(norm.weight.grad for norm in norms), whole.weight.grad, rtol=1e-4, atol=1e-4)
    for norm, twin in zip(norms, twins):
        for key, tensor in whole.named_buffers():
            torch.testing.assert_close(dict(norm.named_buffers())[key], tensor)
        if whole.running_mean is not None:
            torch.testing.assert_close(twin.eval()(inputs), whole.eval()(inputs))


def test_a_batch_norm_of_its_own_kind_is_refused(pair):
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="Own"):
        training_step._shared(nn.Sequential(nn.Conv2d(3, 6, 1), Own(6)))


@needs_fused_adam
@pytest.mark.parametrize("capability", [(8, 6), (7, 5)])
def test_a_step_of_several_processes_does_not_wait_for_the_card(capability, pair, digits, monkeypatch):
    monkeypatch.setattr(distributed, "join", lambda device: None)
    with cuda_stand_in(capability) as card:
        compute = choose_compute("cuda", "auto")
        images = digits.with_train_samples(16, 0).to(compute.device).train
        network = SmallNetwork(10)
        network.last[1].momentum = None
        step = TrainingStep(compute.place(network).train(), images, compute)
        batch, moves = torch.arange(16, device=compute.device), images.draw_moves(16, False, torch.Generator())
        step(batch, moves, 0.001)
        card.forget()
        step(batch, moves, 0.001)
        assert card.waits == card.copies == Counter()


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile without the minute that a compiler of C++ takes; the modes that it was asked for."""
    asked, compile_ = [], torch.compile

    def without_compiler(function, mode):
        asked.append(mode)
        return compile_(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_compiler)
    return asked


@pytest.mark.skipif(torch.__version__ < (2, 4), reason="torch.compile works with fewer versions of Python before")
def test_compiled_steps_train_like_eager_ones(digits, compiler):
    images = digits.with_train_samples(48, seed=0)
    trained = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        network = SmallNetwork(10)
        compute = choose_compute("cpu", "float32", compiled=compiled)
        train(network, images, compute, TrainSettings(epochs=2, batch_size=16))
        trained[compiled] = network.state_dict()
    assert compiler == ["reduce-overhead"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(trained[True], trained[False], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < (2, 4), reason="torch.compile works with fewer versions of Python before")
def test_what_cannot_be_compiled_is_one_line(digits, monkeypatch):
    compute = replace(choose_compute("cpu", "float32"), compiled=True)

    def failing(graph, inputs):
        raise OSError("no C++ compiler")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile_(function, backend=failing))
    step = TrainingStep(SmallNetwork(10).train(), digits.train, compute)
    with pytest.raises(UserError, match=r"cannot be compiled .*no C\+\+ compiler.*leave out --compile"):
        step(torch.arange(4), digits.train.draw_moves(4, False, torch.Generator()), 0.001)

    def refusing(function, mode):
        raise RuntimeError("Dynamo is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", refusing)
    with pytest.raises(UserError, match=r"Python 3\.99.*leave out --compile"):
        TrainingStep(SmallNetwork(10), digits.train, compute)


def test_that_steps_were_compiled_is_one_of_the_conditions(digits, tmp_path):
    eager = choose_compute("cpu", "float32")
    compiled = replace(eager, compiled=True)
    scenario = Scenario("T", "S", "Digits", tmp_path)
    conditions = [checkpoint_facts(scenario, digits, each, {})["config"]["conditions"] for each in (eager, compiled)]
    assert "compiled" not in conditions[0]
    assert ", compiled, " in conditions[1]
    assert describe_environment(compiled)["compiled"] is True
