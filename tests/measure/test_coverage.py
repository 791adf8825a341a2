"""Coverage against the dnn-tip package on the same activations, gathered here in another way."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from dnn_tip.neuron_coverage import KMNC, NAC, NBC, SNAC, TKNC
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.runtime.compute import choose_compute

NAMES = ["inner", "second", "shortcut", "last", "classify", "output"]  # where outputs are seen: their first readers


class Residual(nn.Module):
    """One ReLU for everything, a residual addition that two layers read, and a pooled end."""

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


def _pictures(count, seed, spread=256):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, spread, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 4, torch.full((3,), 0.5), torch.full((3,), 0.3))


TRAINING, TEST = _pictures(41, seed=0, spread=200), _pictures(37, seed=1)


@pytest.fixture
def tens(compute):
    """As everywhere, in batches of 10 of these pictures, so that the last is ragged."""
    return replace(compute, inference_pixels=10 * 64)


@pytest.fixture(scope="module", params=["whole", "pruned"])
def residual(request):
    torch.manual_seed(0)
    network = Residual().eval()
    network.norm.bias.data[3] = -50  # a dead neuron
    if request.param == "pruned":
        compute = choose_compute("cpu", "float32")
        prune_to_budget(network, WandaImportance(), TRAINING, TRAINING, compute, 0.3, None, 1, 16, [1])
        assert network.inner.out_channels < 24
    return network


def _gathered(network, images, values=lambda layer: layer):
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


@pytest.mark.parametrize("beyond", [0.0, 0.5])
def test_all_criteria_are_those_of_dnn_tip(residual, tens, beyond):
    profiles = record_profiles(residual, TRAINING, tens)
    measured = measure_coverage(residual, TEST, profiles, tens, sections=50, beyond=beyond, top=2)
    seen = _gathered(residual, TRAINING)
    low, high, deviation = ([getattr(layer, name)(0) for layer in seen] for name in ("min", "max", "std"))
    assert list(profiles) == NAMES
    for profile, *expected in zip(profiles.values(), low, high, deviation):
        for name, values in zip(("low", "high", "deviation"), expected):
            np.testing.assert_allclose(getattr(profile, name).numpy(), values, rtol=1e-5, atol=1e-6)

    activations = _gathered(residual, TEST)
    # A value that equals a boundary is beyond it for dnn-tip: it would call the dead neuron, always 0, out of bounds.
    below, above = [layer - 1e-6 for layer in low], [layer + 1e-6 for layer in high]
    expected = {
        "kmnc_percent": _expected(KMNC(low, high, sections=50), activations),
        "nbc_percent": _expected(NBC(below, above, deviation, beyond), activations),
        "snac_percent": _expected(SNAC(above, deviation, beyond), activations),
        "tknc_percent": _expected(TKNC(2), activations),
    }
    assert measured["neurons"] == sum(layer.shape[1] for layer in activations)
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, abs=1e-9), key
        assert 0 < value < 100, key


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 0.5])
def test_neuron_coverage_is_that_of_dnn_tip_on_raw_and_on_scaled_values(residual, tens, threshold):
    profiles = record_profiles(residual, TRAINING, tens)
    for scaled, values in ((True, _scaled), (False, lambda layer: layer)):
        measured = measure_coverage(residual, TEST, profiles, tens, threshold, scaled)
        expected = NAC(threshold)(_gathered(residual, TEST, values))[1].any(0)
        assert measured["nc_percent"] == pytest.approx(100 * expected.mean(), abs=1e-9)
        widths = np.cumsum([layer["neurons"] for layer in measured["layers"]])[:-1]
        parts = [100 * part.mean() for part in np.split(expected, widths)]
        assert [layer["nc_percent"] for layer in measured["layers"]] == pytest.approx(parts)


def test_how_images_are_split_into_batches_does_not_matter(residual, tens):
    at_once = replace(tens, inference_pixels=41 * 64)
    whole = record_profiles(residual, TRAINING, at_once)
    expected = measure_coverage(residual, TEST, whole, at_once, sections=20)
    for size in (1, 9):
        small = replace(tens, inference_pixels=size * 64)
        parts = record_profiles(residual, TRAINING, small)
        for name, profile in parts.items():
            torch.testing.assert_close(profile.deviation, whole[name].deviation, rtol=1e-5, atol=1e-7)
        measured = measure_coverage(residual, TEST, parts, small, sections=20)
        for key in ("nc_percent", "kmnc_percent", "tknc_percent"):
            assert measured[key] == pytest.approx(expected[key], abs=0.5)


def test_the_images_a_profile_was_made_of_cross_no_boundary(residual, tens):
    profiles = record_profiles(residual, TRAINING, tens)
    measured = measure_coverage(residual, TRAINING, profiles, tens)
    assert measured["nbc_percent"] == measured["snac_percent"] == 0
    assert measured["kmnc_percent"] > 0


def test_a_resnet_has_its_layers_once_and_is_left_as_it_was(network, digits, compute):
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


def test_a_lower_precision_of_the_network_is_not_that_of_the_measurement(residual):
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
    with pytest.raises(UserError, match="not finite numbers"):
        record_profiles(damaged, TRAINING, tens)
    with pytest.raises(UserError, match="not finite numbers"):
        measure_coverage(damaged, TEST, profiles, tens)
