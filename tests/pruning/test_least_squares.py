"""Reconstruction against least squares in float64, for every kind of layer that reads channels."""
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.network import activations
from cleanai.network.activations import convolved, record_rows, window_rows
from cleanai.pruning.groups import find_groups
from cleanai.pruning.least_squares import (
    RIDGE,
    WINDOW_RIDGE,
    gram_matrix,
    output_errors,
    reconstruct,
    reconstruct_windows,
)
from cleanai.pruning.repair import reconstruct_in_order

READERS = {
    "convolution": (lambda: nn.Conv2d(8, 6, 3, padding=1), 1),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2), 1),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), 1),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), 1),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(8, 6, 2, groups=2), 1),
    "linear behind a flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 6)), 36),
    "linear": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)), 1),
}


@pytest.fixture
def pictures():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    return ImageSet(pixels, torch.zeros(50, dtype=torch.long), torch.full((3,), 0.5), torch.full((3,), 0.3))


def _layer(reader):
    return reader[-1] if isinstance(reader, nn.Sequential) else reader


def _network(kind, repeat=False):
    torch.manual_seed(1)
    first = nn.Conv2d(3, 8, 3)
    if repeat:  # within each half, the second channel is twice the first
        for start in (0, 4):
            first.weight.data[start + 1], first.bias.data[start + 1] = 2 * first.weight[start], 2 * first.bias[start]
    make, spread = READERS[kind]
    return nn.Sequential(first, nn.ReLU(), make()).eval(), spread


