"""Dead channels, made dead by hand."""

import torch
from torch import nn

from cleanai.measure.activity import LISTED_CHANNELS, measure_activity
from tests.small_network import SmallNetwork

LAYERS = ["second.0", "classifier"]


def test_dead_channels_are_listed_by_layer_and_only_counted_when_there_are_many(digits, compute):
    torch.manual_seed(0)
    network = SmallNetwork(10)
    network.first[2] = nn.Identity()
    few = digits.test.select(torch.arange(20))
    assert measure_activity(network, LAYERS, few, compute)[1] == []
    many = list(range(LISTED_CHANNELS + 1))
    with torch.no_grad():
        for norm, channels in ((network.first[1], [7, 30]), (network.last[1], many)):
            norm.weight[channels], norm.bias[channels] = 0, 0
        network.first[1].weight[50], network.first[1].bias[50] = 0, -1  # never above zero, but not zero
    assert measure_activity(network, LAYERS, few, compute)[1] == [
        {"layer": "second.0", "count": 2, "channels": [7, 30]},
        {"layer": "classifier", "count": len(many)},
    ]
