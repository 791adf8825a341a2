import pytest

from cleanai.measure.provenance import find_warnings

LAYERS = [{"name": "conv1", "channels_before": 64, "channels_after": 56}]


def _models(original, pruned, fine_tuned):
    accuracies = {"original": original, "pruned": pruned, "fine_tuned": fine_tuned}
    return {name: {"accuracy_percent": accuracy} for name, accuracy in accuracies.items()}


def test_a_good_result_has_no_warnings(digits):
    assert find_warnings(_models(90.0, 60.0, 88.0), LAYERS, digits) == []


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((90, 17.5, 85), ["The pruned network is at chance level: 17.50% accuracy, and guessing among 10 classes"]),
        ((90, 18.5, 85), []),
        ((90, 5, 11), ["The pruned network is at chance level: 5.00%", "The final network is at chance level: 11.00%"]),
        # 360 test images: guessing is right 10% of the time, give or take 3 x 1.58%.
        ((20, 14.5, 15), ["The pruned network is at chance level: 14.50%"]),
        ((12, 40, 50), ["The original network is at chance level: 12.00%"]),
    ],
)
def test_a_network_at_chance_level_is_named(digits, accuracies, expected):
    warnings = find_warnings(_models(*accuracies), LAYERS, digits)
    assert len(warnings) == len(expected)
    for warning, beginning in zip(warnings, expected):
        assert warning.startswith(beginning)


def test_layers_with_few_channels_are_named(digits):
    thin = [{"name": "layer4.0.conv1", "channels_before": 512, "channels_after": 56},
            {"name": "layer1.0.conv1", "channels_before": 64, "channels_after": 8}]  # fmt: skip
    assert find_warnings(_models(90, 80, 88), [*LAYERS, *thin], digits) == [
        "Few channels remain in layer4.0.conv1 56 of 512, layer1.0.conv1 8 of 64"
    ]
