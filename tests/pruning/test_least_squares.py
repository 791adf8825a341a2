"""Reconstruction against least squares in float64, for every kind of layer that reads channels."""

import copy

import pytest
import torch
from torch import nn

from cleanai.pruning.least_squares import (
    RIDGE,
    WINDOW_RIDGE,
    fit,
    gram_matrix,
    greedy_order,
    output_errors,
    reconstruct,
    reconstruct_windows,
)
from cleanai.pruning.rows import NO_CHANNELS, input_windows, output_rows, record_rows, window_rows

# The layer that reads 8 channels of 6 x 6 positions, and its features per channel.
CONSUMERS = {
    "convolution": (lambda: nn.Conv2d(8, 6, 3, padding=1), 1),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2), 1),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), 1),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), 1),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(8, 6, 2, groups=2), 1),
    "linear behind a flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 6)), 36),
    "linear": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)), 1),
}


def _network(kind, repeat=False):
    """A convolution, a ReLU and a consumer, and the consumer's features per channel."""
    torch.manual_seed(1)
    first = nn.Conv2d(3, 8, 3)
    if repeat:  # within each half, the second channel is twice the first
        for start in (0, 4):
            first.weight.data[start + 1], first.bias.data[start + 1] = 2 * first.weight[start], 2 * first.bias[start]
    make, spread = CONSUMERS[kind]
    return nn.Sequential(first, nn.ReLU(), make()).eval(), spread


def _layer(network):
    """The layer that reads the channels."""
    return network[2][-1] if isinstance(network[2], nn.Sequential) else network[2]


def _groups(layer):
    return getattr(layer, "groups", 1)


