from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from dnn_tip.neuron_coverage import NAC
from torch import nn

from cleanai.network.activations import ChannelStatistics, record_statistics
from cleanai.pruning.criteria import NeuronCoverageImportance, WandaImportance
from tests.helpers import random_images

STATISTICS = ChannelStatistics(
    mean_absolute=torch.tensor([0.0, 1.0, 4.0, 3.0], dtype=torch.float64),
    frequency=torch.tensor([0.0, 0.5, 0.25, 1.0], dtype=torch.float64),
    second_moment=torch.tensor([0.0, 4.0, 25.0, 9.0], dtype=torch.float64),
)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("normalized_mean", [0, 0.25, 1, 0.75]),
        ("mean_absolute", [0, 1, 4, 3]),
        ("frequency", [0, 0.5, 0.25, 1]),
        ("combined", [0, 0.375, 0.625, 0.875]),
    ],
)
def test_coverage_metrics(metric, expected):
    importance = NeuronCoverageImportance(metric)
    assert importance.scores(nn.Linear(4, 2), STATISTICS).tolist() == pytest.approx(expected)


def _wanda_by_hand(weights, norms):
    """The shares of inputs in outputs, from weights (outputs, inputs), number by number."""
    shares = [0.0] * len(norms)
    for row in weights:
        products = [abs(w) * norm for w, norm in zip(row, norms)]
        for j, product in enumerate(products):
            shares[j] += product / sum(products) / len(weights)
    return shares


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 3), nn.ConvTranspose2d(4, 3, 2)])
def test_wanda_is_weight_times_norm_as_a_share_of_each_output(layer):
    weights = layer.weight.detach().double().abs()
    if isinstance(layer, nn.ConvTranspose2d):
        weights = weights.transpose(0, 1)
    if weights.ndim == 4:
        weights = weights.sum((2, 3))
    expected = _wanda_by_hand(weights.tolist(), STATISTICS.second_moment.sqrt().tolist())
    assert WandaImportance().scores(layer, STATISTICS).tolist() == pytest.approx(expected)


def test_wanda_in_a_grouped_convolution_scores_each_group_by_itself():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    weights, norms = layer.weight.detach().double().abs().sum((2, 3)), STATISTICS.second_moment.sqrt().tolist()
    halves = [_wanda_by_hand(weights[:3].tolist(), norms[:2]), _wanda_by_hand(weights[3:].tolist(), norms[2:])]
    expected = [share / 2 for half in halves for share in half]
    assert WandaImportance().scores(layer, STATISTICS).tolist() == pytest.approx(expected)


def _official_shares(weight, batches):
    """WANDA as published for a linear layer, in float64, then our shares: `scaler_row` is updated batch by batch.

    `weight` (outputs, inputs); `batches` of inputs (images, positions, inputs).
    """
    scaler_row, count = torch.zeros(weight.shape[1], dtype=torch.float64), 0
    for batch in batches:
        scaler_row *= count / (count + len(batch))
        count += len(batch)
        scaler_row += batch.flatten(0, 1).norm(p=2, dim=0) ** 2 / count
    scores = weight.abs() * scaler_row.sqrt()
    return (scores / scores.sum(1, keepdim=True)).mean(0)


@pytest.fixture
def images():
    return random_images(37)


def _recorded_shares(network, layer, images, compute):
    importance = WandaImportance()
    in_batches = replace(compute, inference_pixels=10 * 64)
    return importance.scores(layer, record_statistics(network, images, in_batches)[layer])


def test_wanda_on_a_linear_layer_is_the_published_one(images, compute):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    shares = _recorded_shares(network, network[-1], images, compute)
    double = network.double()
    with torch.no_grad():
        batches = [double[:-1](inputs.double())[:, None] for inputs, _ in images.batches(16)]  # other batches
    torch.testing.assert_close(shares, _official_shares(double[-1].weight.detach(), batches), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
def test_wanda_on_a_convolution_is_the_published_one_on_its_windows(padding_mode, images, compute):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, padding=1, padding_mode=padding_mode)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), layer)
    shares = _recorded_shares(network, layer, images, compute)
    double, batches = network.double(), []
    for inputs, _ in images.batches(16):
        with torch.no_grad():
            values = double[:2](inputs.double())
        values = F.pad(values, (1,) * 4, "circular" if padding_mode == "circular" else "constant")
        batches.append(F.unfold(values, 3).movedim(1, 2))  # (images, positions, channels * kernel positions)
    published = _official_shares(layer.weight.detach().flatten(1), batches).unflatten(0, (6, 9)).sum(1)
    # Each kernel position reads the whole channel when the border wraps around; zeros around the image change a little.
    torch.testing.assert_close(shares, published, rtol=1e-5 if padding_mode == "circular" else 0.05, atol=1e-8)


