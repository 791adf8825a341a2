import pytest
import torch
import torch_pruning as tp
from torch import nn

from cleanai.activations import ChannelStatistics, record_statistics
from cleanai.importance import NeuronCoverageImportance, WandaImportance

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
    coverage = importance.coverage(STATISTICS)
    assert coverage.tolist() == pytest.approx(expected)
    shares = importance.shares(nn.Linear(4, 2), STATISTICS)
    assert shares.tolist() == pytest.approx([value / sum(expected) for value in expected])


def _wanda_by_hand(weights, norms):
    """Shares from weights (outputs, inputs), written out."""
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
    assert WandaImportance().shares(layer, STATISTICS).tolist() == pytest.approx(expected)


def test_wanda_in_a_grouped_convolution_counts_each_group_for_itself():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    weights, norms = layer.weight.detach().double().abs().sum((2, 3)), STATISTICS.second_moment.sqrt().tolist()
    halves = [_wanda_by_hand(weights[:3].tolist(), norms[:2]), _wanda_by_hand(weights[3:].tolist(), norms[2:])]
    expected = [share / 2 for half in halves for share in half]
    assert WandaImportance().shares(layer, STATISTICS).tolist() == pytest.approx(expected)


def test_a_layer_that_receives_nothing_scores_zero_everywhere():
    nothing = ChannelStatistics(*(torch.zeros(4, dtype=torch.float64) for _ in range(3)))
    for importance in (NeuronCoverageImportance(), WandaImportance()):
        assert importance.shares(nn.Linear(4, 3), nothing).tolist() == [0, 0, 0, 0]


def _scores(network, importance, images, compute):
    importance.statistics = record_statistics(network, images, compute, batch_size=64)
    graph = tp.DependencyGraph().build_dependency(network, torch.zeros(1, 3, 16, 16))
    names = {module: name for name, module in network.named_modules()}
    return {names[group[0].dep.layer]: importance(group) for group in graph.get_all_groups([network.fc])}


@pytest.mark.parametrize("importance", [NeuronCoverageImportance(), WandaImportance()])
class TestOnANetwork:
    def test_a_residual_stream_sums_the_shares_of_all_its_readers(self, network, digits, compute, importance):
        images = digits.test.select(torch.arange(64))
        scores = _scores(network, importance, images, compute)
        assert scores["layer1.0.conv1"].sum() == pytest.approx(1)  # read by one layer
        assert scores["conv1"].sum() == pytest.approx(4)  # two of stage 1; a convolution and a shortcut of stage 2
        readers = [network.layer4[1].conv1, network.fc]
        expected = sum(importance.shares(reader, importance.statistics[reader]) for reader in readers)
        stream = next(name for name in ("layer4.0.conv2", "layer4.0.downsample.0") if name in scores)
        torch.testing.assert_close(scores[stream], expected)

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
