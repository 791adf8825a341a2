"""Coverage against the package dnn-tip on the same activations, which are recorded here in another way."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from dnn_tip.neuron_coverage import KMNC, NAC, NBC, SNAC, TKNC
from torch import nn

from cleanai import UserError
from cleanai.measure import coverage
from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.network.activations import not_finite
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.compute import choose_compute
from tests.helpers import random_images

NAMES = ["inner", "second", "shortcut", "last", "classify", "output"]  # the first layer that reads each output


class Residual(nn.Module):
    """One ReLU for all layers, a residual addition that two layers read, and a pooled end."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.second = nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 3, padding=2)
        self.shortcut, self.hidden = nn.Conv2d(16, 20, 1), nn.Conv2d(16, 20, 3, padding=1)
        self.last, self.classify, self.relu = nn.Linear(20, 18), nn.Linear(18, 4), nn.ReLU()

    def forward(self, inputs):
        return self.outputs(inputs)[-1]

    def outputs(self, inputs):
        stem = self.relu(self.norm(self.first(inputs)))
        inner = self.relu(self.inner(stem))
        stream = self.relu(self.second(inner) + stem)
        joined = self.relu(self.shortcut(stream) + self.hidden(stream))
        pooled = joined.mean((2, 3))
        last = torch.tanh(self.last(pooled))
        return [stem, inner, stream, pooled, last, self.classify(last)]


TRAINING, TEST = random_images(41, seed=0, below=200), random_images(37, seed=1)


@pytest.fixture
def tens(compute):
    """The same in batches of 10 of these images, so that the last one is smaller."""
    return replace(compute, inference_pixels=10 * 64)


@pytest.fixture(scope="module", params=["whole", "pruned"])
def residual(request):
    torch.manual_seed(0)
    network = Residual().eval()
    network.norm.bias.data[3] = -50  # a dead neuron
    if request.param == "pruned":
        compute, images = choose_compute("cpu", "float32"), PruneImages(TRAINING, TRAINING)
        settings = PruneSettings(0.3, None, steps=1, round_to=[1], batch_size=16)
        prune_to_budget(network, WandaImportance(), images, compute, settings)
        assert network.inner.out_channels < 24
    return network


def _activations(network, images, values=lambda layer: layer):
    """The neurons of each layer on all images at once: arrays (images, channels), after `values` of the layer."""
    with torch.inference_mode():
        layers = network.outputs(next(images.batches(len(images)))[0])
    return [values(layer).reshape(*layer.shape[:2], -1).mean(2).double().numpy() for layer in layers]


def _scaled(layer):
    flat = layer.flatten(1)
    low, high = (bound.reshape(-1, *[1] * (layer.ndim - 1)) for bound in (flat.amin(1), flat.amax(1)))
    return (layer - low) / (high - low)


def _expected(criterion, activations):
    return 100 * criterion(activations)[1].any(0).mean()


def test_all_criteria_are_those_of_dnn_tip(residual, tens, monkeypatch):
    monkeypatch.setattr(coverage, "SECTIONS", 50)
    monkeypatch.setattr(coverage, "TOP", 2)
    profiles = record_profiles(residual, TRAINING, tens)
    measured = measure_coverage(residual, TEST, profiles, tens)
    in_training = _activations(residual, TRAINING)
    low, high, deviation = ([getattr(layer, name)(0) for layer in in_training] for name in ("min", "max", "std"))
    assert list(profiles) == NAMES
    for profile, *expected in zip(profiles.values(), low, high):
        for values, expected_values in zip((profile.low, profile.high), expected):
            np.testing.assert_allclose(values.numpy(), expected_values, rtol=1e-5, atol=1e-6)

    activations = _activations(residual, TEST)
    # For dnn-tip a value on a boundary is outside: the dead neuron, always 0, would be out of bounds.
    below, above = [layer - 1e-6 for layer in low], [layer + 1e-6 for layer in high]
    expected = {
        "kmnc_percent": _expected(KMNC(low, high, sections=50), activations),
        "nbc_percent": _expected(NBC(below, above, deviation, 0), activations),
        "snac_percent": _expected(SNAC(above, deviation, 0), activations),
        "tknc_percent": _expected(TKNC(2), activations),
        "scc_percent": 100 * np.concatenate([(a > 0).any(0) & (a <= 0).any(0) for a in activations]).mean(),
    }
    assert measured["neurons"] == sum(layer.shape[1] for layer in activations)
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, abs=1e-9), key
        assert 0 < value < 100, key


