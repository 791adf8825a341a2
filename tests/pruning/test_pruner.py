import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.network.activations import record_rows, record_statistics
from cleanai.network.models import load_network, save_network
from cleanai.pruning.criteria import NeuronCoverageImportance, WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import recalibrate


def _prune(network, digits, compute, importance=None, ratio=0.2, macs_ratio="same", steps=2, **options):
    calibration = digits.test.select(torch.arange(64))
    repair_on = digits.repair_sample(256, seed=0)
    importance = importance or NeuronCoverageImportance()
    macs_ratio = ratio if macs_ratio == "same" else macs_ratio
    return prune_to_budget(
        network, importance, calibration, repair_on, compute, ratio, macs_ratio, steps, batch_size=64, **options
    )


@pytest.mark.parametrize(("repair", "expected"), [("full", 0), ("none", 2)])
def test_images_of_the_repair_are_recorded_only_where_no_repair_before_met_them(
    repair, expected, network, digits, compute, monkeypatch
):
    recorded = []

    def record(*args):
        recorded.append(args)
        return record_rows(*args)

    monkeypatch.setattr("cleanai.pruning.pruner.record_rows", record)
    _prune(network, digits, compute, steps=2, repair=repair)
    assert len(recorded) == expected


def _macs(network):
    flop_counter = pytest.importorskip("torch.utils.flop_counter")  # since PyTorch 2.1
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 16, 16))
    return counter.get_total_flops() / 2


def _removed(before, after):
    """Percent of the parameters and of the multiply-accumulates that are gone."""
    return 100 * (1 - _parameters(after) / _parameters(before)), 100 * (1 - _macs(after) / _macs(before))


def _parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("importance", [NeuronCoverageImportance(), WandaImportance()])
def test_a_fifth_of_parameters_and_arithmetic_goes(network, digits, compute, importance, tmp_path):
    original = copy.deepcopy(network)
    pruning, unrepaired = _prune(network, digits, compute, importance)
    removed, macs_removed = _removed(original, network)
    assert abs(removed - 20) <= 0.1
    assert 20 <= macs_removed <= 20.5
    # What is reported is what happened.
    assert pruning["steps"][-1]["parameters_removed_percent"] == pytest.approx(removed)
    assert pruning["steps"][-1]["macs_removed_percent"] == pytest.approx(macs_removed)
    assert [step["parameters_asked_percent"] for step in pruning["steps"]] == [10, 20]
    assert [step["macs_asked_percent"] for step in pruning["steps"]] == [10, 20]
    widths = {layer["name"]: layer["channels_after"] for layer in pruning["layers"]}
    convolutions = {name: len(m.weight) for name, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {name: widths[name] for name in convolutions} == convolutions
    assert all(layer["channels_after"] <= layer["channels_before"] for layer in pruning["layers"])
    assert widths["fc"] == 10
    assert all(width % 8 == 0 for name, width in widths.items() if name != "fc")
    weights = [p for some in (network, unrepaired) for p in some.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)

    facts = {"model": "ResNet18", "classes": list("0123456789"), "config": {}}
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
        fresh = record_statistics(snapshot, digits.test.select(torch.arange(64)), compute)
        for expected, recorded in zip(fresh.values(), statistics.values()):
            torch.testing.assert_close(recorded, expected.mean_absolute)
    assert _parameters(seen[0][0]) > _parameters(seen[1][0])


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
    pruning, unrepaired = _prune(network, digits, compute, ratio=0.3)
    cut = [layer["name"] for layer in pruning["layers"] if layer["channels_after"] < layer["channels_before"]]
    norms = [one.get_submodule(cut[0].replace("conv", "bn")) for one in (original, unrepaired, network)]
    variances = [set(norm.running_var.tolist()) for norm in norms]
    assert variances[1] < variances[0] and not variances[2] <= variances[0]
    assert set(norms[2].weight.tolist()) == set(norms[1].weight.tolist()) <= set(norms[0].weight.tolist())


def test_a_ratio_out_of_reach_is_refused_before_anything_is_touched(network, digits, compute):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    nearest = r"cannot be met in this network: the nearest is \d+\.\d\d% of the parameters and \d+\.\d\d% of the mult"
    with pytest.raises(UserError, match=r"--ratio 0\.999 --macs-ratio 0\.999 " + nearest):
        _prune(network, digits, compute, ratio=0.999)
    with pytest.raises(UserError, match=r"--ratio 0\.05 --macs-ratio 0\.8 " + nearest):
        _prune(network, digits, compute, ratio=0.05, macs_ratio=0.8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("ratio", "macs_ratio"), [(0.3, None), (None, 0.3), (0.15, 0.35)])
def test_the_budgets_are_met_apart_or_alone(network, digits, compute, ratio, macs_ratio):
    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, ratio=ratio, macs_ratio=macs_ratio, steps=1, repair="none")
    for asked, removed, more in zip((ratio, macs_ratio), _removed(original, network), ((-0.1, 0.1), (0, 0.5))):
        assert asked is None or more[0] <= removed - 100 * asked <= more[1]
    assert pruning["steps"][0]["macs_asked_percent"] == (None if macs_ratio is None else 100 * macs_ratio)


@pytest.mark.parametrize("round_to", [1, 16])
def test_widths_are_multiples_of_what_is_asked(network, digits, compute, round_to):
    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, steps=1, round_to=[round_to], repair="none")
    widths = [layer["channels_after"] for layer in pruning["layers"] if layer["name"] != "fc"]
    assert all(width % round_to == 0 for width in widths)
    assert round_to > 1 or any(width % 2 for width in widths)
    assert abs(_removed(original, network)[0] - 20) <= 0.1


