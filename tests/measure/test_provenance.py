import hashlib
from dataclasses import replace

import pytest
import torch

from cleanai.measure.provenance import checkpoint_facts, describe_run, find_warnings
from cleanai.runtime.scenario import Scenario

LAYERS = [{"name": "conv1", "channels_before": 64, "channels_after": 56}]


def _models(original, pruned, fine_tuned):
    accuracies = {"original": original, "pruned": pruned, "fine_tuned": fine_tuned}
    return {name: {"accuracy_percent": accuracy} for name, accuracy in accuracies.items()}


def test_a_good_result_has_no_warnings(digits):
    assert find_warnings(_models(90.0, 60.0, 88.0), LAYERS, digits) == []


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((90, 17.5, 85), {"pruned": 17.5}),
        ((90, 18.5, 85), {}),
        ((90, 5, 11), {"pruned": 5, "final": 11}),
        # 37 of 360 test images show the most frequent class: 10.28% is right by guessing, give or take 3 x 1.60%.
        ((20, 14.5, 15.5), {"pruned": 14.5}),
        ((12, 40, 50), {"original": 12}),
    ],
)
def test_a_network_that_is_hardly_better_than_guessing_is_named(digits, accuracies, expected):
    warnings = find_warnings(_models(*accuracies), LAYERS, digits)
    assert len(warnings) == len(expected)
    for warning, (name, accuracy) in zip(warnings, expected.items()):
        found = f"The {name} network is hardly better than guessing: {accuracy:.2f}% accuracy on 360 test images"
        assert warning.startswith(found) and warning.endswith("the most frequent of the 10 classes alone gives 10.28%")


def test_a_network_that_always_says_the_most_frequent_class_is_hardly_better_than_guessing(digits):
    order = digits.test.labels.argsort(stable=True)
    mostly_zeros = digits.test.select(torch.cat([order[:30].repeat(20), order[-60:]]))
    (warning,) = find_warnings(_models(97, 91, 96), LAYERS, replace(digits, test=mostly_zeros))
    assert warning.startswith("The pruned network") and warning.endswith("gives 90.91%")


def test_layers_with_few_channels_are_named(digits):
    thin = [{"name": "layer4.0.conv1", "channels_before": 512, "channels_after": 56},
            {"name": "layer1.0.conv1", "channels_before": 64, "channels_after": 8}]  # fmt: skip
    assert find_warnings(_models(90, 80, 88), [*LAYERS, *thin], digits) == [
        "Few channels remain in layer4.0.conv1 56 of 512, layer1.0.conv1 8 of 64"
    ]


def test_the_images_are_counted_per_class_and_have_a_checksum(digits, compute, tmp_path):
    scenario = Scenario("TS1", "ResNet18", "Digits", tmp_path)

    def described(images):
        return describe_run(scenario, images, compute, {})["dataset"]

    before = described(digits)
    for part, images in (("train", digits.train), ("test", digits.test)):
        assert before[f"{part}_per_class"] == [int((images.labels == label).sum()) for label in range(10)]
        content = images.pixels.numpy().tobytes() + images.labels.numpy().astype("<i8").tobytes()
        assert before[f"{part}_sha256"] == hashlib.sha256(content).hexdigest()
    assert before["classes"] == [str(number) for number in range(10)]
    other = digits.test.select(torch.arange(len(digits.test)).flip(0))
    after = described(replace(digits, test=other))
    assert after["test_sha256"] != before["test_sha256"], "the order counts"
    assert after["train_sha256"] == before["train_sha256"]


def test_a_run_is_one_with_the_images_it_was_made_from(digits, compute, tmp_path):
    scenario = Scenario("TS1", "ResNet18", "Digits", tmp_path)
    repainted = replace(digits.test, pixels=digits.test.pixels.clone())
    repainted.pixels[7, 0, 3, 3] ^= 1

    def config(images):
        return checkpoint_facts(scenario, images, compute, {"lr": 0.1})["config"]

    assert config(digits) == config(replace(digits)) and config(digits)["lr"] == 0.1
    assert config(digits) != config(replace(digits, test=repainted)), "one pixel"
