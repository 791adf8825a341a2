"""Whatever network people bring: it is pruned and stays what it was, or is refused before anything is changed."""

import copy
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from cleanai import UserError
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.planning import BudgetMissed
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.pruning.tracing import tensors_in
from tests.helpers import parameter_count, random_images


def _block(inputs, outputs, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU())


class Net(nn.Module):
    """Three convolutions and a head. `middle` maps their features (N, 24, 8, 8) on as many channels."""

    def __init__(self, norm=nn.BatchNorm2d, middle=None):
        super().__init__()
        self.a, self.b, self.c = _block(3, 24, norm), _block(24, 24, norm), _block(24, 24, norm)
        self.middle, self.head = middle or nn.Identity(), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.middle(self.c(self.b(self.a(x)))).flatten(2).mean(2))


class Rows(nn.Module):
    """A module on (N, positions, channels)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x.flatten(2).transpose(1, 2))
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.wide = nn.MultiheadAttention(24, 4, batch_first=True), nn.Linear(24, 48)
        self.narrow = nn.Linear(48, 24)

    def forward(self, x):
        return x + self.narrow(self.wide(x + self.mix(x, x, x, need_weights=False)[0]).relu())


class Heads(Net):
    def __init__(self, make):
        super().__init__()
        self.second, self.make = nn.Linear(24, 4), make

    def forward(self, x):
        features = self.c(self.b(self.a(x))).mean((2, 3))
        return self.make(self.head(features), self.second(features))


class Own(Net):
    """A network whose forward pass is the function `run`."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class Two(Net):
    def forward(self, x, y):
        return super().forward(x) + y


def _with(change, network=None):
    network = network or Net()
    change(network)
    return network


def _tie(network):
    network.middle = nn.Sequential(nn.Conv2d(24, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 1))
    network.middle[2].weight = network.middle[0].weight


def _backbone_without_gradients(network, x):
    with torch.no_grad():
        x = network.b(network.a(x))
    return network.head(network.c(x).mean((2, 3)))


def _caching(network, x):
    network.kept = network.c(network.b(network.a(x)))
    return network.head(network.kept.mean((2, 3)))


