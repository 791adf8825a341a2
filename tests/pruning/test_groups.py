import copy

import pytest
import torch
import torchvision
from torch import nn

from cleanai import UserError
from cleanai.pruning.groups import find_groups, sound_groups

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Reordering(nn.Module):
    """Between its first two convolutions the channels get another order, which torch_pruning does not detect."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.one(x).relu()[:, torch.arange(12).roll(5)]
        return self.three(self.two(x).relu()).mean((2, 3))


class Normed(nn.Module):
    """A residual stream under layer norm, and a block inside which only linear layers use the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)
        self.wide, self.narrow, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x).movedim(1, -1)
        x = x + self.narrow(self.wide(self.norm(x)).relu())
        return self.head(x.mean((1, 2)))


def test_a_unit_is_the_same_channel_of_each_group_of_a_convolution():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    graph, groups = find_groups(network, EXAMPLE)
    first = next(group for group in groups if group.name == "0")
    assert (first.channels, first.units) == (12, 6)
    assert first.consumers[network[1]].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert first.inputs(network[1]).tolist() == [[0], [1], [2], [3], [4], [5]]
    weight = network[1].weight.clone()
    first.remove(graph, [1, 4])
    assert network[0].out_channels == network[1].in_channels == 8
    assert torch.equal(network[1].weight, weight[:, [0, 2, 3, 5]])


def test_a_flattened_channel_is_read_at_each_of_its_positions():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    (group,) = find_groups(network, EXAMPLE)[1]
    assert group.spreads == {network[3]: 36}
    assert group.inputs(network[3]).tolist() == [[0], [1], [2], [3]]
    assert group.consumers[network[3]].tolist() == [channel for channel in range(4) for _ in range(36)]


def test_a_layer_that_reads_several_groups_has_separate_inputs_for_each():
    densenet = torchvision.models.DenseNet(4, (2, 1), 8, num_classes=2)
    groups = find_groups(densenet, torch.zeros(1, 3, 32, 32))[1]
    consumer = densenet.features.transition1.conv  # reads the stem's 8 channels and two times 4 new ones
    parts = [group for group in groups if consumer in group.consumers]
    assert sorted(group.channels for group in parts) == [4, 4, 8]
    inputs = torch.cat([group.inputs(consumer).flatten() for group in parts])
    assert inputs.sort().values.tolist() == list(range(16))


def test_groups_that_torch_pruning_misreads_are_not_pruned():
    torch.manual_seed(0)
    network = Reordering()
    assert {group.name for group in find_groups(network, EXAMPLE)[1]} == {"one", "two"}
    before = copy.deepcopy(network.state_dict())
    assert sound_groups(network, EXAMPLE) == {"two"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_channels_that_a_layer_norm_mixes_are_not_pruned():
    torch.manual_seed(0)
    network = Normed()
    assert [group.name for group in find_groups(network, EXAMPLE)[1]] == ["wide"]
    assert sound_groups(network, EXAMPLE) == {"wide"}


def test_the_outputs_of_a_network_are_not_pruned():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    assert [group.name for group in find_groups(network, EXAMPLE)[1]] == ["0"]


def test_a_network_that_cannot_be_traced_is_refused_with_the_reason():
    with pytest.raises(UserError, match="ShuffleNetV2 cannot be pruned: torch_pruning cannot trace its channels"):
        find_groups(torchvision.models.shufflenet_v2_x0_5(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match=r"aux1\.conv\.conv, .* take no part .* \(GoogLeNet: aux_logits=False\)"):
        find_groups(torchvision.models.googlenet(init_weights=False), torch.zeros(1, 3, 32, 32))
