import pytest
import torch
from torch import nn

from cleanai.measure.costs import compare, count_macs, count_parameters, size_mib
from cleanai.network.evaluation import Evaluation
from cleanai.network.models import resnet18_for_small_images


def test_costs_of_the_unpruned_network():
    network = resnet18_for_small_images(10)
    names = list(network.state_dict())
    assert count_parameters(network) == {"parameters": 11_173_962, "trainable_parameters": 11_173_962}
    macs = count_macs(network, torch.zeros(1, 3, 32, 32))
    assert 555_422_720 <= macs < 1.01 * 555_422_720  # thop adds batch norm to convolutions and the classifier
    assert f"{macs / 1e9:.2f}" == "0.56"
    assert size_mib(network) == pytest.approx(42.7, abs=0.05)
    assert list(network.state_dict()) == names, "thop's buffers stay out of the network"


def test_convolutions_and_the_classifier_are_counted_exactly():
    network = resnet18_for_small_images(10)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    average_pool = 512 * (4 * 4 + 1)  # thop counts each position, and the division
    assert count_macs(network, torch.zeros(1, 3, 32, 32)) == 555_422_720 + average_pool


def test_frozen_parameters_are_not_trainable():
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == {"parameters": 15, "trainable_parameters": 12}


def test_the_summary_is_made_of_what_was_measured(digits, compute):
    networks = {
        "original": nn.Sequential(nn.Flatten(), nn.Linear(768, 100), nn.Linear(100, 10)),
        "pruned": nn.Sequential(nn.Flatten(), nn.Linear(768, 50), nn.Linear(50, 10)),
        "fine_tuned": nn.Sequential(nn.Flatten(), nn.Linear(768, 50), nn.Linear(50, 10)),
    }
    correct = {name: torch.zeros(360, dtype=torch.bool) for name in networks}
    for name, hits in (("original", 180), ("pruned", 90), ("fine_tuned", 170)):
        correct[name][:hits] = True
    evaluations = {name: Evaluation(100 * hits.float().mean().item(), 0.5, hits) for name, hits in correct.items()}
    result = compare(networks, evaluations, torch.arange(100, 360), digits.test, compute)
    models, summary = result["models"], result["summary"]
    assert models["original"]["accuracy_heldout_percent"] == pytest.approx(100 * 80 / 260)
    assert models["pruned"]["accuracy_heldout_percent"] == 0
    assert models["original"]["macs"] == 768 * 100 + 1000
    assert summary["macs_reduction_percent"] == pytest.approx(50)
    assert summary["parameter_reduction_percent"] == pytest.approx(100 * (1 - (768 * 50 + 560) / (768 * 100 + 1110)))
    assert summary["accuracy_recovery_points"] == pytest.approx(100 * 80 / 360, abs=1e-4)
    assert summary["final_accuracy_drop_points"] == pytest.approx(-100 * 10 / 360, abs=1e-4)
    speeds = [models[name]["latency_ms"]["mean"] for name in ("original", "fine_tuned")]
    assert summary["speedup"] == pytest.approx(speeds[0] / speeds[1])
