"""The end of the repair: layers refitted to the original network's outputs, residual streams included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cleanai.pruning.refit import original_outputs, refit
from cleanai.pruning.repair import recalibrate
from cleanai.runtime.compute import choose_compute
from tests.helpers import random_images

SIDE = 7


class Block(nn.Module):
    """A residual block whose inner channels can be removed, with or without batch norm."""

    def __init__(self, channels, inner, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, stream):
        return stream + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(stream)))))


class Residual(nn.Module):
    def __init__(self, norm=True, inner=12):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8, inner, norm) for _ in range(3)))
        self.classifier = nn.Linear(8, 5)

    def forward(self, images):
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


@pytest.fixture
def images():
    return random_images(40, SIDE)


def _pruned(original, removed):
    """A copy without the first inner channels of each block, and the outputs that each layer keeps."""
    network = copy.deepcopy(original)
    kept = {n: torch.arange(m.weight.shape[0]) for n, m in network.named_modules() if hasattr(m, "weight")}
    for number, block in enumerate(network.blocks):
        block.conv1.weight.data = block.conv1.weight.data[removed:]
        block.conv1.bias.data = block.conv1.bias.data[removed:]
        block.conv2.weight.data = block.conv2.weight.data[:, removed:]
        if isinstance(block.bn1, nn.BatchNorm2d):
            block.bn1 = nn.BatchNorm2d(len(block.conv1.weight))
        kept[f"blocks.{number}.conv1"] = torch.arange(removed, block.conv1.out_channels)
    return network.eval(), kept


def _streams(network, images):
    """The streams behind each block, with batch norm by these images: the way in which the repair runs."""
    network, outputs = copy.deepcopy(network).train(), []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        outputs.append(network(next(images.batches(len(images)))[0]))
    assert len(outputs) == 4
    return [output.double() for output in outputs]


@pytest.mark.parametrize("norm", [True, False])
def test_the_error_of_no_stream_grows_and_the_last_one_falls(images, compute, norm):
    torch.manual_seed(0)
    original = Residual(norm).eval()
    network, kept = _pruned(original, 4)
    before = _streams(network, images)
    refit(network, original_outputs(original, images, compute), kept, images, compute, "")
    errors = [
        [(now - then).square().mean().item() for now, then in zip(streams, _streams(original, images))]
        for streams in (before, _streams(network, images))
    ]
    assert all(after <= 1.001 * first for first, after in zip(*errors)), errors
    assert errors[1][2] < 0.5 * errors[0][2], errors


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_batch_norm_has_the_statistics_of_the_refitted_network(images, precision):
    torch.manual_seed(0)
    original = Residual().eval()
    network, kept = _pruned(original, 4)
    compute = choose_compute("cpu", precision)
    refit(network, original_outputs(original, images, compute), kept, images, compute, "")
    again = copy.deepcopy(network)
    recalibrate(again, images, compute, len(images), "")
    for name, buffer in again.named_buffers():
        torch.testing.assert_close(network.get_buffer(name), buffer, rtol=0.02, atol=0.02)


def test_the_last_layer_of_a_branch_is_the_ridge_solution_for_the_stream(images, compute):
    torch.manual_seed(1)
    original = Residual(norm=False).eval()
    network, kept = _pruned(original, 5)
    start = network.blocks[1].conv2.weight.detach().double().flatten(1)
    refit(network, original_outputs(original, images, compute), kept, images, compute, "")
    inputs = next(images.batches(len(images)))[0]
    with torch.no_grad():
        goal = original.blocks[:2](original.stem(inputs)).double()
        shortcut = network.blocks[0](network.stem(inputs)).double()
        block = network.blocks[1]
        hidden = F.relu(block.conv1(shortcut.float())).double()
    rows = F.unfold(hidden, 3, padding=1).transpose(1, 2).flatten(0, 1)
    target = (goal - shortcut).flatten(2).transpose(1, 2).flatten(0, 1)
    rows, centred = rows - rows.mean(0), target - target.mean(0)
    gram = rows.T @ rows / len(rows)
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    change = torch.linalg.solve(gram + ridge, rows.T @ (centred - rows @ start.T) / len(rows))
    torch.testing.assert_close(block.conv2.weight.double().flatten(1), start + change.T, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        mean = block.conv2(hidden.float()).mean((0, 2, 3))
    torch.testing.assert_close(mean.double(), target.mean(0), rtol=1e-3, atol=1e-4)


def test_a_layer_that_runs_twice_stays_and_its_sum_as_well(images, compute):
    class Twice(Residual):
        def forward(self, images):
            stream = self.blocks(self.stem(images))
            return self.classifier(self.blocks[0](stream).mean((2, 3)))

    torch.manual_seed(0)
    original = Twice(norm=False).eval()
    network, kept = _pruned(original, 4)
    before = copy.deepcopy(network.state_dict())
    refit(network, original_outputs(original, images, compute), kept, images, compute, "")
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not {"blocks.0.conv1.weight", "blocks.0.conv2.weight"} & changed
    assert {"blocks.1.conv2.weight", "blocks.2.conv1.weight", "classifier.weight"} <= changed


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
def test_an_activation_in_place_is_no_part_of_its_layer(images, compute, activation):
    def refitted(inplace):
        torch.manual_seed(0)
        original = Residual().eval()
        for block in original.blocks:  # conv, batch norm, activation, addition: as in EfficientNetV2
            block.bn2 = nn.Sequential(block.bn2, activation(inplace=inplace))
        network, kept = _pruned(original, 4)
        refit(network, original_outputs(original, images, compute), kept, images, compute, "")
        return network.state_dict()

    torch.testing.assert_close(refitted(True), refitted(False))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as those with "same" padding of other libraries."""

    def forward(self, images):
        return super().forward(F.pad(images, (0, 2, 0, 2)))


@pytest.mark.parametrize("kind", ["shared weights", "a forward pass of its own"])
def test_a_layer_that_is_not_a_product_with_weights_of_its_own_stays(kind, images, compute):
    class Two(Residual):
        def __init__(self):
            super().__init__(norm=False)
            make = nn.Conv2d if kind == "shared weights" else Padded
            self.one, self.other = make(8, 8, 3), make(8, 8, 3)
            if kind == "shared weights":
                self.other.weight = self.one.weight

        def forward(self, images):
            return self.classifier(self.other(self.one(self.blocks(self.stem(images)))).mean((2, 3)))

    torch.manual_seed(0)
    original = Two().eval()
    network, kept = _pruned(original, 4)
    before = copy.deepcopy(network.state_dict())
    refit(network, original_outputs(original, images, compute), kept, images, compute, "")
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not {"one.weight", "one.bias", "other.weight", "other.bias"} & changed
    assert {"blocks.1.conv2.weight", "classifier.weight"} <= changed


def test_an_unpruned_network_and_the_layers_before_the_first_cut_stay(images, compute):
    original = Residual().eval()
    same, kept = _pruned(original, 0)
    weights = {name: p.clone() for name, p in same.named_parameters()}
    refit(same, original_outputs(original, images, compute), kept, images, compute, "")
    assert torch.equal(same.stem.weight, weights["stem.weight"])
    inputs = next(images.batches(40))[0]
    with torch.no_grad():
        torch.testing.assert_close(same(inputs), original.train()(inputs), rtol=0.05, atol=0.02)
