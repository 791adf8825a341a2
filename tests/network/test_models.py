import hashlib
import io
import os

import pytest
import torch
from torchvision.models import mobilenet_v2, resnet18

from cleanai import UserError
from cleanai.network.models import (
    build,
    download_imagenet_weights,
    give_shapes,
    imagenet_url,
    resnet18_for_small_images,
)
from tests.helpers import parameter_count, serving, torch_macs


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
    block.conv1, block.bn1 = torch.nn.Conv2d(64, 24, 3, padding=1, bias=False), torch.nn.BatchNorm2d(24)
    block.conv2 = torch.nn.Conv2d(24, 64, 3, padding=1, bias=False)
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
    assert type(build("ResNet18", 3).maxpool) is torch.nn.Identity
    assert build("SqueezeNet1_1", 3).num_classes == 3
    assert imagenet_url("ResNet18").endswith("/resnet18-f37072fd.pth")
    assert "/regnet_y_1_6gf-" in imagenet_url("RegNetY1_6GF") and "/regnet_y_16gf-" in imagenet_url("RegNetY16GF")
    with pytest.raises(UserError, match="There is no network called MobileNet9"):
        build("MobileNet9", 3)
