import pytest
import torch
from torch import nn

from cleanai.measure.costs import count_layers, count_macs, count_parameters, size_mib
from cleanai.network.models import resnet18_for_small_images
from tests.helpers import parameter_count, torch_macs_by_module


def test_costs_of_the_unpruned_network():
    network = resnet18_for_small_images(10)
    names = list(network.state_dict())
    assert count_parameters(network) == {"parameters": 11_173_962, "trainable_parameters": 11_173_962}
    macs = count_macs(network, torch.zeros(1, 3, 32, 32))
    assert 555_422_720 <= macs < 1.01 * 555_422_720  # thop adds batch norm to convolutions and the classifier
    assert f"{macs / 1e9:.2f}" == "0.56"
    assert size_mib(network) == pytest.approx(42.7, abs=0.05)
    assert list(network.state_dict()) == names, "thop's buffers are in the network"


def test_convolutions_and_the_classifier_are_counted_exactly():
    network = resnet18_for_small_images(10)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    average_pool = 512 * (4 * 4 + 1)  # thop counts each position, and the division
    assert count_macs(network, torch.zeros(1, 3, 32, 32)) == 555_422_720 + average_pool


def test_frozen_parameters_are_not_trainable():
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == {"parameters": 15, "trainable_parameters": 12}


def test_layers_are_counted_as_torch_counts_them():
    network, example = resnet18_for_small_images(10), torch.zeros(1, 3, 32, 32)
    layers, expected = count_layers(network, example), torch_macs_by_module(network, 32)
    assert len(layers) == 21
    for name, layer in layers.items():
        assert layer["macs"] == expected[f"ResNet.{name}"], name
        assert layer["parameters"] == parameter_count(network.get_submodule(name))
    rest = count_macs(network, example) - sum(layer["macs"] for layer in layers.values())
    assert 0 < rest < 0.01 * count_macs(network, example), "batch norm and pooling"


class _SameConv(nn.Conv2d):
    """A convolution of one's own, as other libraries have them."""


class _OwnLinear(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.activation = nn.ReLU()


def test_layers_of_ones_own_class_are_counted_as_those_they_are_made_of():
    def network(convolution, linear):
        layers = (convolution(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(8, 4))
        return nn.Sequential(*layers)

    example = torch.zeros(1, 3, 10, 10)
    own, usual = network(_SameConv, _OwnLinear), network(nn.Conv2d, nn.Linear)
    assert count_macs(own, example) == count_macs(usual, example)
    assert count_layers(own, example) == count_layers(usual, example)


class _Sampled(nn.Conv2d):
    """A convolution that has another one, as deformable ones do."""

    def __init__(self, inputs, outputs, side):
        super().__init__(inputs, outputs, side)
        self.offset = nn.Conv2d(inputs, outputs, side)

    def forward(self, images):
        return super().forward(images) + self.offset(images)


def test_layers_within_a_layer_are_counted():
    example = torch.zeros(1, 3, 10, 10)
    inner = count_macs(nn.Sequential(nn.Conv2d(3, 8, 3)), example)
    network = nn.Sequential(_Sampled(3, 8, 3))
    assert count_macs(network, example) >= inner
    assert count_layers(network, example)["0.offset"]["macs"] == inner
