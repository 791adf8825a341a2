"""A network of one's own, as users bring one: small, so that the scripts take seconds with it."""

import torch
from torch import nn

from cleanai.network.models import resnet18_for_small_images


def thin_resnet18(classes: int) -> nn.Module:
    """The ResNet-18 for small images with a quarter of its channels."""
    network = resnet18_for_small_images(classes)
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                inputs = layer.in_channels if layer.in_channels == 3 else layer.in_channels // 4
                sides = (layer.kernel_size, layer.stride, layer.padding)
                setattr(parent, name, nn.Conv2d(inputs, layer.out_channels // 4, *sides, bias=False))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(layer.num_features // 4))
            elif isinstance(layer, nn.Linear):
                setattr(parent, name, nn.Linear(layer.in_features // 4, classes))
    return network


class SmallNetwork(nn.Module):
    """Two convolutions beside a shortcut, and a classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = self._layer(3, 32, stride=2)
        self.first, self.second = self._layer(32, 64), self._layer(64, 32)
        self.last = self._layer(32, 64, stride=2)
        self.classifier = nn.Linear(64, classes)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stream = self.stem(images)
        stream = stream + self.second(self.first(stream))
        return self.classifier(self.last(stream).mean((2, 3)))