def test_neuron_coverage_is_that_of_dnn_tip_on_scaled_values(residual, tens):
    measured = measure_coverage(residual, TEST, record_profiles(residual, TRAINING, tens), tens)
    scaled = _activations(residual, TEST, _scaled)
    by_threshold = [(each["threshold"], each["percent"]) for each in measured["nc_by_threshold"]]
    assert by_threshold == [
        (threshold, pytest.approx(_expected(NAC(threshold), scaled), abs=1e-9)) for threshold in (0, 0.25, 0.5, 0.75)
    ]
    assert len({percent for _, percent in by_threshold}) == 4
    expected = NAC(0.25)(scaled)[1].any(0)
    assert measured["nc_percent"] == pytest.approx(100 * expected.mean(), abs=1e-9)
    widths = np.cumsum([layer["neurons"] for layer in measured["layers"]])[:-1]
    parts = [100 * part.mean() for part in np.split(expected, widths)]
    assert [layer["nc_percent"] for layer in measured["layers"]] == pytest.approx(parts)


def test_the_split_into_batches_does_not_change_the_coverage(residual, tens, monkeypatch):
    monkeypatch.setattr(coverage, "SECTIONS", 20)
    at_once = replace(tens, inference_pixels=41 * 64)
    whole = record_profiles(residual, TRAINING, at_once)
    expected = measure_coverage(residual, TEST, whole, at_once)
    for size in (1, 9):
        small = replace(tens, inference_pixels=size * 64)
        parts = record_profiles(residual, TRAINING, small)
        for name, profile in parts.items():
            torch.testing.assert_close(profile.low, whole[name].low, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(profile.high, whole[name].high, rtol=1e-5, atol=1e-7)
        measured = measure_coverage(residual, TEST, parts, small)
        for key in ("nc_percent", "kmnc_percent", "tknc_percent"):
            assert measured[key] == pytest.approx(expected[key], abs=0.5)


def test_the_images_of_a_profile_cross_no_boundary(residual, tens):
    profiles = record_profiles(residual, TRAINING, tens)
    measured = measure_coverage(residual, TRAINING, profiles, tens)
    assert measured["nbc_percent"] == measured["snac_percent"] == 0
    assert measured["kmnc_percent"] > 0


def test_each_layer_of_a_resnet_counts_once_and_the_network_does_not_change(network, digits, compute):
    images = digits.test.select(torch.arange(16))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    measured = measure_coverage(network, images, record_profiles(network, images, compute), compute)
    names = [layer["name"] for layer in measured["layers"]]
    assert names[:3] == ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]
    assert "layer2.0.conv1" in names and "layer2.0.downsample.0" not in names
    assert names[-2:] == ["fc", "output"]
    assert measured["neurons"] == 5 * 64 + 4 * 128 + 4 * 256 + 4 * 512 + 10
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_the_means_of_bfloat16_values_are_exact(residual):
    compute = choose_compute("cpu", "bfloat16")
    profiles = record_profiles(residual, TRAINING, compute)
    assert list(profiles) == NAMES
    assert all(profile.low.dtype == torch.float64 for profile in profiles.values())
    means = profiles["second"].high
    assert not torch.equal(means.bfloat16().double(), means)  # the values are bfloat16, their means are not


def test_profiles_of_another_network_and_damaged_networks_are_refused(residual, tens):
    profiles = record_profiles(residual, TRAINING, tens)
    other = copy.deepcopy(residual)
    other.last, other.classify = nn.Linear(residual.last.in_features, 30), nn.Linear(30, 4)
    with pytest.raises(UserError, match="profiles are of another network"):
        measure_coverage(other, TEST, profiles, tens)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in other.modules())
    damaged = copy.deepcopy(residual)
    damaged.inner.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match=re.escape(str(not_finite()))):
        record_profiles(damaged, TRAINING, tens)
    with pytest.raises(UserError, match=re.escape(str(not_finite()))):
        measure_coverage(damaged, TEST, profiles, tens)
