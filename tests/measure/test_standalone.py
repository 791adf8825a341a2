"""Programs of PyTorch that run without this project."""

import json

import pytest
import torch
from torch import nn

from cleanai import UserError, export_onnx, image_set, save_standalone
from cleanai.runtime import packages

needs_torch_export = pytest.mark.skipif(torch.__version__ < packages.LEAST_TORCH, reason="PyTorch has no torch.export")


@pytest.fixture
def images():
    return image_set(torch.randint(0, 256, (5, 3, 12, 16), dtype=torch.uint8), mean=(0.5, 0.4, 0.3), std=[0.25] * 3)


def _network(*last):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers, *last)


@needs_torch_export
def test_it_gives_the_outputs_for_any_batch_size_and_says_what_it_takes(tmp_path, images):
    network = _network()
    difference = save_standalone(network, str(tmp_path / "a.pt2"), images, ["kuş", "b", "c"])["largest_difference"]
    assert network.training and 0 <= difference < 1e-5
    extra = {"cleanai.json": ""}
    program = torch.export.load(str(tmp_path / "a.pt2"), extra_files=extra).module()
    for batch in (1, 2, 7):
        inputs = torch.randn(batch, 3, 12, 16)
        with torch.no_grad():
            torch.testing.assert_close(program(inputs), network.eval()(inputs), atol=1e-5, rtol=0)
    facts = json.loads(extra["cleanai.json"])
    assert facts["image_size"] == [12, 16] and facts["classes"] == ["kuş", "b", "c"]
    assert facts["mean"] == pytest.approx([0.5, 0.4, 0.3]) and facts["std"] == pytest.approx([0.25] * 3)


@needs_torch_export
def test_the_file_holds_none_of_the_pictures(tmp_path):
    many = image_set(torch.randint(0, 256, (100, 3, 48, 48), dtype=torch.uint8))  # 2.8 MB as float32
    save_standalone(_network(), tmp_path / "a.pt2", many)
    assert (tmp_path / "a.pt2").stat().st_size < 200_000


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        return self.convolution(images).view(images.size(0), -1)[:, :3]


@pytest.mark.parametrize("save", [pytest.param(save_standalone, marks=needs_torch_export), export_onnx])
def test_a_network_that_flattens_with_view_has_names_for_its_outputs(save, images, tmp_path):
    network = Views().to(memory_format=torch.channels_last)
    assert save(network, tmp_path / "network", images, ["a", "b", "c"])["largest_difference"] < 1e-5


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Random(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) + torch.rand(len(images), 3)


class Infinite(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) / 0


@needs_torch_export
@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        (Branching(), {}, r"Branching cannot be exported by torch\.export .*\(in test_standalone\.py, line \d+\)"),
        (Random(), {}, "other outputs for the same images each time"),
        (Infinite(), {}, "not finite"),
        (_network(), {"classes": ["a", "b"]}, "classes holds 2 names, and the network has 3 outputs"),
        (_network(), {"classes": "abc"}, "give a list of names"),
        (_network(nn.Unflatten(1, (1, 1, 5))), {}, "does not take images of 3 x 12 x 16"),
        ("resnet18", {}, "network is a str"),
    ],
)
def test_what_cannot_be_saved_is_one_line_and_leaves_no_file(network, options, expected, images, tmp_path, capfd):
    path = tmp_path / "a.pt2"
    path.write_bytes(b"an earlier one")
    with pytest.raises(UserError, match=expected) as error:
        save_standalone(network, path, images, **options)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"] and path.read_bytes() == b"an earlier one"


def test_an_old_pytorch_is_named_before_any_work(monkeypatch, images, tmp_path):
    monkeypatch.setattr(packages, "version", lambda _: "2.0.1+cpu")
    with pytest.raises(UserError, match=r"save_standalone needs PyTorch 2\.2 or newer, and this is 2\.0\.1\+cpu: pip"):
        save_standalone(_network(), tmp_path / "a.pt2", images)


@needs_torch_export
def test_a_folder_and_images_of_another_kind_are_named(tmp_path, images):
    with pytest.raises(UserError, match="is a folder"):
        save_standalone(_network(), tmp_path, images)
    with pytest.raises(UserError, match="images is a Tensor"):
        save_standalone(_network(), tmp_path / "a.pt2", torch.zeros(4, 3, 8, 8))
