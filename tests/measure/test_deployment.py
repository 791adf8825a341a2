"""The exported networks on all held-out images, against a loop of the test's own."""

import importlib.metadata
import json

import onnx
import onnxruntime
import pytest
import torch

from cleanai import UserError
from cleanai.measure.deployment import export_scenario
from cleanai.measure.provenance import checkpoint_facts
from cleanai.measure.results import Split
from cleanai.network.evaluation import evaluate
from cleanai.network.models import save_network
from cleanai.network.training import TrainSettings, train
from cleanai.runtime.scenario import Scenario
from tests.helpers import SMALL_MODEL
from tests.small_network import SmallNetwork

CONFIG = {"calibration_batches": 3, "batch_size": 40, "seed": 0, "train_samples": None}
RECORD = {"config": CONFIG, "dataset": {"train_images": 1437, "test_images": 360}}


@pytest.fixture(scope="module")
def exported(digits, compute, tmp_path_factory):
    """A trained network, its scenario, and what the export of it returned."""
    torch.manual_seed(0)
    network = SmallNetwork(10)
    train(network, digits, compute, TrainSettings(epochs=4, batch_size=32, lr=0.01))
    scenario = Scenario("TS1", SMALL_MODEL, "Digits", tmp_path_factory.mktemp("out"), "Wanda")
    facts = checkpoint_facts(scenario, digits, compute, {})
    for path in scenario.networks.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_network(path, network, facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "distribution", _distribution)
        return network, scenario, export_scenario(scenario, RECORD, scenario.checkpoints_dir, 0.5, int8=True)


def _distribution(package, find=importlib.metadata.distribution):
    """That of a package, where ONNX Runtime is installed as onnxruntime-gpu."""
    if package == "onnxruntime":
        raise importlib.metadata.PackageNotFoundError(package)
    return find(package)


@pytest.fixture
def heldout(digits):
    return digits.test.select(Split.of(digits, CONFIG).heldout)


def _predictions(path, images):
    session = onnxruntime.InferenceSession(path.read_bytes())
    batches = (session.run(["logits"], {"images": inputs.contiguous().numpy()})[0] for inputs, _ in images.batches(50))
    return torch.cat([torch.from_numpy(outputs).argmax(1) for outputs in batches])


def test_accuracy_and_disagreements_are_those_of_the_files_on_all_held_out_images(exported, heldout, compute):
    network, scenario, export = exported
    expected = evaluate(network, heldout, compute)
    assert export["heldout_images"] == len(heldout) == 360 - 120
    assert export["pytorch_accuracy_percent"] == expected.accuracy_percent > 80
    for path, entry in ((scenario.exported, export), (scenario.quantized, export["int8"])):
        predicted = _predictions(path, heldout)
        accuracy = 100 * (predicted == heldout.labels).double().mean().item()
        assert entry["accuracy_heldout_percent"] == pytest.approx(accuracy)
        assert entry["disagreements"] == int((predicted != expected.predicted).sum())
        assert entry["file"] == path.name and entry["size_mib"] == path.stat().st_size / 2**20
    assert export["disagreements"] == 0


def test_8_bits_are_smaller_and_almost_as_accurate(exported):
    _, scenario, export = exported
    int8 = export["int8"]
    assert abs(int8["accuracy_heldout_percent"] - export["accuracy_heldout_percent"]) <= 1
    assert int8["size_mib"] < 0.5 * export["size_mib"]
    assert int8["calibration_images"] == 120 and int8["latency_ms"]["mean"] > 0
    model = onnx.load(scenario.quantized)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    weights = [name for name, array in arrays.items() if array.dtype == "int8" and array.ndim == 4]
    scales = {node.input[0]: arrays[node.input[1]] for node in model.graph.node if node.input[0] in weights}
    assert [scales[name].shape for name in weights] == [(arrays[name].shape[0],) for name in weights], "per channel"
    assert len(weights) == 4
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["image_size"]) == [16, 16] and len(json.loads(facts["classes"])) == 10, "as in float32"


def test_other_images_than_those_of_the_run_are_refused(exported):
    _, scenario, _ = exported
    record = {**RECORD, "dataset": {"train_images": 1437, "test_images": 361}}
    with pytest.raises(UserError, match=r"360 test images now, and .* was measured with 361"):
        export_scenario(scenario, record, scenario.checkpoints_dir, 0.5)
    record["dataset"].update(test_images=360, test_sha256="of as many other images")
    with pytest.raises(UserError, match=r"other images now .*--fresh"):
        export_scenario(scenario, record, scenario.checkpoints_dir, 0.5)