def _in_every_group(layer, channels):
    """Channels of a group as channels of the whole input."""
    return [int(channel) + group * 8 // _groups(layer) for channel in channels for group in range(_groups(layer))]


def _outputs_without(network, channels, inputs):
    """The outputs with these channels set to zero."""
    values = network[1](network[0](inputs)).clone()
    values[:, channels] = 0
    return network[2](values)


def _kernels(layer, group, spread):
    """The weights of a group: (outputs, inputs, positions) float64."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        return weight.reshape(len(weight), -1, spread)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.chunk(layer.groups, 0)[group].transpose(0, 1).flatten(2)
    return weight.chunk(layer.groups, 0)[group].flatten(2)


REMOVED = torch.tensor([1])  # of each group


@pytest.mark.parametrize("kind", CONSUMERS)
class TestEveryConsumer:
    def test_with_no_channel_removed_the_weights_do_not_change(self, kind, images, compute):
        network, spread = _network(kind)
        layer = _layer(network)
        rows = record_rows(network, {layer: spread}, images, compute)[0][layer]
        before = layer.weight.clone()
        reconstruct(layer, rows, rows, NO_CHANNELS, spread)
        assert torch.equal(layer.weight, before)

    def test_a_removed_duplicate_of_a_channel_is_replaced_by_it(self, kind, images, compute):
        network, spread = _network(kind, repeat=True)
        layer = _layer(network)
        rows = record_rows(network, {layer: spread}, images, compute)[0][layer]
        inputs = next(images.batches(20))[0]
        channels = _in_every_group(layer, REMOVED)
        with torch.inference_mode():
            before = network(inputs)
            cut = _outputs_without(network, channels, inputs)
            predicted_error = output_errors(layer, gram_matrix(rows), REMOVED[:, None], spread)
            reconstruct(layer, rows, rows, REMOVED, spread)
            repaired = _outputs_without(network, channels, inputs)
        assert (cut - before).abs().max() > 0.05
        # The ridge causes the rest.
        assert (repaired - before).abs().max() < 50 * RIDGE * (cut - before).abs().max()
        assert predicted_error < 10 * RIDGE

    def test_the_new_weights_are_the_least_squares_solution(self, kind, images, compute):
        """The change of the weights solves min |W_R x_R - D x_P|^2 + lambda |D|^2, by stacked float64 rows."""
        network, spread = _network(kind)
        layer = _layer(network)
        rows = record_rows(network, {layer: spread}, images, compute)[0][layer]
        with torch.inference_mode():
            values = network[1](network[0](next(images.batches(50))[0]))
            values = values.mean((2, 3), keepdim=True) if kind == "linear" else values
        before = copy.deepcopy(layer)
        reconstruct(layer, rows, rows, REMOVED, spread)
        for group, channels in enumerate(torch.arange(8).chunk(_groups(layer))):
            x = values[:, channels].movedim(1, -1).flatten(0, -2).double()  # (positions, channels of this group)
            kept = [channel for channel in range(len(channels)) if channel not in REMOVED]
            ridge = RIDGE * x.square().mean()
            rows = torch.cat([x[:, kept] / len(x) ** 0.5, ridge.sqrt() * torch.eye(len(kept)).double()])
            target = torch.cat([x[:, REMOVED] / len(x) ** 0.5, torch.zeros(len(kept), len(REMOVED)).double()])
            prediction = torch.linalg.lstsq(rows, target).solution  # (kept, removed)
            old, new = (_kernels(one, group, spread) for one in (before, layer))  # (outputs, inputs, positions)
            expected = old[:, kept] + torch.einsum("ork,pr->opk", old[:, REMOVED], prediction)
            torch.testing.assert_close(new[:, kept], expected, rtol=1e-3, atol=1e-4)  # of float32 sums
            assert not torch.allclose(new[:, kept], old[:, kept], atol=1e-3)
            assert not new[:, REMOVED].any()


@pytest.mark.parametrize("kind", ["convolution", "grouped", "linear"])
def test_the_predicted_error_is_the_error_after_reconstruction(kind, images, compute):
    """For a 1x1 kernel, or without one, the predicted share is that of the outputs themselves."""
    network, spread = _network(kind)
    if kind != "linear":
        network[2] = nn.Conv2d(8, 6, 1, groups=network[2].groups, bias=False)
    else:
        network[2][-1].bias.data.zero_()
    layer = _layer(network)
    rows = record_rows(network, {layer: spread}, images, compute)[0][layer]
    order = torch.tensor([2, 0, 1])[:, None]
    predicted = output_errors(layer, gram_matrix(rows), order, spread)
    assert (predicted.diff() >= 0).all()
    inputs = next(images.batches(50))[0]
    for count in (1, 2, 3):
        repaired = copy.deepcopy(network)
        removed = order[:count, 0]
        reconstruct(_layer(repaired), rows, rows, removed, spread)
        with torch.inference_mode():
            before = network(inputs)
            after = _outputs_without(repaired, _in_every_group(layer, removed), inputs)
            error = (after - before).square().mean() / before.square().mean()
        assert predicted[count - 1].item() == pytest.approx(error.item(), rel=0.05)


def test_a_layer_whose_inputs_are_all_zero_keeps_its_weights():
    layer = nn.Conv2d(4, 2, 1)
    before = layer.weight.clone()
    rows = torch.zeros(1, 20, 4)
    reconstruct(layer, rows, rows, torch.tensor([1]), 1)
    assert torch.equal(layer.weight[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert output_errors(layer, gram_matrix(rows), torch.tensor([[1], [2]]), 1).tolist() == [0, 0]


def test_each_weight_of_a_kernel_is_the_least_squares_solution(two_convolutions, images, compute):
    """The new weights solve min |outputs - windows W^T|^2 + lambda |W - old W|^2, by stacked float64 rows."""
    layer = two_convolutions[2]
    _, outputs = record_rows(two_convolutions, {layer: 1}, images, compute)
    with torch.inference_mode():
        values = 0.9 * two_convolutions[:2](next(images.batches(50))[0])  # as if channels before were removed
        windows = window_rows(layer, values, 50, REMOVED)
    layer.weight.data[:, REMOVED] = 0
    before = copy.deepcopy(layer)
    reconstruct_windows(layer, outputs[layer], windows, REMOVED)
    positions = layer.weight[0, 0].numel()
    kept = torch.tensor([column for column in range(layer.weight[0].numel()) if column // positions not in REMOVED])
    for group in range(layer.groups):
        x = windows[group].double()
        old, new = (
            one.weight.detach().double().chunk(layer.groups)[group].flatten(1)[:, kept] for one in (before, layer)
        )
        ridge = WINDOW_RIDGE * x.square().mean()
        rows = torch.cat([x / len(x) ** 0.5, ridge.sqrt() * torch.eye(len(kept)).double()])
        target = torch.cat([outputs[layer][group].double() / len(x) ** 0.5, ridge.sqrt() * old.T])
        torch.testing.assert_close(new, torch.linalg.lstsq(rows, target).solution.T, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(new, old, atol=1e-3)
    assert not layer.weight[:, REMOVED].any()


def test_a_layer_that_meets_its_targets_computes_the_same_after_the_fit(two_convolutions, images):
    """But for a shift. Its batch norm is folded in, and the penalty pulls to the present weights."""
    layer, norm = two_convolutions[2], nn.BatchNorm2d(6).train()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    with torch.no_grad():
        values = two_convolutions[:2](next(images.batches(50))[0])
        expected = norm(layer(values)) + 0.5
        fit(layer, norm, input_windows(layer, values, 50), output_rows(layer, expected, 50))
        torch.testing.assert_close(norm(layer(values)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [20, 200])
def test_with_fewer_rows_than_weights_the_solution_is_the_same_ridge_regression(rows):
    torch.manual_seed(0)
    layer, windows, targets = nn.Linear(60, 4, bias=False), torch.randn(1, rows, 60), torch.randn(rows, 4)
    start, inputs = layer.weight.detach().double(), windows[0].double()
    gram = inputs.T @ inputs / rows
    ridge = WINDOW_RIDGE * gram.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    change = torch.linalg.solve(gram + ridge, inputs.T @ (targets.double() - inputs @ start.T) / rows)
    fit(layer, None, windows, targets)
    torch.testing.assert_close(layer.weight.double(), start + change.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["convolution", "grouped"])
def test_greedy_removal_always_takes_the_unit_that_costs_least_then(kind):
    """Of two readers together, by trying all units that are left."""
    generator = torch.Generator().manual_seed(0)
    groups = 2 if kind == "grouped" else 1
    layers = [nn.Conv2d(12, 6, 3, groups=groups), nn.Conv2d(12, 4, 1, groups=groups)]
    mixed = torch.randn(12 // groups, 12 // groups, generator=generator)
    grams = [gram_matrix(torch.randn(groups, 40, 12 // groups, generator=generator) @ mixed) for _ in layers]
    units = torch.arange(12 // groups).reshape(-1, 2)  # two inputs of each
    order = greedy_order(layers, grams, [units, units], [1, 1])
    assert sorted(order.tolist()) == list(range(len(units)))

    def error(chosen):
        rows = units[chosen].reshape(-1, 1)
        return sum(output_errors(layer, gram, rows)[-1].item() for layer, gram in zip(layers, grams))

    def singly(chosen, unit):
        """The error of a unit is that of each of its inputs by itself: what two of them share counts twice."""
        before = error(chosen) if len(chosen) else 0
        each = [
            output_errors(layer, gram, torch.cat([units[chosen].flatten(), channel[None]])[:, None])[-1].item()
            for layer, gram in zip(layers, grams)
            for channel in units[unit]
        ]
        return sum(each) - 2 * before

    chosen = []
    for unit in order.tolist():
        left = [other for other in range(len(units)) if other not in chosen]
        assert unit == min(left, key=lambda other: singly(torch.tensor(chosen, dtype=torch.long), other))
        chosen.append(unit)
