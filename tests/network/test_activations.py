from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.network.activations import record_statistics
from tests.helpers import random_images

MEANS = ("mean_absolute", "frequency", "second_moment")
CONSUMERS = (0, 3, 4, 6)  # the layers of `small` that are recorded


@pytest.fixture
def images():
    return random_images(37)


@pytest.fixture
def small():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 5 * 5, 2),
    )  # fmt: skip


def _has_hooks(network):
    return any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_statistics_are_the_means_of_each_layers_inputs(small, images, compute):
    recorded = record_statistics(small, images, compute)
    assert list(recorded) == [small[number] for number in CONSUMERS]
    small.double().eval()
    values = next(images.batches(len(images)))[0].double()
    for layer in small:
        if layer in recorded:
            rows = values if values.ndim == 2 else values.movedim(1, -1).flatten(0, 2)  # (everything else, C)
            torch.testing.assert_close(recorded[layer].mean_absolute, rows.abs().mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(recorded[layer].second_moment, rows.square().mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(recorded[layer].frequency, (rows > 0).double().mean(0), rtol=1e-3, atol=1e-3)
        values = layer(values)


def test_the_split_into_batches_does_not_change_the_statistics(small, images, compute):
    whole = record_statistics(small, images, compute)
    for size in (1, 8, 36):  # the last batch is smaller
        parts = record_statistics(small, images, replace(compute, inference_pixels=size * 64))
        for number in CONSUMERS:
            for name in MEANS:
                expected = getattr(whole[small[number]], name)
                torch.testing.assert_close(getattr(parts[small[number]], name), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MEANS)
def test_one_mean_can_be_recorded_without_the_others(name, small, images, compute):
    whole, part = record_statistics(small, images, compute), record_statistics(small, images, compute, moments=(name,))
    for layer, statistics in whole.items():
        assert torch.equal(getattr(part[layer], name), getattr(statistics, name))
        assert [getattr(part[layer], other) for other in MEANS if other != name] == [None, None]


@pytest.mark.parametrize("training", [False, True])
def test_recording_does_not_change_the_network(small, images, compute, training):
    small.train(training)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    record_statistics(small, images, compute)
    assert small.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert not _has_hooks(small)


def test_no_hook_remains_after_a_failed_forward_pass(small, images, compute):
    small[-1] = nn.Linear(7, 2)
    with pytest.raises(RuntimeError):
        record_statistics(small, images, compute)
    assert not _has_hooks(small)


def test_a_network_with_values_that_are_not_finite_is_refused(small, images, compute):
    small[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite numbers: its weights are damaged"):
        record_statistics(small, images, compute)
