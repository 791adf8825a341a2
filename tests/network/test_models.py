import hashlib
import io
import os

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from cleanai import UserError
from cleanai.data.images import Images
from cleanai.network.models import (
    build,
    download_imagenet_weights,
    give_shapes,
    imagenet_url,
    load_network,
    resnet18_for_small_images,
    save_network,
)
from cleanai.network.trial import in_fitting_order, try_network
from tests.helpers import parameter_count, random_images, serving, torch_macs


@pytest.fixture(scope="module")
def published():
    """A file like the published weights: its content, and the name that ends in its checksum."""
    torch.manual_seed(7)
    file = io.BytesIO()
    torch.save(resnet18(weights=None).state_dict(), file)
    content = file.getvalue()
    return content, f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_parameters_and_output():
    network = resnet18_for_small_images(10)
    assert parameter_count(network) == 11_173_962
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert resnet18_for_small_images(7).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_convolutions_and_the_classifier_do_555_422_720_multiply_accumulates():
    assert torch_macs(resnet18_for_small_images(10), 32) == 555_422_720


def test_weights_are_downloaded_once(tmp_path, published):
    content, name = published
    with serving({name: content}) as address:
        path = download_imagenet_weights(tmp_path / "models", f"{address}/{name}")
    assert path == tmp_path / "models" / name
    assert path.read_bytes() == content
    unfinished = path.with_name(f"{name}.4711.tmp")  # of a run that was killed
    unfinished.touch()
    os.utime(unfinished, (0, 0))
    # The server does not run any more.
    assert download_imagenet_weights(tmp_path / "models", f"{address}/{name}") == path
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["wrong checksum", "cut off", "missing", "no server"])
def test_a_failed_download_says_what_to_do_and_writes_nothing(tmp_path, published, fault):
    content, name = published
    files = {"wrong checksum": {name: content[:-1] + b"x"}, "cut off": {name: content}}.get(fault, {})
    with serving(files, cut_off=fault == "cut off") as address:
        url = f"{'http://127.0.0.1:9' if fault == 'no server' else address}/{name}"
        with pytest.raises(UserError) as error:
            download_imagenet_weights(tmp_path, url)
    message = str(error.value)
    assert "\n" not in message
    assert f"put {url} by hand at {tmp_path / name}" in message
    assert "--weights none" in message
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_weights_is_refused(tmp_path, published):
    content, name = published
    (tmp_path / name).write_bytes(content[:100])
    with pytest.raises(UserError, match=r"is not the published file \(its SHA-256 differs\): delete it"):
        download_imagenet_weights(tmp_path, f"http://127.0.0.1:9/{name}")


