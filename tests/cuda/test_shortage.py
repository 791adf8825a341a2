"""A shortage of memory is met by smaller batches, or ends as one; no file and no network is blamed for it."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch_pruning as tp

from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.network import models, training
from cleanai.network.activations import observe, record_statistics
from cleanai.network.evaluation import evaluate
from cleanai.network.models import network_from
from cleanai.network.training import TrainSettings, fine_tune
from cleanai.network.weights import read_weights
from cleanai.pruning.groups import Group, find_groups, sound_groups
from cleanai.pruning.rows import record_rows
from cleanai.runtime.checkpoints import load_checkpoint
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.scenario import Scenario
from tests.cuda.stand_in import cuda_stand_in, needs_fused_adam
from tests.small_network import SmallNetwork

SHORTAGE = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NAMELESS = RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.fixture
def small():
    torch.manual_seed(0)
    return SmallNetwork(10).eval()


def interrupted_in(epoch):
    """`evaluate`, interrupted in this epoch."""

    def run(network, images, compute, title):
        if title.startswith(f"Epoch {epoch}"):
            raise KeyboardInterrupt
        return evaluate(network, images, compute, title)

    return run


def measured(network, images, compute):
    """What is measured by passes whose batch size does not matter."""
    tested = evaluate(network, images, compute)
    spreads = {network.second[0]: 1, network.last[0]: 1, network.classifier: 1}
    statistics = record_statistics(network, images, compute)
    profiles = record_profiles(network, images, compute)
    moments = [torch.stack(list(vars(each).values())) for each in statistics.values()]
    inputs, outputs = record_rows(network, spreads, images, compute)
    return {
        "correct": tested.correct,
        "loss": torch.tensor(tested.loss),
        "moments": torch.cat(moments, 1),
        "coverage": torch.tensor(measure_coverage(network, images, profiles, compute)["kmnc_percent"]),
        "ranges": torch.cat([torch.stack([each.low, each.high]) for each in profiles.values()], 1),
        "rows": torch.cat([rows.flatten().cpu() for rows in (*inputs.values(), *outputs.values())]),
    }


@needs_fused_adam
@pytest.mark.parametrize("layer", ["conv2d", "linear", "sign"])
@pytest.mark.parametrize(("most", "error"), [(1, NAMELESS), (13, SHORTAGE)])
def test_smaller_batches_measure_the_same(most, layer, error, small, digits):
    """The shortage is in the first layer, in the last one, and in a sum over a layer's inputs."""
    images = digits.test.select(torch.arange(45))
    with cuda_stand_in((6, 1)) as card:
        compute = choose_compute("cuda", "float32")
        images, network = images.to(compute.device), compute.place(small)
        expected, passed = measured(network, images, compute), Counter()

        def fail(name, tensors):
            if name == layer and len(tensors[0]) > most:
                passed["failed"] += 1
                raise error

        card.fail = fail
        found = measured(network, images, compute)
        assert 1 <= passed["failed"] <= 40, "later batches begin with the size that was found"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def test_every_layer_is_called_once_for_every_image(small, digits, compute):
    """Also when the shortage comes after some layers, at several sizes, and some layer runs more than once."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)

        def forward(self, inputs):
            values = self.again(self.first(inputs))
            passes.append(len(values))
            if len(passes) in (1, 3, 4):
                raise NAMELESS
            return self.again(values)

    seen, passes = {}, []
    network, images = Twice(), digits.test.select(torch.arange(11))

    def callback(module, values):
        seen.setdefault(module, []).append(len(values))

    observe(network, [network.first, network.again], callback, images, compute, "", output=True)
    assert passes == [11, 6, 5, 3, 2, 1, 2]
    assert seen == {network.first: [11], network.again: [11, 6, 2, 1, 2], network: [6, 2, 1, 2]}


@pytest.mark.parametrize("error", [SHORTAGE, MemoryError(), ValueError("a bug")])
def test_other_errors_and_a_shortage_for_one_image_are_raised(error, small, digits, compute):
    sizes = []

    def fail(network, args):
        sizes.append(len(args[0]))
        raise error

    small.register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        evaluate(small, digits.test.select(torch.arange(8)), compute)
    assert sizes == ([8] if isinstance(error, ValueError) else [8, 4, 2, 1])


@pytest.mark.parametrize("error", [SHORTAGE, NAMELESS], ids=["by name", "in other words"])
def test_a_shortage_is_no_property_of_a_network(error, small, digits, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    example = next(digits.test.batches(2))[0]
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Group, "remove", fail)
        sound_groups(small, example)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(tp.DependencyGraph, "build_dependency", fail)
        find_groups(small, example)


@pytest.mark.parametrize("error", [SHORTAGE, NAMELESS, MemoryError()], ids=["by name", "in other words", "Python's"])
def test_a_shortage_is_no_fault_of_a_file(error, small, digits, compute, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    scenario, few = Scenario("T", "ResNet18", "Digits", tmp_path), digits.with_train_samples(16, 0)
    settings, facts = TrainSettings(epochs=2, batch_size=16), {"config": {}}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate", interrupted_in(2))
        fine_tune(copy.deepcopy(small), few, compute, settings, scenario, facts)
    assert scenario.resume.exists()
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(torch.optim.Adam, "load_state_dict", fail)
        fine_tune(copy.deepcopy(small), few, compute, settings, scenario, facts)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        for read in (load_checkpoint, read_weights):
            with pytest.raises(type(error)):
                read(scenario.resume)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(models, "build", lambda *_: small)
        patch.setattr(SmallNetwork, "forward", fail)
        content = {"model": "own", "classes": range(10), "image_size": (16, 16), "state_dict": small.state_dict()}
        network_from(content, tmp_path)
    assert scenario.resume.exists()
