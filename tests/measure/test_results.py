"""What a report tells by layer, by class and by test coverage."""
import base64
import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cleanai.data.images import Images, ImageSet
from cleanai.measure.costs import count_layers, count_macs
from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.measure.results import COVERAGE_IMAGES, compare_classes, measure_details
from cleanai.network.evaluation import Evaluation, evaluate
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget

CLASSES = ["ant", "bee", "cat"]


def _evaluation(hits):
    return Evaluation(100 * hits.double().mean().item(), 0.0, hits)


@pytest.fixture(scope="module")
def run(digits, compute, _trained):
    """Three networks, what they made of the test images, and the details measured of them on few images."""
    images = digits.with_train_samples(128, seed=0)
    calibration, _ = images.calibration_split(64, seed=0)
    pruned = copy.deepcopy(_trained)
    prune_to_budget(pruned, WandaImportance(), calibration, images.train, compute, 0.2, None, 1, 64)
    networks = {"original": _trained, "pruned": pruned, "fine_tuned": copy.deepcopy(pruned)}
    with torch.no_grad():  # three classes that the last network does worse on
        networks["fine_tuned"].fc.bias[[3, 5, 8]] -= 3
    evaluations = {name: evaluate(network, images.test, compute) for name, network in networks.items()}
    details = measure_details(networks, evaluations, images, calibration, compute, seed=0)
    return images, calibration, networks, evaluations, details


def test_layers_are_counted_as_torch_counts_them(network):
    flop_counter = pytest.importorskip("torch.utils.flop_counter")  # since PyTorch 2.1
    example = torch.zeros(1, 3, 32, 32)
    layers = count_layers(network, example)
    with flop_counter.FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        network.eval()(example)
    counted = counter.get_flop_counts()
    assert len(layers) == 21
    for name, layer in layers.items():
        assert 2 * layer["macs"] == sum(counted[f"ResNet.{name}"].values()), name
        assert layer["parameters"] == sum(p.numel() for p in network.get_submodule(name).parameters())
    rest = count_macs(network, example) - sum(layer["macs"] for layer in layers.values())
    assert 0 < rest < 0.01 * count_macs(network, example), "batch norm and pooling"


def test_each_layer_is_told_before_and_after(run):
    images, _, networks, _, details = run
    example = next(images.test.batches(1))[0]
    for when, name in (("before", "original"), ("after", "fine_tuned")):
        counted = count_layers(networks[name], example)
        assert {
            layer["name"]: {"parameters": layer[f"parameters_{when}"], "macs": layer[f"macs_{when}"]}
            for layer in details["layers"]
        } == counted
    assert sum(layer["parameters_before"] - layer["parameters_after"] for layer in details["layers"]) > 2_000_000


def test_classes_are_compared():
    pixels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    few = ImageSet(pixels, labels, torch.zeros(3), torch.ones(3))
    images = Images(few, few, CLASSES, False, "six images")
    hits = {"original": [1, 1, 1, 0, 1, 0], "pruned": [0, 0, 0, 1, 1, 0], "fine_tuned": [1, 0, 0, 1, 1, 1]}
    evaluations = {name: _evaluation(torch.tensor(values, dtype=torch.bool)) for name, values in hits.items()}
    ant, bee, cat = compare_classes(evaluations, images)
    assert ant == {
        "name": "ant", "images": 4, "original_percent": 75, "pruned_percent": 25, "fine_tuned_percent": 50,
        "newly_wrong": 2, "newly_right": 1,
    }  # fmt: skip
    assert [bee[key] for key in ("images", "original_percent", "fine_tuned_percent", "newly_wrong")] == [1, 100, 100, 0]
    assert [cat[key] for key in ("images", "original_percent", "fine_tuned_percent", "newly_right")] == [1, 0, 100, 1]


