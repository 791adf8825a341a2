"""Changed predictions, against counts by hand and those of scikit-learn."""

import copy

import pytest
import torch
from sklearn.metrics import confusion_matrix

from cleanai.data.images import ImageSet
from cleanai.measure.churn import MOST_CONFUSIONS, count_changes
from cleanai.network.evaluation import Evaluation, evaluate
from cleanai.network.training import TrainSettings, train
from tests.small_network import SmallNetwork

CLASSES = ["ant", "bee", "cat"]


def test_changes_are_those_of_eight_images_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    images = ImageSet(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), labels, torch.zeros(3), torch.ones(3))
    old, new = torch.tensor([0, 0, 1, 1, 0, 2, 0, 2]), torch.tensor([0, 1, 1, 1, 1, 0, 1, 1])
    before, after = (Evaluation(0.0, 0.0, given == labels, given.int()) for given in (old, new))
    changes = count_changes(before, after, images, torch.arange(7), CLASSES)  # the last image is not held out
    assert changes == {
        "images": 7, "changed": 4, "changed_percent": pytest.approx(400 / 7),
        "right_to_wrong": 2, "wrong_to_right": 1, "wrong_to_other_wrong": 1,
        "confusions": [
            {"class": "ant", "predicted": "bee", "before": 1, "after": 2},
            {"class": "cat", "predicted": "bee", "before": 0, "after": 1},
        ],
    }  # fmt: skip


def test_confusions_of_trained_networks_are_those_of_scikit_learn(digits, compute):
    torch.manual_seed(0)
    network = SmallNetwork(10)
    train(network, digits, compute, TrainSettings(epochs=2, batch_size=32, lr=0.01))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.classifier.bias[[3, 5]] -= 4
    heldout = torch.arange(50, 360)
    evaluations = [evaluate(each, digits.test, compute) for each in (network, other)]
    changes = count_changes(*evaluations, digits.test, heldout, digits.classes)
    labels = digits.test.labels[heldout]
    before, after = (confusion_matrix(labels, each.predicted[heldout], labels=range(10)) for each in evaluations)
    growth = after - before
    growth[range(10), range(10)] = 0
    grown = sorted(growth[growth > 0].tolist(), reverse=True)
    assert [row["after"] - row["before"] for row in changes["confusions"]] == grown[:MOST_CONFUSIONS]
    assert grown
    for row in changes["confusions"]:
        place = digits.classes.index(row["class"]), digits.classes.index(row["predicted"])
        assert (row["before"], row["after"]) == (before[place], after[place])
    lost, won = changes["right_to_wrong"], changes["wrong_to_right"]
    assert won - lost == after.trace() - before.trace() and lost > 0
    assert changes["changed"] == lost + won + changes["wrong_to_other_wrong"]
