import pytest
import torch
from torch import nn

from tests.helpers import random_images

KERNELS = {
    "plain": {"kernel_size": 3},
    "padded, strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "grouped, dilated": {"kernel_size": 2, "dilation": 2, "groups": 2},
    "of two sizes": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
}


@pytest.fixture
def images():
    return random_images(50)


@pytest.fixture(params=KERNELS)
def two_convolutions(request):
    """A convolution, a ReLU, and a convolution with each kind of kernel that has windows."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, **KERNELS[request.param])).eval()