def test_frequency_is_that_of_dnn_tip(network, digits, compute):
    images = digits.test.select(torch.arange(20))
    statistics = record_statistics(network, images, compute)
    layer, inputs = network.layer2[0].conv2, []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].numpy()))
    with torch.inference_mode():
        network(next(images.batches(20))[0])
    hook.remove()
    _, profiles = NAC(cov_threshold=0.0)(inputs)
    expected = profiles.reshape(20, 128, -1).mean((0, 2))
    np.testing.assert_allclose(statistics[layer].frequency.numpy(), expected, atol=2e-3)  # sums in another order
    assert 0.05 < expected.mean() < 0.95


def test_all_zero_inputs_score_zero():
    nothing = ChannelStatistics(*(torch.zeros(4, dtype=torch.float64) for _ in range(3)))
    for importance in (NeuronCoverageImportance(), WandaImportance()):
        assert importance.scores(nn.Linear(4, 3), nothing).tolist() == [0, 0, 0, 0]


def _scores(network, importance, images, compute):
    importance.statistics = record_statistics(network, images, compute)
    graph = tp.DependencyGraph().build_dependency(network, torch.zeros(1, 3, 16, 16))
    names = {module: name for name, module in network.named_modules()}
    return {names[group[0].dep.layer]: importance(group) for group in graph.get_all_groups([network.fc])}


@pytest.mark.parametrize("importance", [NeuronCoverageImportance(), WandaImportance()])
class TestOnANetwork:
    def test_a_residual_stream_sums_the_scores_of_all_its_consumers(self, network, digits, compute, importance):
        images = digits.test.select(torch.arange(64))
        scores = _scores(network, importance, images, compute)
        first, second = network.layer1, network.layer2[0]
        last = next(name for name in ("layer4.0.conv2", "layer4.0.downsample.0") if name in scores)
        for name, consumers in {
            "layer1.0.conv1": [first[0].conv2],
            "conv1": [first[0].conv1, first[1].conv1, second.conv1, second.downsample[0]],
            last: [network.layer4[1].conv1, network.fc],
        }.items():
            expected = sum(importance.scores(layer, importance.statistics[layer]) for layer in consumers)
            torch.testing.assert_close(scores[name], expected)

    def test_rescaling_a_producer_through_batch_norm_changes_nothing(self, network, digits, compute, importance):
        images = digits.test.select(torch.arange(64))
        before = _scores(network, importance, images, compute)
        block = network.layer2[0]
        block.conv1.weight.data *= 3
        block.bn1.running_mean *= 3
        block.bn1.running_var *= 9
        after = _scores(network, importance, images, compute)
        for name, scores in before.items():
            torch.testing.assert_close(after[name], scores, rtol=1e-3, atol=1e-6)

    def test_a_dead_channel_scores_zero(self, network, digits, compute, importance):
        norm = network.layer3[0].bn1
        norm.weight.data[5], norm.bias.data[5] = 0, -1
        scores = _scores(network, importance, digits.test.select(torch.arange(64)), compute)["layer3.0.conv1"]
        assert scores[5] == 0
        assert (scores > 0).sum() > 200

    def test_permuting_channels_permutes_scores(self, network, digits, compute, importance):
        images = digits.test.select(torch.arange(64))
        before = _scores(network, importance, images, compute)["layer2.1.conv1"]
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        block = network.layer2[1]
        block.conv1.weight.data = block.conv1.weight.data[order]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn1, name).data = getattr(block.bn1, name).data[order]
        block.conv2.weight.data = block.conv2.weight.data[:, order]
        after = _scores(network, importance, images, compute)["layer2.1.conv1"]
        torch.testing.assert_close(after, before[order], rtol=1e-3, atol=1e-6)
        assert not torch.allclose(after, before, rtol=1e-2)