def _gone(layer):
    """Channel 1 of each group of the reader, as numbers within a group and over all."""
    groups = getattr(layer, "groups", 1)
    return torch.tensor([1]), [1 + group * 8 // groups for group in range(groups)]


def _without(network, channels, inputs):
    """The outputs with these channels silenced."""
    values = network[1](network[0](inputs)).clone()
    values[:, channels] = 0
    return network[2](values)


@pytest.mark.parametrize("kind", READERS)
class TestEveryReader:
    def test_with_nothing_removed_nothing_moves(self, kind, pictures, compute):
        network, spread = _network(kind)
        layer = _layer(network[2])
        rows = record_rows(network, {layer: spread}, pictures, compute)[0][layer]
        before = layer.weight.clone()
        reconstruct(layer, rows, rows, torch.tensor([], dtype=torch.long), spread)
        assert torch.equal(layer.weight, before)

    def test_a_repeated_channel_is_taken_over_whole(self, kind, pictures, compute):
        network, spread = _network(kind, repeat=True)
        layer = _layer(network[2])
        rows = record_rows(network, {layer: spread}, pictures, compute)[0][layer]
        inputs = next(pictures.batches(20))[0]
        gone, everywhere = _gone(layer)
        with torch.inference_mode():
            before = network(inputs)
            cut = _without(network, everywhere, inputs)
            lost = output_errors(layer, gram_matrix(rows), gone[:, None], spread)
            reconstruct(layer, rows, rows, gone, spread)
            repaired = _without(network, everywhere, inputs)
        assert (cut - before).abs().max() > 0.05
        # What is missing is the ridge's doing.
        assert (repaired - before).abs().max() < 50 * RIDGE * (cut - before).abs().max()
        assert lost < 10 * RIDGE

    def test_it_is_least_squares(self, kind, pictures, compute):
        """The change of the weights solves min |W_R x_R - D x_P|^2 + lambda |D|^2, by stacked float64 rows."""
        network, spread = _network(kind)
        layer = _layer(network[2])
        groups = getattr(layer, "groups", 1)
        rows = record_rows(network, {layer: spread}, pictures, compute)[0][layer]
        with torch.inference_mode():
            values = network[1](network[0](next(pictures.batches(50))[0]))
            values = values.mean((2, 3), keepdim=True) if kind == "linear" else values
        gone, _ = _gone(layer)
        before = copy.deepcopy(layer)
        reconstruct(layer, rows, rows, gone, spread)
        for group, channels in enumerate(torch.arange(8).chunk(groups)):
            x = values[:, channels].movedim(1, -1).flatten(0, -2).double()  # (positions, channels of this group)
            kept = [j for j in range(len(channels)) if j not in gone]
            ridge = RIDGE * x.square().mean()
            rows = torch.cat([x[:, kept] / len(x) ** 0.5, ridge.sqrt() * torch.eye(len(kept)).double()])
            target = torch.cat([x[:, gone] / len(x) ** 0.5, torch.zeros(len(kept), len(gone)).double()])
            taken_over = torch.linalg.lstsq(rows, target).solution  # (kept, gone)
            old, new = (_kernels(one, group, groups, spread) for one in (before, layer))  # (outputs, inputs, positions)
            expected = old[:, kept] + torch.einsum("ork,pr->opk", old[:, gone], taken_over)
            torch.testing.assert_close(new[:, kept], expected, rtol=1e-3, atol=1e-4)  # of float32 sums
            assert not torch.allclose(new[:, kept], old[:, kept], atol=1e-3)


def _kernels(layer, group, groups, spread):
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        return weight.reshape(len(weight), -1, spread)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.chunk(groups, 0)[group].transpose(0, 1).flatten(2)
    return weight.chunk(groups, 0)[group].flatten(2)


@pytest.mark.parametrize("kind", ["convolution", "grouped", "linear"])
def test_the_error_told_is_the_error_left(kind, pictures, compute):
    """For a 1x1 kernel, or without one, the share told is that of the outputs themselves."""
    network, spread = _network(kind)
    if kind != "linear":
        network[2] = nn.Conv2d(8, 6, 1, groups=READERS[kind][0]().groups, bias=False)
    else:
        network[2][-1].bias.data.zero_()
    layer = _layer(network[2])
    rows = record_rows(network, {layer: spread}, pictures, compute)[0][layer]
    groups = getattr(layer, "groups", 1)
    order = torch.tensor([2, 0, 1])[:, None]
    told = output_errors(layer, gram_matrix(rows), order, spread)
    assert (told.diff() >= 0).all()
    inputs = next(pictures.batches(50))[0]
    for count in (1, 2, 3):
        repaired = copy.deepcopy(network)
        gone = order[:count, 0]
        reconstruct(_layer(repaired[2]), rows, rows, gone, spread)
        everywhere = [int(j) + group * 8 // groups for j in gone for group in range(groups)]
        with torch.inference_mode():
            before = network(inputs)
            left = (_without(repaired, everywhere, inputs) - before).square().mean() / before.square().mean()
        assert told[count - 1].item() == pytest.approx(left.item(), rel=0.05)


def test_rows_are_those_that_a_layer_receives_however_the_images_are_split(pictures, compute, monkeypatch):
    network, _ = _network("grouped")
    layer = network[2]
    with torch.inference_mode():
        values = network[:2](next(pictures.batches(50))[0])
    whole = torch.stack(values.movedim(1, -1).flatten(0, 2).chunk(2, dim=1))
    for size in (1, 16, 50):
        rows = record_rows(network, {layer: 1}, pictures, replace(compute, inference_pixels=size * 64))[0][layer]
        torch.testing.assert_close(rows, whole)
    expected = torch.einsum("gni,gnj->gij", whole.double(), whole.double()) / whole.shape[1]
    torch.testing.assert_close(gram_matrix(rows), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(activations, "ROWS", 50 * 5)  # memory does not grow with the size of the images
    few = record_rows(network, {layer: 1}, pictures, compute)[0][layer]
    assert few.shape == (2, 50 * 5, 4)
    positions = few[0, :5][:, None].eq(whole[0, :36]).all(2).int().argmax(1)  # in the first image
    torch.testing.assert_close(few, whole.unflatten(1, (50, 36))[:, :, positions].flatten(1, 2))


def test_a_layer_that_receives_nothing_is_left_alone():
    layer = nn.Conv2d(4, 2, 1)
    before = layer.weight.clone()
    rows = torch.zeros(1, 20, 4)
    reconstruct(layer, rows, rows, torch.tensor([1]), 1)
    assert torch.equal(layer.weight[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert output_errors(layer, gram_matrix(rows), torch.tensor([[1], [2]]), 1).tolist() == [0, 0]


KERNELS = {
    "plain": {"kernel_size": 3},
    "padded, strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "grouped, dilated": {"kernel_size": 2, "dilation": 2, "groups": 2},
    "of two sizes": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
}


class TestWindows:
    @pytest.fixture(params=KERNELS)
    def network(self, request):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, **KERNELS[request.param])).eval()

    def test_rows_are_what_the_kernel_sees_and_what_it_makes_of_it(self, network, pictures, compute, monkeypatch):
        layer = network[2]
        with torch.inference_mode():
            values = network[:2](next(pictures.batches(50))[0])
            outputs = network[2](values) - layer.bias[:, None, None]
        groups, (_, _, height, width) = layer.groups, outputs.shape
        sizes = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        whole = nn.functional.unfold(values, **sizes).movedim(1, 2).flatten(0, 1)  # (images * positions, C * kernel)
        whole = torch.stack(whole.chunk(groups, 1))
        torch.testing.assert_close(window_rows(layer, values, 50), whole)
        _, made = record_rows(network, {layer: 1}, pictures, replace(compute, inference_pixels=16 * 64))
        expected = torch.stack(outputs.movedim(1, -1).flatten(0, 2).chunk(groups, 1))
        torch.testing.assert_close(made[layer], expected, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(activations, "WINDOWS", 50 * 3)
        monkeypatch.setattr(activations, "ROWS_PER_WEIGHT", 1)
        few = window_rows(layer, values, 50)  # of each image three positions
        assert few.shape == (groups, 50 * 3, whole.shape[2])
        positions = few[0, :3][:, None].eq(whole[0, : height * width]).all(2).int().argmax(1)  # in the first image
        assert len(set(positions.tolist())) == 3
        torch.testing.assert_close(few, whole.unflatten(1, (50, -1))[:, :, positions].flatten(1, 2))
        _, made = record_rows(network, {layer: 1}, pictures, replace(compute, inference_pixels=16 * 64))
        same = expected.unflatten(1, (50, -1))[:, :, positions].flatten(1, 2)
        torch.testing.assert_close(made[layer], same, rtol=1e-4, atol=1e-5)

    def test_it_is_least_squares(self, network, pictures, compute):
        """The new weights solve min |made - seen W^T|^2 + lambda |W - old W|^2, by stacked float64 rows."""
        layer, gone = network[2], torch.tensor([1])
        _, made = record_rows(network, {layer: 1}, pictures, compute)
        with torch.inference_mode():
            values = 0.9 * network[:2](next(pictures.batches(50))[0])  # as if something had gone
            seen = window_rows(layer, values, 50, gone)
        layer.weight.data[:, gone] = 0
        before = copy.deepcopy(layer)
        reconstruct_windows(layer, made[layer], seen, gone)
        positions = layer.weight[0, 0].numel()
        kept = torch.tensor([j for j in range(layer.weight.shape[1] * positions) if j // positions != 1])
        with torch.inference_mode():
            torch.testing.assert_close(seen, window_rows(layer, values, 50)[:, :, kept])
        for group in range(layer.groups):
            x, old, new = (
                values.double() for values in (
                    seen[group],
                    *(one.weight.detach().chunk(layer.groups)[group].flatten(1)[:, kept] for one in (before, layer)),
                )
            )
            ridge = WINDOW_RIDGE * x.square().mean()
            rows = torch.cat([x / len(x) ** 0.5, ridge.sqrt() * torch.eye(len(kept)).double()])
            target = torch.cat([made[layer][group].double() / len(x) ** 0.5, ridge.sqrt() * old.T])
            torch.testing.assert_close(new, torch.linalg.lstsq(rows, target).solution.T, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(new, old, atol=1e-3)
        assert not layer.weight[:, gone].any()

    def test_a_shifted_channel_is_taken_over_by_its_neighbours(self, pictures, compute, monkeypatch):
        """What one channel tells, the other told one position before: no weight of a single position can use that."""
        torch.manual_seed(1)
        first = nn.Conv2d(3, 8, 3)
        first.weight.data[1] = 0
        first.weight.data[0, :, :, 2] = 0
        first.weight.data[1, :, :, 1:] = first.weight.data[0, :, :, :2]
        first.bias.data[1] = first.bias[0]
        reader = nn.Conv2d(8, 6, 3)
        reader.weight.data[:, 1, :, 2] = 0  # it looks at the shifted channel where it sees the other, too
        network = nn.Sequential(first, nn.ReLU(), reader).eval()
        inputs = next(pictures.batches(50))[0]
        errors = []
        for rows_per_weight in (3, float("inf")):
            monkeypatch.setattr(activations, "ROWS_PER_WEIGHT", rows_per_weight)
            repaired = copy.deepcopy(network)
            spreads = {repaired[2]: 1}
            received, made = record_rows(repaired, spreads, pictures, compute)
            reconstruct_in_order(
                repaired, received, made, {repaired[2]: torch.tensor([1])}, spreads, pictures, compute, ""
            )
            with torch.inference_mode():
                errors.append((repaired(inputs) - network(inputs)).square().mean())
        assert errors[0] < 0.2 * errors[1]

    def test_from_too_few_rows_nothing_is_learned(self, network, pictures, compute, monkeypatch):
        layer = network[2]
        _, made = record_rows(network, {layer: 1}, pictures, compute)
        rows, weights = made[layer].shape[1], layer.weight[0].numel()
        for least, learned in ((rows // weights, True), (rows // weights + 1, False)):
            monkeypatch.setattr(activations, "ROWS_PER_WEIGHT", least)
            assert bool(record_rows(network, {layer: 1}, pictures, compute)[1]) == learned

    @pytest.mark.parametrize(
        "options", [{"kernel_size": 1}, {"kernel_size": 3, "padding": "same"},
                    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}]
    )
    def test_other_convolutions_have_none(self, options, pictures, compute):
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, **options))
        assert not record_rows(network, {network[2]: 1}, pictures, compute)[1]

    def test_weights_that_are_no_numbers_are_refused(self, network, pictures, compute):
        network[2].weight.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(UserError, match="not finite numbers"):
            record_rows(network, {network[2]: 1}, pictures, compute)


class TestInOrder:
    """Three convolutions in a row; the second and the third read channels that can go."""

    @pytest.fixture
    def network(self):
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 2, 1)
        ).eval()

    def _repaired(self, network, pictures, compute, gone, spoil=lambda network: None):
        """A copy, spoiled and then repaired without these inputs of its second and third layer."""
        network = copy.deepcopy(network)
        spreads = {network[2]: 1, network[4]: 1}
        received, made = record_rows(network, spreads, pictures, compute)
        spoil(network)
        reconstruct_in_order(network, received, made, dict(zip(spreads, gone)), spreads, pictures, compute, "")
        assert not any(layer._forward_pre_hooks for layer in network)
        return network

    def test_what_changed_before_a_layer_is_made_up_for(self, network, pictures, compute):
        def double(network):
            network[0].weight.data *= 2
            network[0].bias.data *= 2

        inputs = next(pictures.batches(50))[0]
        nothing = [torch.tensor([], dtype=torch.long)] * 2
        with torch.inference_mode():
            repaired = self._repaired(network, pictures, compute, nothing, double)
            torch.testing.assert_close(repaired(inputs), network(inputs), rtol=1e-2, atol=1e-3)
            assert torch.equal(self._repaired(network, pictures, compute, nothing)[2].weight, network[2].weight)

    def test_less_is_lost_than_when_each_layer_looks_at_itself_alone(self, network, pictures, compute):
        gone = [torch.arange(6), torch.arange(4)]
        alone = copy.deepcopy(network)
        for layer, removed in zip((alone[2], alone[4]), gone):
            rows, _ = record_rows(network, {network[2 if layer is alone[2] else 4]: 1}, pictures, compute)
            (rows,) = rows.values()
            reconstruct(layer, rows, rows, removed)
        in_order = self._repaired(network, pictures, compute, gone)
        inputs = next(pictures.batches(50))[0]
        with torch.inference_mode():
            errors = [(repaired(inputs) - network(inputs)).square().mean() for repaired in (in_order, alone)]
        assert errors[0] < 0.9 * errors[1]
        for layer, removed in zip((in_order[2], in_order[4]), gone):
            assert not layer.weight[:, removed].any()

    @pytest.mark.parametrize("lost_by_it", [[], [1]])
    def test_a_layer_that_runs_twice_keeps_the_other_weights(self, lost_by_it, pictures, compute):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(2)
                self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
                self.again = nn.Conv2d(8, 8, 3, padding=1)

            def forward(self, inputs):
                return self.last(self.again(self.again(self.first(inputs).relu()).relu()).relu())

        network = Twice().eval()
        before = copy.deepcopy(network)
        spreads = {network.again: 1, network.last: 1}
        received, made = record_rows(network, spreads, pictures, compute)
        lost = {network.again: torch.tensor(lost_by_it, dtype=torch.long), network.last: torch.tensor([1])}
        met = reconstruct_in_order(network, received, made, lost, spreads, pictures, compute, "")
        assert met == ({}, {}), "what it received when it ran last is not told"
        assert not network.again.weight[:, lost_by_it].any()
        kept = [channel for channel in range(8) if channel not in lost_by_it]
        assert torch.equal(network.again.weight[:, kept], before.again.weight[:, kept])
        assert not torch.equal(network.last.weight, before.last.weight)

    def test_what_a_batch_norm_that_runs_twice_lets_through_is_not_told(self, pictures, compute):
        """It normalises each time by the batch itself, and afterwards by the mean over both."""
        norm = nn.BatchNorm2d(8)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 2, 1)).eval()
        spreads = {network[2]: 1, network[4]: 1}
        assert reconstruct_in_order(network, {}, {}, {}, spreads, pictures, compute, "") == ({}, {})

    @pytest.mark.parametrize("last", ["transposed", "linear behind a flatten"])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_it_tells_what_the_cut_network_receives_and_makes(self, groups, last, pictures, compute):
        """As if it had been recorded anew: the next step of pruning begins with it."""
        torch.manual_seed(2)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, groups=groups),
            nn.BatchNorm2d(8), nn.ReLU(), READERS[last][0]()
        ).eval()
        example = next(pictures.batches(1))[0]
        graph, found = find_groups(network, example)
        spreads = {layer: spread for group in found for layer, spread in group.spreads.items()}
        begun = reconstruct_in_order(network, {}, {}, {}, spreads, pictures, compute, "")
        received, made = record_rows(network, spreads, pictures, compute)
        assert set(begun[0]) == set(received) == set(spreads)
        for layer, rows in received.items():
            torch.testing.assert_close(begun[0][layer], rows, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(convolved(network[3], begun[1][network[3]]), made[network[3]], rtol=1e-3, atol=1e-3)

        lost = {reader: group.inputs(reader)[[2, 1]].flatten() for group in found for reader in group.readers}
        channels, windows = reconstruct_in_order(network, received, made, lost, spreads, pictures, compute, "")
        for group in found:
            group.remove(graph, [1, 2])
        received, made = record_rows(network, spreads, pictures, compute)
        assert set(channels) == set(received)
        assert set(windows) == set(made) == {network[3]}
        for layer, rows in received.items():
            torch.testing.assert_close(channels[layer], rows, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(convolved(network[3], windows[network[3]]), made[network[3]], rtol=1e-3, atol=1e-3)