def test_layers_get_the_shapes_of_the_weights():
    narrow = resnet18_for_small_images(10)
    block = narrow.layer1[0]
    block.conv1, block.bn1 = nn.Conv2d(64, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
    block.conv2 = nn.Conv2d(24, 64, 3, padding=1, bias=False)
    rebuilt = resnet18_for_small_images(10)
    give_shapes(rebuilt, narrow.state_dict())
    rebuilt.load_state_dict(narrow.state_dict())
    inputs = torch.randn(2, 3, 16, 16)
    assert torch.equal(rebuilt.eval()(inputs), narrow.eval()(inputs))
    assert (rebuilt.layer1[0].conv1.out_channels, rebuilt.layer1[0].conv2.in_channels) == (24, 24)
    assert rebuilt.layer1[0].bn1.num_features == 24


def test_other_networks_are_those_of_torchvision():
    network = build("MobileNetV2", 3)
    assert network.state_dict().keys() == mobilenet_v2().state_dict().keys()
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert type(build("ResNet18", 3).maxpool) is nn.Identity
    assert build("SqueezeNet1_1", 3).num_classes == 3
    assert imagenet_url("ResNet18").endswith("/resnet18-f37072fd.pth")
    assert "/regnet_y_1_6gf-" in imagenet_url("RegNetY1_6GF") and "/regnet_y_16gf-" in imagenet_url("RegNetY16GF")
    with pytest.raises(UserError, match="There is no network called MobileNet9"):
        build("MobileNet9", 3)


def test_layers_of_every_kind_get_the_shapes_of_the_weights():
    def network(one, two, three):
        made = nn.Sequential(
            nn.Conv2d(1, one, 3), nn.Conv2d(one, two * one, 3, groups=one), nn.BatchNorm2d(two * one),
            nn.Conv2d(two * one, three, 1), nn.Conv2d(three, three, 3, groups=three), nn.Conv2d(three, three, 1),
            nn.Conv2d(three, three, 1), nn.Flatten(2), nn.Conv1d(three, three, 3), nn.BatchNorm1d(three),
            nn.ConvTranspose1d(three, 4, 3),
        )  # fmt: skip
        made[6].weight = made[5].weight
        return made.eval()

    for widths in ((8, 2, 12), (8, 1, 6)):
        narrow, rebuilt = network(*widths), network(8, 3, 12)
        give_shapes(rebuilt, narrow.state_dict())
        rebuilt.load_state_dict(narrow.state_dict())
        inputs = torch.randn(2, 1, 12, 12)
        assert torch.equal(rebuilt(inputs), narrow(inputs))
        assert parameter_count(rebuilt) == parameter_count(narrow)
        assert [str(layer) for layer in rebuilt] == [str(layer) for layer in narrow]


@pytest.mark.parametrize(("model", "side"), [("MNASNet0_5", 32), ("InceptionV3", 75)])
def test_a_network_is_saved_and_loaded(tmp_path, model, side):
    network = build(model, 3).eval()
    facts = {"model": model, "classes": ["a", "b", "c"], "image_size": [side, side]}
    save_network(tmp_path / "n.pth", network, facts)
    inputs = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(load_network(tmp_path / "n.pth")(inputs), network(inputs))
    state = torch.load(tmp_path / "n.pth", weights_only=True)["state_dict"]
    assert state._metadata == network.state_dict()._metadata
    build(model, 3).load_state_dict(state)  # as users do


class _Squeezing(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze()


_TRIALS = {
    "AlexNet does not work on images of 32 x 32 pixels: .*Output size is too small.*64 x 64 pixels fit": (
        lambda: build("AlexNet", 4), 32, 8),
    "Wrong image height! Expected 224 but got 16!.* 224 x 224 pixels fit": (lambda: build("ViT_B_32", 4), 16, None),
    "--batch-size 1 is too little for batch norm in ResNet: .*layer4.0.bn1.* Use at least 2": (
        lambda: build("ResNet18", 4), 8, 1),
    "first layer 0 reads 1 channels, not 3 .RGB.*Let it read 3": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), 8, 2),
    r"its outputs are \(1, 5\), not \(1, 4\)": (lambda: nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), 8, 2),
    r"its outputs are \(4,\), not \(1, 4\)": (lambda: _Squeezing(nn.Conv2d(3, 4, 8)), 8, 2),
    r"its outputs are \(1, 4, 3, 3\)": (lambda: nn.Sequential(nn.Conv2d(3, 4, 6)), 8, 2),
    "cannot be trained on images of 64 x 64 pixels: its outputs are GoogLeNetOutputs": (
        lambda: torchvision.models.googlenet(num_classes=4, init_weights=False), 64, 2),
    "cannot be trained: no weight that its outputs depend on has requires_grad": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).requires_grad_(False), 8, 2),
    "cannot be trained: its backward pass fails .*modified by an inplace operation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Flatten()), 8, 2),
}  # fmt: skip


def _images(side):
    return Images(random_images(4, side), random_images(4, side), list("abcd"), True, "random")


@pytest.mark.parametrize("reason", _TRIALS)
def test_a_network_that_does_not_suit_the_images_is_refused_in_one_line(reason, compute):
    make, side, batch_size = _TRIALS[reason]
    with pytest.raises(UserError, match=reason) as error:
        try_network(make(), _images(side), batch_size, compute)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("side", "batch_size"), [(8, 2), (8, None), (16, 1)])
def test_a_trial_leaves_the_network_and_the_random_numbers_as_they_are(side, batch_size, compute):
    network = build("ResNet18", 4).train()
    network.fc = nn.Sequential(nn.Dropout(), network.fc)
    before, random = {name: tensor.clone() for name, tensor in network.state_dict().items()}, torch.get_rng_state()
    try_network(network, _images(side), batch_size, compute)
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training and not any(module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_frozen_network_may_be_pruned_without_training(compute):
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).requires_grad_(False)
    try_network(network, _images(8), 2, compute, trained=False)


def test_a_weight_without_part_in_the_outputs_is_refused_where_several_processes_train(compute, monkeypatch):
    class WithSpare(_Viewing):
        def __init__(self):
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

    for network in (_Viewing(), WithSpare()):
        in_fitting_order(network, _images(8), 2, compute)
    monkeypatch.setenv("WORLD_SIZE", "2")
    in_fitting_order(_Viewing(), _images(8), 2, compute)
    with pytest.raises(UserError, match="by several processes: its outputs do not depend on spare"):
        in_fitting_order(WithSpare(), _images(8), 2, compute)


class _Viewing(nn.Module):
    """A network that flattens with `view`, as many do."""

    def __init__(self, side=8):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * side * side, 4)

    def forward(self, x):
        x = self.convolution(x).relu()
        return self.linear(x.view(x.size(0), -1))


def test_a_network_that_flattens_with_view_gets_the_usual_order_of_memory(compute):
    images = _images(8)
    for network, fitting in ((_Viewing(), torch.contiguous_format), (build("ResNet18", 4), torch.channels_last)):
        chosen, ordered = in_fitting_order(network, images, 2, compute)
        assert chosen.memory_format == ordered.train.memory_format == ordered.test.memory_format == fitting
        try_network(chosen.place(network), ordered, 2, chosen)
    with pytest.raises(UserError, match="32 x 32 pixels fit"):
        in_fitting_order(_Viewing(side=32), images, 2, compute)
    with pytest.raises(UserError, match="reads 1 channels"):
        in_fitting_order(nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), images, 2, compute)
