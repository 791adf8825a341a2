"""The measured entries of a record: in total, by layer, by class, and by test coverage."""

import base64
import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cleanai.data.images import Images, ImageSet
from cleanai.measure import latency
from cleanai.measure.costs import count_layers
from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.measure.results import COVERAGE_IMAGES, Split, compare_classes, measure_results
from cleanai.measure.significance import unpack
from cleanai.network.evaluation import Evaluation, evaluate
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings

CLASSES = ["ant", "bee", "cat"]


def _evaluation(correct):
    return Evaluation(100 * correct.double().mean().item(), 0.5, correct)


@pytest.fixture(scope="module", autouse=True)
def little_timing():
    """Less timing: the times are not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LATENCY_TURNS": 3, "THROUGHPUT_TURNS": 3, "THROUGHPUT_BATCH": 8}.items():
            patch.setattr(latency, name, value)
        yield


@pytest.fixture(scope="module")
def measured(digits, compute, trained_thin_network):
    """Three networks, their evaluations, and their results on few images."""
    images = digits.with_train_samples(128, seed=0)
    split = Split(*images.calibration_split(64, seed=0))
    pruned = copy.deepcopy(trained_thin_network)
    settings = PruneSettings(0.2, None, steps=1, batch_size=64, round_to=[2])
    prune_to_budget(
        pruned, WandaImportance(), PruneImages(split.calibration, images.repair_sample(64, 0)), compute, settings
    )
    networks = {"original": copy.deepcopy(trained_thin_network), "pruned": pruned, "fine_tuned": copy.deepcopy(pruned)}
    with torch.no_grad():  # the last network is worse on three classes
        networks["fine_tuned"].fc.bias[[3, 5, 8]] -= 3
    evaluations = {name: evaluate(network, images.test, compute) for name, network in networks.items()}
    results = measure_results(networks, evaluations, images, split, compute, seed=0)
    return images, split.calibration, networks, evaluations, results


def test_models_and_summary_are_calculated_from_the_measurements(digits, compute):
    networks = {
        "original": nn.Sequential(nn.Flatten(), nn.Linear(768, 100), nn.Linear(100, 10)),
        "pruned": nn.Sequential(nn.Flatten(), nn.Linear(768, 50), nn.Linear(50, 10)),
        "fine_tuned": nn.Sequential(nn.Flatten(), nn.Linear(768, 50), nn.Linear(50, 10)),
    }
    correct = {name: torch.zeros(360, dtype=torch.bool) for name in networks}
    for name, count in (("original", 180), ("pruned", 90), ("fine_tuned", 170)):
        correct[name][:count] = True
    evaluations = {name: _evaluation(flags) for name, flags in correct.items()}
    split = Split(digits.test.select(torch.arange(100)), torch.arange(100, 360))
    results = measure_results(networks, evaluations, digits, split, compute, seed=0)
    assert "churn" not in results, "an older version did not store what the networks predicted"
    models, summary = results["models"], results["summary"]
    assert models["original"]["accuracy_heldout_percent"] == pytest.approx(100 * 80 / 260)
    assert models["pruned"]["accuracy_heldout_percent"] == 0
    assert models["original"]["macs"] == 768 * 100 + 1000
    assert summary["macs_reduction_percent"] == pytest.approx(50)
    assert summary["parameter_reduction_percent"] == pytest.approx(100 * (1 - (768 * 50 + 560) / (768 * 100 + 1110)))
    assert summary["accuracy_recovery_points"] == pytest.approx(100 * 80 / 360, abs=1e-4)
    assert summary["final_accuracy_drop_points"] == pytest.approx(-100 * 10 / 360, abs=1e-4)
    latencies = [models[name]["latency_ms"]["p50"] for name in ("original", "fine_tuned")]
    assert summary["speedup"] == pytest.approx(latencies[0] / latencies[1])
    sizes = [models[name]["size_mib"] for name in ("original", "fine_tuned")]
    assert summary["size_reduction_percent"] == pytest.approx(100 * (1 - sizes[1] / sizes[0]))
    assert unpack(results["heldout_bits"], 360).tolist() == [False] * 100 + [True] * 260
    for name, flags in correct.items():
        assert unpack(models[name]["correct_bits"], 360).tolist() == flags.tolist()


def test_each_layer_is_counted_before_and_after(measured):
    images, _, networks, _, results = measured
    example = next(images.test.batches(1))[0]
    for when, name in (("before", "original"), ("after", "fine_tuned")):
        counted = count_layers(networks[name], example)
        assert {
            layer["name"]: {"parameters": layer[f"parameters_{when}"], "macs": layer[f"macs_{when}"]}
            for layer in results["layers"]
        } == counted
    assert sum(layer["parameters_before"] - layer["parameters_after"] for layer in results["layers"]) > 125_000


def test_classes_are_compared():
    pixels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    few = ImageSet(pixels, labels, torch.zeros(3), torch.ones(3))
    images = Images(few, few, CLASSES, False, "six images")
    correct = {"original": [1, 1, 1, 0, 1, 0], "pruned": [0, 0, 0, 1, 1, 0], "fine_tuned": [1, 0, 0, 1, 1, 1]}
    evaluations = {name: _evaluation(torch.tensor(flags, dtype=torch.bool)) for name, flags in correct.items()}
    ant, bee, cat = compare_classes(evaluations, images)
    assert ant == {
        "name": "ant", "images": 4, "original_percent": 75, "pruned_percent": 25, "fine_tuned_percent": 50,
        "newly_wrong": 2, "newly_right": 1,
    }  # fmt: skip
    assert [bee[key] for key in ("images", "original_percent", "fine_tuned_percent", "newly_wrong")] == [1, 100, 100, 0]
    assert [cat[key] for key in ("images", "original_percent", "fine_tuned_percent", "newly_right")] == [1, 0, 100, 1]


def test_classes_add_up_to_the_accuracy(measured):
    images, _, _, evaluations, results = measured
    assert [row["name"] for row in results["classes"]] == list(images.classes)
    for name, evaluation in evaluations.items():
        correct = sum(row["images"] * row[f"{name}_percent"] / 100 for row in results["classes"])
        assert correct == pytest.approx(int(evaluation.correct.sum()))


def test_pictures_are_newly_wrong_images_of_the_classes_that_lost_most(measured):
    images, _, networks, evaluations, results = measured
    pictures = results["newly_wrong"]
    assert 4 < len(pictures) <= 12
    changes = {row["name"]: row["fine_tuned_percent"] - row["original_percent"] for row in results["classes"]}
    worst = sorted(changes, key=changes.get)[:3]
    assert {picture["class"] for picture in pictures} <= set(worst)
    inputs = next(images.test.batches(len(images.test)))[0]
    with torch.inference_mode():
        predicted = networks["fine_tuned"](inputs).argmax(1)
    for picture in pictures:
        index = picture["index"]
        assert evaluations["original"].correct[index] and not evaluations["fine_tuned"].correct[index]
        assert picture["class"] == images.classes[images.test.labels[index]]
        assert picture["predicted"] == images.classes[predicted[index]]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png_base64"]))))
        assert (shown == images.test.pixels[index].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("lost", [True, False])
def test_pictures_are_small_and_only_of_classes_that_lost(compute, lost):
    pixels = torch.randint(0, 256, (6, 3, 80, 120), dtype=torch.uint8)
    large = ImageSet(pixels, torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(3), torch.ones(3))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    networks = dict.fromkeys(("original", "pruned", "fine_tuned"), network)
    # One image of "ant" is newly wrong. The other one was right before, or is newly right.
    before = _evaluation(torch.tensor([True, lost, True, True, True, True]))
    after = _evaluation(torch.tensor([False, True, True, True, True, True]))
    evaluations = {"original": before, "pruned": before, "fine_tuned": after}
    images = Images(large, large, CLASSES, False, "six images")
    split = Split(large, torch.arange(6))
    pictures = measure_results(networks, evaluations, images, split, compute, seed=0)["newly_wrong"]
    assert [picture["index"] for picture in pictures] == ([0] if lost else [])
    assert [Image.open(io.BytesIO(base64.b64decode(p["png_base64"]))).size for p in pictures] == [(64, 43)] * lost


def test_coverage_is_that_of_the_calibration_images(measured, compute):
    images, calibration, networks, _, results = measured
    coverage = results["coverage"]
    assert (coverage["profile_images"], coverage["images"], coverage["threshold"]) == (128, 64, 0.25)
    assert len(calibration) < COVERAGE_IMAGES
    for name, network in networks.items():
        profiles = record_profiles(network, images.train, compute)
        expected = measure_coverage(network, calibration, profiles, compute)
        of_network = coverage["models"][name]
        for key in ("neurons", "nc_percent", "kmnc_percent", "nbc_percent", "snac_percent", "tknc_percent"):
            assert of_network[key] == pytest.approx(expected[key]), (name, key)


def test_activity_of_a_layer_is_that_of_its_inputs(measured):
    _, calibration, networks, _, results = measured
    for name, network in networks.items():
        layers = {layer["name"]: layer for layer in results["coverage"]["models"][name]["layers"]}
        inputs = []
        consumer = network.get_submodule("layer3.1.conv2")
        hook = consumer.register_forward_pre_hook(lambda layer, args, inputs=inputs: inputs.append(args[0].double()))
        with torch.inference_mode():
            network(next(calibration.batches(64))[0])
        hook.remove()
        means = inputs[0].abs().mean((0, 2, 3))
        layer = layers["layer3.1.conv2"]
        assert layer["active_percent"] == pytest.approx(100 * (inputs[0] > 0).double().mean().item(), rel=1e-4)
        assert layer["normalized_mean_percent"] == pytest.approx(100 * (means / means.max()).mean().item(), rel=1e-4)
        assert "active_percent" not in layers["output"], "no layer reads it"