PRUNED = {
    "instance norm": lambda: Net(nn.InstanceNorm2d),
    "instance norm with statistics": lambda: Net(lambda width: nn.InstanceNorm2d(width, track_running_stats=True)),
    "batch norm without weights": lambda: Net(lambda width: nn.BatchNorm2d(width, affine=False)),
    "a tuple": lambda: Heads(lambda one, two: (one, two)),
    "nested outputs": lambda: Heads(lambda one, two: {"one": [one], "two": two, "none": None, "class": one.argmax(1)}),
    "features beside logits": lambda: Own(lambda net, x: [net.c(net.b(net.a(x))), Net.forward(net, x)]),
    "pixel shuffle": lambda: Net(
        middle=nn.Sequential(nn.Conv2d(24, 64, 1), nn.PixelShuffle(2), nn.Conv2d(16, 24, 1))
    ),
    "a convolution over rows": lambda: Net(
        middle=nn.Sequential(nn.Flatten(2), nn.Conv1d(24, 32, 3), nn.ReLU(), nn.ConvTranspose1d(32, 24, 3))
    ),
    "3-d convolutions": lambda: Net(
        middle=nn.Sequential(
            nn.Unflatten(2, (1, 8)), nn.Conv3d(24, 32, (1, 3, 3)), nn.BatchNorm3d(32), nn.Conv3d(32, 24, 1)
        )
    ),
    "a depthwise multiplier": lambda: Net(
        middle=nn.Sequential(nn.Conv2d(24, 96, 3, groups=24), nn.ReLU(), nn.Conv2d(96, 24, 1))
    ),
    "a layer of one channel": lambda: Net(
        middle=nn.Sequential(nn.Conv2d(24, 24, 1), nn.PReLU(), nn.Conv2d(24, 1, 1), nn.Conv2d(1, 24, 1))
    ),
    "a convolution that pads by itself": lambda: Net(middle=Padded(24, 24, 3)),
    "a scalar beside logits": lambda: Own(lambda net, x: (Net.forward(net, x), x.mean())),
    "attention": lambda: Net(middle=Rows(Attention())),
    "an LSTM": lambda: Net(middle=nn.Sequential(nn.AvgPool2d(4), Rows(nn.LSTM(24, 24, batch_first=True)))),
    "a layer used twice": lambda: Own(lambda net, x: net.head(net.c(net.b(net.b(net.a(x)))).mean((2, 3)))),
    "folded batches": lambda: Net(
        middle=Rows(
            nn.Sequential(nn.Flatten(0, 1), nn.Linear(24, 48), nn.Linear(48, 24), nn.Unflatten(0, (-1, 64)))
        )
    ),
    "a scale and a class token": lambda: Own(
        lambda net, x: net.head(net.c(net.b(net.a(x) * net.scale)).flatten(2).add(net.token).mean(2)),
        scale=nn.Parameter(torch.ones(24, 1, 1) * 2), token=nn.Parameter(torch.ones(1)),
    ),
    "weights that two layers share": lambda: _with(_tie),
    "frozen": lambda: _with(lambda net: [weight.requires_grad_(False) for weight in net.parameters()]),
    "partly frozen": lambda: _with(lambda net: net.a.requires_grad_(False)),
    "double precision": lambda: Net().double(),
    "bfloat16": lambda: Net().bfloat16(),
    "a precision of its own": lambda: Own(lambda net, x: Net.forward(net, x.float())),
    "training": lambda: _with(lambda net: net.b.eval(), Net().train()),
    "in DataParallel": lambda: nn.DataParallel(Net()),
    "a kept activation": lambda: Own(_caching),
    "a backbone without gradients": lambda: Own(_backbone_without_gradients),
    "an optional input": lambda: Own(lambda net, x, y=None: Net.forward(net, x)),
}  # fmt: skip
WEIGHT_NORM = getattr(parametrizations, "weight_norm", parametrizations.spectral_norm)  # from PyTorch 2.1 on
REFUSED = {
    "GroupNorm": (lambda: Net(lambda width: nn.GroupNorm(4, width)), "no channels that can be removed; .*GroupNorm"),
    "weight norm": (lambda: _with(lambda net: WEIGHT_NORM(net.b[0])), "weight of b.0 is computed"),
    "spectral norm": (lambda: _with(lambda net: parametrizations.spectral_norm(net.b[0])), "weight of b.0 is computed"),
    "old spectral norm": (lambda: _with(lambda net: nn.utils.spectral_norm(net.b[0])), "weight of b.0 is computed"),
    "two inputs": (Two, "does not run on a batch of 2 x 3 x 8 x 8 .*missing 1 required positional argument: 'y'"),
    "lazy": (lambda: _with(lambda net: setattr(net, "head", nn.LazyLinear(10))), "head is lazy"),
    "meta": (lambda: Net().to("meta"), "on the meta device"),
    "an idle layer": (lambda: _with(lambda net: net.add_module("idle", nn.Linear(2, 2))), "idle take no part"),
    "active dropout": (lambda: Net(middle=nn.Sequential(_Dropout())), "two passes of the same images differ"),
    "classes": (lambda: Own(lambda net, x: Net.forward(net, x).argmax(1)), "do not depend on its weights"),
    "a lock": (lambda: _with(lambda net: setattr(net, "lock", threading.Lock())), "cannot be copied"),
    "a keyword": (lambda: Own(lambda net, x: net.head(input=net.c(net.b(net.a(x))).mean((2, 3)))), "with a keyword"),
    "nothing": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "no channels that can be removed"),
    "no layers": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "no convolutions or linear layers"),
    "not finite": (lambda: _with(lambda net: net.head.bias.data.fill_(torch.nan)), "not finite numbers"),
}


class _Dropout(nn.Module):
    def forward(self, x):
        return F.dropout(x)


def _prune(network, compute, ratio=0.15, macs_ratio=None, round_to=(1,), repair="full"):
    images = random_images(24)
    settings = PruneSettings(ratio, macs_ratio, 2 if repair == "full" else 1, round_to, repair, batch_size=8)
    return prune_to_budget(network, WandaImportance(), PruneImages(images, images), compute, settings)


def _traits(network):
    """What pruning must not change: modes, precisions, frozen parameters, shared parameters, hooks."""
    named = list(network.named_parameters(remove_duplicate=False))
    return (
        [module.training for module in network.modules()],
        {name: (weight.dtype, weight.requires_grad) for name, weight in named},
        [[other is weight for _, other in named] for _, weight in named],
        [len(module._forward_pre_hooks) for module in network.modules()],
    )


