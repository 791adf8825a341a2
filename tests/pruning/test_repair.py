"""Recalibration of batch norm, and the reconstruction of layers in the order of their execution."""

import copy

import pytest
import torch
from torch import nn

from cleanai.network.models import resnet18_for_small_images
from cleanai.pruning.groups import find_groups
from cleanai.pruning.least_squares import reconstruct
from cleanai.pruning.repair import REPAIR_BYTES, Targets, most_images, recalibrate, reconstruct_in_order
from cleanai.pruning.rows import NO_CHANNELS, convolved, record_rows


@pytest.fixture
def three_convolutions():
    """Three convolutions in a row; channels can be removed from the inputs of the second and the third."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 2, 1)
    ).eval()  # fmt: skip


def _repaired(network, images, compute, removed, change=lambda network: None):
    """A copy, changed and then repaired without the inputs `removed` of its second and third convolution."""
    network = copy.deepcopy(network)
    spreads = {network[2]: 1, network[4]: 1}
    inputs, outputs = record_rows(network, spreads, images, compute)
    change(network)
    reconstruct_in_order(network, Targets(inputs, outputs, dict(zip(spreads, removed))), spreads, images, compute, "")
    assert not any(layer._forward_pre_hooks for layer in network)
    return network


def test_a_layer_compensates_for_changes_before_it(three_convolutions, images, compute):
    def double(network):
        network[0].weight.data *= 2
        network[0].bias.data *= 2

    inputs = next(images.batches(50))[0]
    nothing = [NO_CHANNELS, NO_CHANNELS]
    with torch.inference_mode():
        repaired = _repaired(three_convolutions, images, compute, nothing, double)
        torch.testing.assert_close(repaired(inputs), three_convolutions(inputs), rtol=1e-2, atol=1e-3)
    unchanged = _repaired(three_convolutions, images, compute, nothing)
    assert torch.equal(unchanged[2].weight, three_convolutions[2].weight)


def test_the_error_is_smaller_than_when_each_layer_is_reconstructed_alone(three_convolutions, images, compute):
    removed = [torch.arange(6), torch.arange(4)]
    alone = copy.deepcopy(three_convolutions)
    for number, channels in zip((2, 4), removed):
        layer = three_convolutions[number]
        rows = record_rows(three_convolutions, {layer: 1}, images, compute)[0][layer]
        reconstruct(alone[number], rows, rows, channels)
    in_order = _repaired(three_convolutions, images, compute, removed)
    inputs = next(images.batches(50))[0]
    with torch.inference_mode():
        errors = [(repaired(inputs) - three_convolutions(inputs)).square().mean() for repaired in (in_order, alone)]
    assert errors[0] < 0.9 * errors[1]
    for number, channels in zip((2, 4), removed):
        assert not in_order[number].weight[:, channels].any()


def test_a_channel_is_replaced_by_its_shifted_duplicate(images, compute, monkeypatch):
    """One channel is another, shifted by one position: only weights of single kernel positions can use that."""
    torch.manual_seed(1)
    first = nn.Conv2d(3, 8, 3)
    first.weight.data[1] = 0
    first.weight.data[0, :, :, 2] = 0
    first.weight.data[1, :, :, 1:] = first.weight.data[0, :, :, :2]
    first.bias.data[1] = first.bias[0]
    consumer = nn.Conv2d(8, 6, 3)
    consumer.weight.data[:, 1, :, 2] = 0  # it reads the shifted channel only where it also reads the other
    network = nn.Sequential(first, nn.ReLU(), consumer).eval()
    inputs = next(images.batches(50))[0]
    errors = []
    for rows_per_weight in (3, float("inf")):  # with windows, and without
        monkeypatch.setattr("cleanai.pruning.rows.ROWS_PER_WEIGHT", rows_per_weight)
        repaired = copy.deepcopy(network)
        spreads = {repaired[2]: 1}
        targets = Targets(*record_rows(repaired, spreads, images, compute), {repaired[2]: torch.tensor([1])})
        reconstruct_in_order(repaired, targets, spreads, images, compute, "")
        with torch.inference_mode():
            errors.append((repaired(inputs) - network(inputs)).square().mean())
    assert errors[0] < 0.2 * errors[1]


class Twice(nn.Module):
    """Its second layer runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, inputs):
        return self.last(self.again(self.again(self.first(inputs).relu()).relu()).relu())


