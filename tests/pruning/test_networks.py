"""Networks of torchvision, each pruned by a fifth."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from cleanai.network.models import give_shapes
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from tests.helpers import parameter_count, random_images, torch_macs

# One of each kind in every run: residual, depthwise with squeeze-and-excitation, concatenating, grouped.
NETWORKS = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "regnet_x_400mf"]
MORE = [
    "vgg16_bn", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "densenet121", "efficientnet_b0",
    "googlenet", "mnasnet1_0", "convnext_tiny",
]  # fmt: skip
SIDE = 64


def _build(name):
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    return getattr(torchvision.models, name)(weights=None, num_classes=10, **options).eval()


def _kept_inputs(cut, original):
    """The inputs of each of its groups that a layer kept, found by searching its weights in the unpruned layer.

    This uses nothing of how channels were chosen: random weights show their origin. Few weights occur twice, and the
    most frequent answer of several rows decides.
    """
    before, after = (layer.weight.reshape(*layer.weight.shape[:2], -1)[..., 0] for layer in (original, cut))
    places = []
    for row in after[:5]:
        samples = row[[0, len(row) // 2, -1]]
        (origin,) = torch.stack([(before == sample).any(1) for sample in samples]).all(0).nonzero().flatten()[:1]
        values, order = before[origin].sort()
        places.append(order[torch.searchsorted(values, row.contiguous())])
    return torch.stack(places).mode(0).values


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_a_fifth_is_removed_with_the_effect_of_zeroing_its_channels(name, compute):
    network = _build(name)
    original = copy.deepcopy(network)
    images = random_images(16, SIDE)
    settings = PruneSettings(0.2, 0.2, steps=1, batch_size=8)
    _, unrepaired = prune_to_budget(network, WandaImportance(), PruneImages(images, images), compute, settings)
    assert abs(100 * (1 - parameter_count(network) / parameter_count(original)) - 20) <= 0.1
    assert 20 <= 100 * (1 - torch_macs(network, SIDE) / torch_macs(original, SIDE)) <= 20.5

    # A network with its shapes can be built without the pruner.
    rebuilt = _build(name)
    give_shapes(rebuilt, network.state_dict())
    rebuilt.load_state_dict(network.state_dict())
    inputs = next(images.batches(2))[0]
    with torch.inference_mode():
        outputs = network(inputs)
        assert outputs.shape == (2, 10)
        assert outputs.isfinite().all()
        assert torch.equal(rebuilt(inputs), outputs)

    # Without repair its outputs are those of the unpruned network with the removed channels set to zero.
    hooks = []
    for layer, cut in zip(original.modules(), unrepaired.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and cut.weight.shape[1] < layer.weight.shape[1]:
            kept = torch.zeros(layer.weight.shape[1])
            kept[_kept_inputs(cut, layer)] = 1
            assert kept.sum() == cut.weight.shape[1]
            kept = kept.repeat(getattr(layer, "groups", 1))

            def zero_removed(layer, args, kept=kept):
                return args[0] * (kept if isinstance(layer, nn.Linear) else kept[:, None, None])

            hooks.append(layer.register_forward_pre_hook(zero_removed))
    assert hooks
    with torch.inference_mode():
        expected = original.double()(inputs.double())
        torch.testing.assert_close(unrepaired.double()(inputs.double()), expected, rtol=1e-6, atol=1e-9)