def _silenced(original, cut):
    """The outputs of the original network without the inputs that each layer of the unrepaired one has lost."""
    for layer, narrow in zip(original.modules(), cut.modules()):
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) and layer.weight.shape != narrow.weight.shape:
            dim = 0 if getattr(layer, "transposed", False) else 1
            before, after = (each.weight.detach().movedim(dim, 0).flatten(1) for each in (layer, narrow))
            if getattr(layer, "groups", 1) > 1 or len(before) == len(after):
                continue
            # A kept input has its weights in the rows of the outputs that are left.
            values = [set(row.tolist()) for row in before]
            kept = [next(i for i, row in enumerate(values) if set(x.tolist()) <= row) for x in after]
            mask = torch.zeros(len(before)).index_fill(0, torch.tensor(kept), 1)
            shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (layer.weight.ndim - 2))
            mask = mask.reshape(shape)
            layer.register_forward_pre_hook(lambda _, args, mask=mask: args[0] * mask.to(args[0]))
    return original


@pytest.mark.parametrize("name", PRUNED)
def test_a_network_comes_out_whole(name, compute, monkeypatch):
    monkeypatch.setattr("cleanai.pruning.widths.PARAMETERS_TOLERANCE", 0.012)  # few channels have few combinations
    torch.manual_seed(0)
    network = PRUNED[name]()
    inner = network.module if isinstance(network, nn.DataParallel) else network
    for module in inner.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
    original, traits = copy.deepcopy(inner), _traits(inner)
    report, unrepaired = _prune(network, compute)
    removed = 100 * (1 - parameter_count(inner) / parameter_count(original))
    assert removed == pytest.approx(report["steps"][-1]["parameters_removed_percent"]) == pytest.approx(15, abs=1.3)
    assert _traits(inner) == _traits(unrepaired) == traits
    inputs = next(random_images(3, seed=1).batches(3))[0].to(next(inner.parameters()).dtype)
    silenced = _silenced(copy.deepcopy(original).eval(), unrepaired)
    with torch.no_grad():
        inner.train()(inputs)
        for expected, actual in zip(tensors_in(silenced(inputs)), tensors_in(copy.deepcopy(unrepaired).eval()(inputs))):
            precision = 0.05 if expected.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(actual, expected, rtol=precision, atol=precision)


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_pruned_is_refused_with_the_reason_before_any_change(name, compute):
    make, reason = REFUSED[name]
    network = make()
    before = {key: tensor.detach().clone() for key, tensor in network.state_dict().items() if name != "lazy"}
    modes = [module.training for module in network.modules()]
    with pytest.raises(UserError, match=reason) as error:
        _prune(network, compute)
    assert "\n" not in str(error.value)
    assert modes == [module.training for module in network.modules()]
    for key, tensor in before.items():
        assert tensor.is_meta or torch.equal(network.state_dict()[key].nan_to_num(), tensor.nan_to_num()), key


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_pruning_works_where_gradients_are_off(context, compute):
    network = Net()
    with context():
        _, unrepaired = _prune(network, compute)
    copy.deepcopy(unrepaired)(torch.zeros(2, 3, 8, 8)).sum().backward()
    network(torch.zeros(2, 3, 8, 8)).sum().backward()


def test_batch_norm_that_cannot_be_recalibrated_is_found_before_any_change(compute):
    network = nn.Sequential(nn.Conv2d(3, 24, 8), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 10, 1), nn.Flatten())
    network[1].running_mean.fill_(3)
    one = PruneImages(random_images(4), random_images(1))
    with pytest.raises(UserError, match=r"on 1 images at a time .* use more images for the repair"):
        prune_to_budget(network, WandaImportance(), one, compute, PruneSettings(0.2, None, 1, [1]))
    assert (network[1].running_mean == 3).all()
    with pytest.raises(UserError, match="at least one image"):
        prune_to_budget(network, WandaImportance(), PruneImages(random_images(0), random_images(4)), compute,
                        PruneSettings(0.2, None))  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "macs_ratio", "round_to"), [(0.3, 0.8, (8,)), (0.8, 0.3, (1,)), (0.2, 0.2, (16, 8)), (0.3, None, (8,))]
)
def test_what_a_missed_budget_advises_can_be_met(ratio, macs_ratio, round_to, compute):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    with pytest.raises(
        BudgetMissed, match=rf"ratio {ratio} and macs_ratio {macs_ratio}".replace("None", "none")
    ) as error:
        _prune(copy.deepcopy(network), compute, ratio, macs_ratio, round_to, "none")
    advice = str(error.value).split("These can be met: ")[1]
    shares = [
        [None if share == "none" else float(share) for share in pair]
        for pair in re.findall(r"ratio (\S+) and macs_ratio ([^\s;]+)", advice)
    ]
    assert shares
    for pair in shares:
        _prune(copy.deepcopy(network), compute, *pair, round_to, "none")
    if "round_to 1" in advice:
        _prune(copy.deepcopy(network), compute, ratio, macs_ratio, (1,), "none")