@pytest.mark.parametrize("removed", [[], [1]])
def test_a_layer_that_runs_twice_keeps_its_other_weights(removed, images, compute):
    network = Twice().eval()
    before = copy.deepcopy(network)
    spreads = {network.again: 1, network.last: 1}
    inputs, outputs = record_rows(network, spreads, images, compute)
    all_removed = {network.again: torch.tensor(removed, dtype=torch.long), network.last: torch.tensor([1])}
    rows = reconstruct_in_order(network, Targets(inputs, outputs, all_removed), spreads, images, compute, "")
    assert rows == ({}, {}), "the inputs of its last run are unknown"
    assert not network.again.weight[:, removed].any()
    kept = [channel for channel in range(8) if channel not in removed]
    assert torch.equal(network.again.weight[:, kept], before.again.weight[:, kept])
    assert not torch.equal(network.last.weight, before.last.weight)


def test_behind_a_batch_norm_that_runs_twice_no_rows_are_returned(images, compute):
    """It normalises each time by the batch itself, and afterwards by the mean over both."""
    norm = nn.BatchNorm2d(8)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 2, 1)).eval()
    spreads = {network[2]: 1, network[4]: 1}
    assert reconstruct_in_order(network, Targets(), spreads, images, compute, "") == ({}, {})


@pytest.mark.parametrize(
    "last",
    [lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 6))],
    ids=["transposed", "linear behind a flatten"],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_returned_rows_are_those_of_the_cut_network(groups, last, images, compute):
    """As if they had been recorded again: the next step of pruning starts with them."""
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, groups=groups),
        nn.BatchNorm2d(8), nn.ReLU(), last()
    ).eval()  # fmt: skip
    middle = network[3]
    graph, found = find_groups(network, next(images.batches(1))[0])
    spreads = {layer: spread for group in found for layer, spread in group.spreads.items()}

    def assert_recorded(channels, windows):
        inputs, outputs = record_rows(network, spreads, images, compute)
        assert set(channels) == set(inputs) == set(spreads)
        assert set(windows) == set(outputs) == {middle}
        for layer, rows in inputs.items():
            torch.testing.assert_close(channels[layer], rows, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(convolved(middle, windows[middle]), outputs[middle], rtol=1e-3, atol=1e-3)
        return inputs, outputs

    recorded = assert_recorded(*reconstruct_in_order(network, Targets(), spreads, images, compute, ""))
    removed = {layer: group.inputs(layer)[[2, 1]].flatten() for group in found for layer in group.consumers}
    returned = reconstruct_in_order(network, Targets(*recorded, removed), spreads, images, compute, "")
    for group in found:
        group.remove(graph, [1, 2])
    assert_recorded(*returned)


def test_recalibration_does_not_activate_dropout(digits, compute):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    images = digits.train.sample(64, seed=0)
    recalibrate(network, images, compute, batch_size=64, title="")
    with torch.inference_mode():
        inputs_of_norm = network[1](next(images.batches(64))[0])
    torch.testing.assert_close(network[2].running_var, inputs_of_norm.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert network[2].momentum == 0.1


def test_recalibration_sets_the_statistics_of_the_present_inputs(network, digits, compute):
    norm, images = network.bn1, digits.train.sample(128, seed=0)
    norm.running_mean.fill_(3)
    recalibrate(network, images, compute, batch_size=32, title="")
    with torch.inference_mode():
        inputs_of_norm = network.conv1(next(images.batches(128))[0])
    torch.testing.assert_close(norm.running_mean, inputs_of_norm.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not network.training


def test_as_many_images_are_repaired_on_as_fit_into_memory():
    """At 32 pixels those that results were measured with; at 224 each holds four outputs of the first block at once."""
    network = resnet18_for_small_images(10).train()
    assert most_images(network, torch.zeros(1, 3, 32, 32)) >= 1024
    count = most_images(network, torch.zeros(1, 3, 224, 224))
    assert 0.9 * REPAIR_BYTES <= count * 4 * (4 * 64 * 224 * 224) <= REPAIR_BYTES
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 100_000))
    assert most_images(network, torch.zeros(1, 3, 4, 4)) == REPAIR_BYTES // (8 * 100_008)
