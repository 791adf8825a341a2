"""Networks of torchvision, each pruned by a fifth."""
import copy

import pytest
import torch
import torchvision
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.network.models import give_shapes
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget

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


def _macs(network):
    flop_counter = pytest.importorskip("torch.utils.flop_counter")  # since PyTorch 2.1
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, SIDE, SIDE))
    return counter.get_total_flops() / 2


def _parameters(network):
    return sum(p.numel() for p in network.parameters())


def _kept_inputs(cut, original):
    """Which inputs of each of its groups a layer kept, found by looking its weights up in those of the unpruned layer.

    Nothing of how channels were chosen and mapped is used: random weights tell where they come from, the few that
    occur twice being outvoted.
    """
    before, after = (layer.weight.reshape(*layer.weight.shape[:2], -1)[..., 0] for layer in (original, cut))
    places = []
    for row in after[:5]:
        signs = row[[0, len(row) // 2, -1]]
        (origin,) = torch.stack([(before == sign).any(1) for sign in signs]).all(0).nonzero().flatten()[:1]
        values, order = before[origin].sort()
        places.append(order[torch.searchsorted(values, row.contiguous())])
    return torch.stack(places).mode(0).values


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_a_fifth_goes_and_only_the_removed_channels_are_missed(name, compute):
    network = _build(name)
    original = copy.deepcopy(network)
    pixels = torch.randint(0, 256, (16, 3, SIDE, SIDE), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(16) % 10, torch.full((3,), 0.5), torch.full((3,), 0.3))
    _, unrepaired = prune_to_budget(network, WandaImportance(), images, images, compute, 0.2, 0.2, 1, batch_size=8)
    assert abs(100 * (1 - _parameters(network) / _parameters(original)) - 20) <= 0.1
    assert 20 <= 100 * (1 - _macs(network) / _macs(original)) <= 20.5

    # It is rebuilt from its own shapes, without the pruner.
    rebuilt = _build(name)
    give_shapes(rebuilt, network.state_dict())
    rebuilt.load_state_dict(network.state_dict())
    inputs = next(images.batches(2))[0]
    with torch.inference_mode():
        outputs = network(inputs)
        assert outputs.shape == (2, 10)
        assert outputs.isfinite().all()
        assert torch.equal(rebuilt(inputs), outputs)

    # Without repair it does what the unpruned network does with the removed channels silenced.
    hooks = []
    for layer, cut in zip(original.modules(), unrepaired.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and cut.weight.shape[1] < layer.weight.shape[1]:
            kept = torch.zeros(layer.weight.shape[1])
            kept[_kept_inputs(cut, layer)] = 1
            assert kept.sum() == cut.weight.shape[1]
            kept = kept.repeat(getattr(layer, "groups", 1))

            def silence(layer, args, kept=kept):
                return args[0] * (kept if isinstance(layer, nn.Linear) else kept[:, None, None])

            hooks.append(layer.register_forward_pre_hook(silence))
    assert hooks
    with torch.inference_mode():
        expected = original.double()(inputs.double())
        torch.testing.assert_close(unrepaired.double()(inputs.double()), expected, rtol=1e-6, atol=1e-9)