def test_classes_add_up_to_the_accuracy(run):
    images, _, _, evaluations, details = run
    assert [row["name"] for row in details["classes"]] == list(images.classes)
    for name, evaluation in evaluations.items():
        right = sum(row["images"] * row[f"{name}_percent"] / 100 for row in details["classes"])
        assert right == pytest.approx(int(evaluation.correct.sum()))


def test_pictures_are_of_images_newly_wrong_in_the_classes_that_lost_most(run):
    images, _, networks, evaluations, details = run
    pictures = details["newly_wrong"]
    assert 4 < len(pictures) <= 12
    changes = {row["name"]: row["fine_tuned_percent"] - row["original_percent"] for row in details["classes"]}
    worst = sorted(changes, key=changes.get)[:3]
    assert {picture["class"] for picture in pictures} <= set(worst)
    inputs = next(images.test.batches(len(images.test)))[0]
    with torch.inference_mode():
        answers = networks["fine_tuned"](inputs).argmax(1)
    for picture in pictures:
        index = picture["index"]
        assert evaluations["original"].correct[index] and not evaluations["fine_tuned"].correct[index]
        assert picture["class"] == images.classes[images.test.labels[index]]
        assert picture["taken_for"] == images.classes[answers[index]]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png_base64"]))))
        assert (shown == images.test.pixels[index].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("lost", [True, False])
def test_pictures_are_small_and_only_of_classes_that_lost(compute, lost):
    pixels = torch.randint(0, 256, (6, 3, 80, 120), dtype=torch.uint8)
    large = ImageSet(pixels, torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(3), torch.ones(3))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    networks = dict.fromkeys(("original", "pruned", "fine_tuned"), network)
    # One image of "ant" is newly wrong: with nothing for it, or with the other newly right.
    before = _evaluation(torch.tensor([True, lost, True, True, True, True]))
    after = _evaluation(torch.tensor([False, True, True, True, True, True]))
    evaluations = {"original": before, "pruned": before, "fine_tuned": after}
    images = Images(large, large, CLASSES, False, "six images")
    pictures = measure_details(networks, evaluations, images, large, compute, seed=0)["newly_wrong"]
    assert [picture["index"] for picture in pictures] == ([0] if lost else [])
    assert [Image.open(io.BytesIO(base64.b64decode(p["png_base64"]))).size for p in pictures] == [(64, 43)] * lost


def test_coverage_is_that_of_the_images_named(run, compute):
    images, calibration, networks, _, details = run
    coverage = details["coverage"]
    assert (coverage["profile_images"], coverage["images"], coverage["threshold"]) == (128, 64, 0.25)
    assert len(calibration) < COVERAGE_IMAGES
    for name, network in networks.items():
        profiles = record_profiles(network, images.train, compute)
        expected = measure_coverage(network, calibration, profiles, compute)
        measured = coverage["models"][name]
        for key in ("neurons", "nc_percent", "kmnc_percent", "nbc_percent", "snac_percent", "tknc_percent"):
            assert measured[key] == pytest.approx(expected[key]), (name, key)


def test_activity_of_a_layer_is_that_of_what_reaches_it(run):
    _, calibration, networks, _, details = run
    for name, network in networks.items():
        layers = {layer["name"]: layer for layer in details["coverage"]["models"][name]["layers"]}
        seen = {}
        reader = network.get_submodule("layer3.1.conv2")
        hook = reader.register_forward_pre_hook(lambda layer, args, seen=seen: seen.update(values=args[0]))
        with torch.inference_mode():
            network(next(calibration.batches(64))[0])
        hook.remove()
        means = seen["values"].double().abs().mean((0, 2, 3))
        layer = layers["layer3.1.conv2"]
        assert layer["active_percent"] == pytest.approx(100 * (seen["values"] > 0).double().mean().item(), rel=1e-4)
        assert layer["normalized_mean_percent"] == pytest.approx(100 * (means / means.max()).mean().item(), rel=1e-4)
        assert "active_percent" not in layers["output"], "no layer reads it"
