"""Exported networks, as another program reads them."""

import os

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.measure.onnx_export import export_onnx
from cleanai.network.models import resnet18_for_small_images
from tests.helpers import SCRIPTS, fails, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network with running statistics in its batch norms, the exported file, and the difference that was found."""
    torch.manual_seed(0)
    network = resnet18_for_small_images(10)
    network(torch.randn(32, 3, 16, 16))
    path = tmp_path_factory.mktemp("Dışa Aktarım") / "a.onnx"
    return network, path, export_onnx(network, torch.randn(5, 3, 16, 16), path)


def _outputs(path, images):
    session = onnxruntime.InferenceSession(path.read_bytes())
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_batches_of_any_size_give_the_outputs_of_pytorch(exported, batch):
    network, path, difference = exported
    images = torch.randn(batch, 3, 16, 16)
    with torch.inference_mode():
        expected = network.eval()(images)
    assert torch.allclose(_outputs(path, images), expected, atol=1e-5)
    assert 0 <= difference < 1e-5


def test_batch_norm_is_folded_and_the_size_of_a_batch_is_free(exported):
    network, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model)
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("Conv") == 20
    assert "BatchNormalization" not in operations
    types = {weights.data_type for weights in model.graph.initializer if "weight" in weights.name}
    assert types == {onnx.TensorProto.FLOAT}
    for value, sizes in ((model.graph.input[0], [3, 16, 16]), (model.graph.output[0], [10])):
        first, *others = value.type.tensor_type.shape.dim
        assert first.dim_param
        assert [dimension.dim_value for dimension in others] == sizes
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()), "export changes only a copy"


def test_other_outputs_than_pytorchs_are_refused(tmp_path):
    class Noisy(nn.Module):
        def forward(self, images):
            return images + torch.rand_like(images)

    path = tmp_path / "a.onnx"
    path.write_bytes(b"an earlier export")
    with pytest.raises(UserError, match=r"gives other outputs than PyTorch \(by up to .*a\.onnx is not written: "):
        export_onnx(Noisy(), torch.zeros(3, 3, 8, 8), path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_bytes() == b"an earlier export"


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_missing_packages_are_named_before_any_work(script, tmp_path):
    # Python runs this file first. A module that is None cannot be imported, and PyTorch must not be needed.
    blocked = "import sys\nfor name in ('onnx', 'onnxruntime', 'torch'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run(script, "--export", "onnx", "--checkpoints-dir", tmp_path / "out", PYTHONPATH=path)
    fails(result, "packages that are not installed (onnx, onnxruntime): pip install onnx onnxruntime")
    assert not (tmp_path / "out").exists()