def test_steps_leave_a_way_to_the_end(network, digits, compute):
    """The coarser the widths, the fewer of them meet both budgets; a step must not go past all of these."""
    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, ratio=0.2, macs_ratio=0.2, steps=5, round_to=[32], repair="none")
    assert all(layer["channels_after"] % 32 == 0 for layer in pruning["layers"] if layer["name"] != "fc")
    parameters, macs = _removed(original, network)
    assert abs(parameters - 20) <= 0.1 and 20 <= macs <= 20.5


def test_widths_are_multiples_of_the_first_number_that_allows_it(network, digits, compute):
    pruning, _ = _prune(network, digits, compute, steps=1, round_to=[512, 32, 8], repair="none")
    widths = [layer["channels_after"] for layer in pruning["layers"] if layer["name"] != "fc"]
    assert all(width % 32 == 0 for width in widths)


def test_what_stays_takes_over_what_goes(network, digits, compute):
    """The outputs after reconstruction are nearer to what they were, on images that it did not see."""
    # One epoch leaves batch norm behind the weights: bring it up to date, so that pruning alone makes a difference.
    recalibrate(network, digits.repair_sample(512, seed=0), compute, batch_size=64, title="")
    original, networks = copy.deepcopy(network), {}
    for repair in ("none", "bn", "full"):
        networks[repair] = copy.deepcopy(original)
        _, unrepaired = _prune(networks[repair], digits, compute, ratio=0.4, steps=1, repair=repair)
        if repair == "none":
            assert all(map(torch.equal, unrepaired.state_dict().values(), networks["none"].state_dict().values()))
    inputs = next(digits.test.select(torch.arange(100, 300)).batches(200))[0]
    with torch.inference_mode():
        expected = original(inputs)
        errors = {repair: (pruned(inputs) - expected).square().mean() for repair, pruned in networks.items()}
    assert errors["full"] < errors["bn"] < errors["none"]


def test_equal_scores_neither_wipe_nor_skip_a_layer(network, digits, compute):
    class Constant(tp.importance.Importance):
        def __call__(self, group):
            return torch.ones(len(group[0].idxs))

    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, Constant(), ratio=0.5, steps=1, repair="none")
    kept = [layer["channels_after"] / layer["channels_before"] for layer in pruning["layers"][:-1]]
    assert min(kept) >= 0.1
    assert sum(share < 1 for share in kept) > len(kept) / 2
    assert abs(_removed(original, network)[0] - 50) <= 0.1


def test_a_step_can_be_watched(network, digits, compute):
    seen = []

    def watch(step, repaired, unrepaired):
        seen.append((step, _parameters(repaired), _parameters(unrepaired)))

    _prune(network, digits, compute, steps=2, repair="none", after_step=watch)
    assert [step for step, _, _ in seen] == [1, 2]
    assert seen[0][1] == seen[0][2] > seen[1][1] == seen[1][2] == _parameters(network)


def test_no_group_falls_below_a_tenth_of_its_channels(network, digits, compute):
    pruning, _ = _prune(network, digits, compute, ratio=0.9, steps=1, repair="none")
    for layer in pruning["layers"]:
        if layer["name"] != "fc":
            assert layer["channels_after"] >= max(8, layer["channels_before"] // 10)
    assert pruning["steps"][-1]["parameters_removed_percent"] == pytest.approx(90, abs=0.1)


def test_a_network_without_channels_to_remove_is_refused(digits, compute):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 16), torch.nn.Flatten())
    with pytest.raises(UserError, match="Sequential has no channels that can be removed"):
        _prune(network, digits, compute)
    narrow = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16), torch.nn.Conv2d(8, 10, 1), torch.nn.Flatten())
    with pytest.raises(UserError, match=r"cannot be met in this network: the nearest is 0\.00% of the parameters"):
        _prune(narrow, digits, compute)


def test_recalibration_leaves_dropout_asleep(digits, compute):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    images = digits.train.sample(64, seed=0)
    recalibrate(network, images, compute, batch_size=64, title="")
    with torch.inference_mode():
        received = network[1](next(images.batches(64))[0])
    torch.testing.assert_close(network[2].running_var, received.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert network[2].momentum == 0.1


def test_recalibration_makes_batch_norms_fit_their_inputs(network, digits, compute):
    norm, images = network.bn1, digits.train.sample(128, seed=0)
    norm.running_mean.fill_(3)
    recalibrate(network, images, compute, batch_size=32, title="")
    with torch.inference_mode():
        received = network.conv1(next(images.batches(128))[0])
    torch.testing.assert_close(norm.running_mean, received.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not network.training


def test_batch_norm_that_does_not_fit_the_images_does_no_harm(network, digits, compute):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(1e-4)  # as after training on other images: what reaches a layer explodes
    fitting = copy.deepcopy(network)
    images = digits.train.select(torch.arange(64))
    recalibrate(fitting, images, compute, 64, "")
    prune_to_budget(network, WandaImportance(), images, images, compute, 0.1, 0.1, 1, 64, [8])
    inputs = next(images.batches(64))[0]
    with torch.inference_mode():
        outputs, expected = network(inputs), fitting(inputs)
    assert (outputs - expected).square().mean() < 0.2 * expected.var()
