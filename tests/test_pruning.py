import copy

import pytest
import torch

from cleanai import UserError
from cleanai.activations import record_statistics
from cleanai.importance import NeuronCoverageImportance, WandaImportance
from cleanai.models import load_network, save_network
from cleanai.pruning import prune_to_budget, recalibrate


def _prune(network, digits, compute, importance=None, ratio=0.2, steps=2):
    calibration = digits.test.select(torch.arange(64))
    repair_on = digits.train.sample(64, seed=0)
    importance = importance or NeuronCoverageImportance()
    return prune_to_budget(network, importance, calibration, repair_on, compute, ratio, steps, batch_size=64)


def _parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("importance", [NeuronCoverageImportance(), WandaImportance()])
def test_a_fifth_of_parameters_and_arithmetic_goes(network, digits, compute, importance, tmp_path):
    flop_counter = pytest.importorskip("torch.utils.flop_counter")  # since PyTorch 2.1

    def flops(some):
        with flop_counter.FlopCounterMode(display=False) as counter:
            some(torch.zeros(1, 3, 16, 16))
        return counter.get_total_flops()

    original = copy.deepcopy(network)
    pruning, unrepaired = _prune(network, digits, compute, importance)
    removed = 100 * (1 - _parameters(network) / _parameters(original))
    macs_removed = 100 * (1 - flops(network) / flops(original))
    assert abs(removed - 20) <= 0.5
    assert 19.5 <= macs_removed <= 21
    # What is reported is what happened.
    assert pruning["steps"][-1]["parameters_removed_percent"] == pytest.approx(removed)
    assert pruning["steps"][-1]["macs_removed_percent"] == pytest.approx(macs_removed)
    assert [step["asked_percent"] for step in pruning["steps"]] == [10, 20]
    widths = {layer["name"]: layer["channels_after"] for layer in pruning["layers"]}
    assert widths["layer4.1.conv1"] == network.layer4[1].conv1.weight.shape[0] < 512
    assert widths["fc"] == 10
    assert all(width % 8 == 0 for name, width in widths.items() if name != "fc")
    weights = [p for some in (network, unrepaired) for p in some.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)

    facts = {"classes": list("0123456789"), "config": {}}
    save_network(tmp_path / "pruned.pth", network, facts)
    reloaded = load_network(tmp_path / "pruned.pth")
    inputs = next(digits.test.batches(8))[0]
    with torch.inference_mode():
        assert torch.equal(reloaded(inputs), network(inputs))


def test_scores_are_those_of_the_network_at_each_step(network, digits, compute):
    seen = []

    class Watching(NeuronCoverageImportance):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "statistics":
                seen.append((copy.deepcopy(network), {m: s.mean_absolute for m, s in value.items()}))

    _prune(network, digits, compute, Watching(), ratio=0.3, steps=2)
    assert len(seen) == 2
    for snapshot, statistics in seen:
        fresh = record_statistics(snapshot, digits.test.select(torch.arange(64)), compute, batch_size=64)
        for expected, recorded in zip(fresh.values(), statistics.values()):
            torch.testing.assert_close(recorded, expected.mean_absolute)
    assert seen[0][0].layer4[1].conv1.out_channels > seen[1][0].layer4[1].conv1.out_channels


def test_dead_channels_go_first_and_the_outputs_do_not_move(network, digits, compute):
    # A quarter of the channels inside four blocks never speak: enough for both budgets.
    for block in (network.layer1[0], network.layer1[1], network.layer3[1], network.layer4[1]):
        dead = torch.randperm(block.bn1.num_features)[: block.bn1.num_features // 4]
        block.bn1.weight.data[dead], block.bn1.bias.data[dead] = 0, -1
    original = copy.deepcopy(network)
    _, unrepaired = _prune(network, digits, compute, ratio=0.02, steps=1)
    assert _parameters(unrepaired) == _parameters(network) < _parameters(original)
    inputs = next(digits.test.batches(32))[0]
    with torch.inference_mode():
        torch.testing.assert_close(unrepaired(inputs), original(inputs), rtol=1e-3, atol=1e-3)


def test_the_unrepaired_copy_holds_the_original_weights(network, digits, compute):
    original = copy.deepcopy(network)
    _, unrepaired = _prune(network, digits, compute, ratio=0.3)
    kept = set(unrepaired.layer4[1].bn1.running_var.tolist())
    assert kept < set(original.layer4[1].bn1.running_var.tolist())
    assert not set(network.layer4[1].bn1.running_var.tolist()) <= set(original.layer4[1].bn1.running_var.tolist())
    assert set(network.layer4[1].bn1.weight.tolist()) < set(original.layer4[1].bn1.weight.tolist())


def test_a_ratio_out_of_reach_is_refused_before_anything_is_touched(network, digits, compute):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"--ratio 0\.999 is more than can be removed from this network: at most 0\.9"):
        _prune(network, digits, compute, ratio=0.999)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_no_group_falls_below_a_tenth_of_its_channels(network, digits, compute):
    pruning, _ = _prune(network, digits, compute, ratio=0.9, steps=1)
    for layer in pruning["layers"]:
        if layer["name"] != "fc":
            assert layer["channels_after"] >= max(8, layer["channels_before"] // 10)
    assert pruning["steps"][-1]["parameters_removed_percent"] == pytest.approx(90, abs=0.5)


def test_recalibration_makes_batch_norms_fit_their_inputs(network, digits, compute):
    norm, images = network.bn1, digits.train.sample(128, seed=0)
    norm.running_mean.fill_(3)
    recalibrate(network, images, compute, batch_size=32, title="")
    with torch.inference_mode():
        received = network.conv1(next(images.batches(128))[0])
    torch.testing.assert_close(norm.running_mean, received.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not network.training
