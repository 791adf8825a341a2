"""Exported networks, as another program reads them."""

import json
import os

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cleanai import UserError, export_onnx, image_set
from cleanai.measure import onnx_export
from tests.helpers import SCRIPTS, fails, run

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def _images(count, side):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return image_set(pixels, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network with running statistics in its batch norms, the exported file, and what the export returned."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    network(torch.randn(32, 3, 16, 16))
    path = tmp_path_factory.mktemp("Dışa Aktarım") / "a.onnx"
    return network, path, export_onnx(network, path, _images(5, 16), [f"sınıf {number}" for number in range(10)])


def _outputs(path, images):
    session = onnxruntime.InferenceSession(path.read_bytes())
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 16, 16), (9, 16, 16), (2, 24, 37)])
def test_batches_and_images_of_any_size_give_the_outputs_of_pytorch(exported, shape):
    network, path, facts = exported
    images = torch.randn(shape[0], 3, *shape[1:])
    with torch.inference_mode():
        expected = network.eval()(images)
    assert torch.allclose(_outputs(path, images), expected, atol=1e-5)
    assert facts["free_image_size"]
    assert 0 <= facts["largest_difference"] < 1e-5


def test_batch_norm_is_folded_and_sizes_are_free(exported):
    network, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model)
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("Conv") == 2
    assert "BatchNormalization" not in operations
    types = {weights.data_type for weights in model.graph.initializer if "weight" in weights.name}
    assert types == {onnx.TensorProto.FLOAT}
    (given,), (returned,) = (
        [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values]
        for values in (model.graph.input, model.graph.output)
    )
    assert (given, returned) == (["batch", 3, "height", "width"], ["batch", 10])
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()), "export changes only a copy"


def test_the_file_says_what_it_takes(exported):
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(exported[1]).metadata_props}
    assert facts.keys() == {"image_size", "mean", "std", "classes"}
    assert facts["image_size"] == [16, 16] and facts["classes"][9] == "sınıf 9"
    assert facts["mean"] == pytest.approx(MEAN) and facts["std"] == pytest.approx(STD)


def _pooled(size):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(4 * size**2, 2))


def test_the_image_size_is_fixed_where_other_sizes_are_wrong(tmp_path, capfd):
    flat = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 2))  # takes no other size
    assert not export_onnx(flat, tmp_path / "a.onnx", _images(2, 8))["free_image_size"]
    images = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(_outputs(tmp_path / "a.onnx", images), flat(images), atol=1e-5, rtol=0)
    captured = capfd.readouterr()
    assert captured.out == "a.onnx: any batch size, images of 8 x 8 pixels only\n" and captured.err == ""
    if torch.__version__ >= (2, 9):  # the file would be wrong for other sizes; older exporters cannot write it at all
        uneven = _pooled(3)
        assert not export_onnx(uneven, tmp_path / "b.onnx", _images(4, 7))["free_image_size"]


class Noisy(nn.Module):
    def forward(self, images):
        return (images + torch.rand_like(images)).mean((2, 3))


class Decomposing(nn.Module):
    def forward(self, images):
        return torch.linalg.svd(images.mean(1))[1][:, :2]


def _refused(network, path, expected, images):
    path.write_bytes(b"an earlier export")
    with pytest.raises(UserError, match=expected) as error:
        export_onnx(network, path, images)
    assert "\n" not in str(error.value)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"an earlier export"


def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(tmp_path, capfd, monkeypatch):
    path = tmp_path / "a.onnx"
    _refused(Noisy(), path, "Noisy gives other outputs for the same images each time", _images(3, 8))
    _refused(Decomposing(), path, r"Decomposing cannot be exported by torch\.onnx\.export .*linalg_svd", _images(3, 8))
    real = torch.onnx.export

    def older(network, args, file, dynamo=False, dynamic_shapes=None, external_data=None, verbose=None, **options):
        axes = options.pop("dynamic_axes", None) or {"images": dynamic_shapes[0]}
        new = {"dynamo": False} if torch.__version__ >= (2, 5) else {}
        real(network, args, file, dynamic_axes=axes, **new, **options)

    monkeypatch.setattr(torch.onnx, "export", older)  # what PyTorch before 2.9 does
    expected = r"cannot be exported by torch\.onnx\.export .*adaptive_avg_pool2d.* \(layer 1\)"
    _refused(_pooled(4), path, expected, _images(3, 8))
    assert capfd.readouterr().err == ""


class Cancelling(nn.Module):
    """The rounding of a large sum is most of its outputs."""

    def forward(self, images):
        return images.mean((2, 3)) + 1e6 - 1e6


@pytest.mark.parametrize(
    ("network", "error", "refused"), [(_pooled(1), 0.5, True), (Cancelling(), 0.03, False), (Cancelling(), 0.5, True)]
)
def test_a_real_difference_is_refused_with_its_numbers_and_rounding_as_in_pytorch_is_not(
    network, error, refused, tmp_path, monkeypatch
):
    class Wrong:
        """ONNX Runtime with an error in each output."""

        def __init__(self, model):
            self.real = session(model)

        def run(self, names, feed):
            return [self.real.run(names, feed)[0] + error]

    session = onnx_export.open_session
    monkeypatch.setattr(onnx_export, "open_session", Wrong)
    path = tmp_path / "a.onnx"
    if refused:
        numbers = r"by up to 0\.5; they are up to .*; from a run in float64 it differs by up to 0\..*, PyTorch by .*\)"
        _refused(network, path, numbers, _images(3, 8))
    else:
        assert export_onnx(network, path, _images(3, 8))["largest_difference"] == pytest.approx(error, abs=0.01)


@pytest.mark.parametrize(("script", "form"), [(SCRIPTS[1], "onnx"), (SCRIPTS[2], "onnx-int8")])
def test_missing_packages_are_named_before_any_work(script, form, tmp_path):
    # Python runs this file first. A module that is None cannot be imported, and PyTorch must not be needed.
    blocked = "import sys\nfor name in ('onnx', 'onnxruntime'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked, encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise AssertionError", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run(script, "--export", form, "--checkpoints-dir", tmp_path / "out", PYTHONPATH=path)
    fails(
        result,
        f"--export {form} needs packages that are not installed (onnx, onnxruntime): pip install onnx onnxruntime",
    )
    assert not (tmp_path / "out").exists()
