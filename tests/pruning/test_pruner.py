import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.measure.provenance import checkpoint_facts
from cleanai.network.activations import record_statistics
from cleanai.network.models import load_network, save_network
from cleanai.pruning.criteria import NeuronCoverageImportance, WandaImportance
from cleanai.pruning.layers import layer_widths
from cleanai.pruning.planning import BudgetMissed
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import recalibrate
from cleanai.pruning.rows import record_rows
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.scenario import Scenario
from tests.helpers import parameter_count, random_images, torch_macs
from tests.small_network import SmallNetwork


def _prune(network, digits, compute, importance=None, ratio=0.2, macs_ratio="same", steps=2, **options):
    """Prune by the same share of both costs, if no other is given. Further options are settings."""
    images = PruneImages(digits.test.select(torch.arange(64)), digits.repair_sample(128, seed=0))
    macs_ratio = ratio if macs_ratio == "same" else macs_ratio
    after_step = options.pop("after_step", None)
    settings = PruneSettings(ratio, macs_ratio, steps, batch_size=64, **options)
    return prune_to_budget(network, importance or NeuronCoverageImportance(), images, compute, settings, after_step)


def _removed(before, after):
    """Percent of the parameters and of the multiply-accumulates that were removed."""
    return tuple(100 * (1 - count(after) / count(before)) for count in (parameter_count, _macs))


def _macs(network):
    return torch_macs(network, 16)


def _widths(pruning):
    """The widths in a report, except the network's outputs."""
    return [layer["channels_after"] for layer in pruning["layers"] if layer["name"] != "fc"]


def _recording_calls(patch):
    """The calls of `record_rows` by the pruner from now on."""
    calls = []

    def record(*args):
        calls.append(args)
        return record_rows(*args)

    patch.setattr("cleanai.pruning.steps.record_rows", record)
    return calls


@pytest.fixture(scope="module", params=[NeuronCoverageImportance, WandaImportance])
def pruned(request, trained_network, trained_thin_network, digits, compute):
    """A network pruned by a fifth in two steps, with a full repair, and a record of the work."""
    whole = request.param is NeuronCoverageImportance
    original, round_to = (trained_network, 8) if whole else (trained_thin_network, 2)
    network = copy.deepcopy(original)
    scored, measured = [], []

    class Importance(request.param):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "statistics":
                scored.append((copy.deepcopy(network), value))

    def after_step(step, repaired, unrepaired):
        measured.append((step, parameter_count(repaired), parameter_count(unrepaired)))

    with pytest.MonkeyPatch.context() as patch:
        recorded = _recording_calls(patch)
        report, unrepaired = _prune(network, digits, compute, Importance(), round_to=[round_to], after_step=after_step)
    return SimpleNamespace(
        original=original, network=network, unrepaired=unrepaired, report=report, round_to=round_to,
        moments=request.param().moments, scored=scored, measured=measured, recorded=recorded,
    )  # fmt: skip


def test_a_fifth_of_parameters_and_arithmetic_is_removed(pruned):
    removed, macs_removed = _removed(pruned.original, pruned.network)
    assert abs(removed - 20) <= 0.1
    assert 20 <= macs_removed <= 20.5
    # The report says the same.
    steps, layers = pruned.report["steps"], pruned.report["layers"]
    assert steps[-1]["parameters_removed_percent"] == pytest.approx(removed)
    assert steps[-1]["macs_removed_percent"] == pytest.approx(macs_removed)
    assert [step["parameters_asked_percent"] for step in steps] == [10, 20]
    assert [step["macs_asked_percent"] for step in steps] == [10, 20]
    widths = {layer["name"]: layer["channels_after"] for layer in layers}
    convolutions = {name: len(m.weight) for name, m in pruned.network.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name: widths[name] for name in convolutions} == convolutions
    assert all(layer["channels_after"] <= layer["channels_before"] for layer in layers)
    assert widths["fc"] == 10
    assert all(width % pruned.round_to == 0 for width in _widths(pruned.report))


def test_a_pruned_network_is_saved_and_loaded(pruned, digits, compute, tmp_path):
    weights = [p for each in (pruned.network, pruned.unrepaired) for p in each.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    facts = checkpoint_facts(Scenario("TS1", "ResNet18", "Digits", tmp_path), digits, compute, {})
    save_network(tmp_path / "pruned.pth", pruned.network, facts)
    loaded = load_network(tmp_path / "pruned.pth")
    inputs = next(digits.test.batches(8))[0]
    with torch.inference_mode():
        assert torch.equal(loaded(inputs), pruned.network(inputs))


def test_scores_are_those_of_the_network_at_each_step(pruned, digits, compute):
    assert len(pruned.scored) == 2
    for snapshot, statistics in pruned.scored:
        images = digits.test.select(torch.arange(64))
        expected = record_statistics(snapshot, images, compute, moments=pruned.moments)
        assert len(statistics) == len(expected) == 21
        for of_snapshot, recorded in zip(expected.values(), statistics.values()):
            for name in pruned.moments:
                torch.testing.assert_close(getattr(recorded, name), getattr(of_snapshot, name))
    assert parameter_count(pruned.scored[0][0]) > parameter_count(pruned.scored[1][0])


def test_after_each_step_both_networks_can_be_measured(pruned):
    (first, *repaired_first), (second, *repaired_second) = pruned.measured
    assert (first, second) == (1, 2)
    assert repaired_first[0] == repaired_first[1] > repaired_second[0]
    assert repaired_second[0] == repaired_second[1] == parameter_count(pruned.network)


def test_whether_networks_are_measured_after_steps_does_not_change_the_last_one(thin_network, digits, compute):
    unmeasured = copy.deepcopy(thin_network)
    _prune(unmeasured, digits, compute, round_to=[4])
    _prune(thin_network, digits, compute, round_to=[4], after_step=lambda *_: None)
    assert all(map(torch.equal, thin_network.state_dict().values(), unmeasured.state_dict().values()))


def test_the_unrepaired_copy_holds_the_original_weights(pruned):
    cut = [layer["name"] for layer in pruned.report["layers"] if layer["channels_after"] < layer["channels_before"]]
    networks = (pruned.original, pruned.unrepaired, pruned.network)
    norms = [network.get_submodule(cut[0].replace("conv", "bn")) for network in networks]
    variances = [set(norm.running_var.tolist()) for norm in norms]
    assert variances[1] < variances[0] and not variances[2] <= variances[0]
    assert set(norms[2].weight.tolist()) == set(norms[1].weight.tolist()) <= set(norms[0].weight.tolist())


def test_a_full_repair_returns_the_rows_that_the_next_step_starts_from(pruned):
    assert not pruned.recorded


def test_without_repair_each_step_records_its_rows(thin_network, digits, compute, monkeypatch):
    recorded = _recording_calls(monkeypatch)
    _prune(thin_network, digits, compute, steps=2, repair="none")
    assert len(recorded) == 2


def test_dead_channels_are_removed_first_and_the_outputs_do_not_change(thin_network, digits, compute):
    network = thin_network
    # A quarter of the channels inside four blocks is always zero: enough for both budgets.
    for block in (network.layer1[0], network.layer1[1], network.layer3[1], network.layer4[1]):
        dead = torch.randperm(block.bn1.num_features)[: block.bn1.num_features // 4]
        block.bn1.weight.data[dead], block.bn1.bias.data[dead] = 0, -1
    original = copy.deepcopy(network)
    _, unrepaired = _prune(network, digits, compute, ratio=0.02, steps=1, round_to=[1])
    assert parameter_count(unrepaired) == parameter_count(network) < parameter_count(original)
    inputs = next(digits.test.batches(32))[0]
    with torch.inference_mode():
        torch.testing.assert_close(unrepaired(inputs), original(inputs), rtol=1e-3, atol=1e-3)


def test_a_ratio_out_of_reach_is_refused_before_any_change(network, digits, compute):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for ratio, macs_ratio in ((0.999, 0.999), (0.05, 0.8)):
        with pytest.raises(BudgetMissed, match=rf"ratio {ratio} and macs_ratio {macs_ratio} ") as error:
            _prune(network, digits, compute, ratio=ratio, macs_ratio=macs_ratio, round_to=[16])
        nearest = r"\d+\.\d\d% of the parameters and \d+\.\d\d% of the multiply-accumulates"
        assert re.fullmatch(nearest, error.value.nearest)
        assert error.value.nearest in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("ratio", "macs_ratio"), [(0.3, None), (None, 0.3), (0.15, 0.35)])
def test_different_budgets_and_single_ones_are_met(network, digits, compute, ratio, macs_ratio):
    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, ratio=ratio, macs_ratio=macs_ratio, steps=1, repair="none")
    tolerances = ((-0.1, 0.1), (0, 0.5))
    for requested, removed, (low, high) in zip((ratio, macs_ratio), _removed(original, network), tolerances):
        assert requested is None or low <= removed - 100 * requested <= high
    assert pruning["steps"][0]["macs_asked_percent"] == (None if macs_ratio is None else 100 * macs_ratio)


@pytest.mark.parametrize("round_to", [1, 16])
def test_widths_are_multiples_of_the_requested_number(network, digits, compute, round_to):
    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, steps=1, round_to=[round_to], repair="none")
    assert all(width % round_to == 0 for width in _widths(pruning))
    assert round_to > 1 or any(width % 2 for width in _widths(pruning))
    assert abs(_removed(original, network)[0] - 20) <= 0.1


def test_steps_keep_the_goal_in_reach(thin_network, digits, compute):
    """With coarse widths few choices meet both budgets; no step may go beyond all of them."""
    original = copy.deepcopy(thin_network)
    pruning, _ = _prune(thin_network, digits, compute, ratio=0.2, macs_ratio=0.2, steps=5, round_to=[8], repair="none")
    assert all(width % 8 == 0 for width in _widths(pruning))
    parameters, macs = _removed(original, thin_network)
    assert abs(parameters - 20) <= 0.1 and 20 <= macs <= 20.5


def test_widths_are_multiples_of_the_first_number_that_can_meet_the_budget(thin_network, digits, compute):
    pruning, _ = _prune(thin_network, digits, compute, steps=1, round_to=[128, 8, 2], repair="none")
    assert all(width % 8 == 0 for width in _widths(pruning))


def test_each_part_of_the_repair_reduces_the_error(thin_network, digits, compute):
    """The error of the outputs, on images that were not used for the repair."""
    # After two epochs of training batch norm does not fit the weights yet: only pruning must make a difference.
    network = thin_network
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


def test_with_equal_scores_no_layer_is_emptied_or_skipped(network, digits, compute):
    class Constant(tp.importance.Importance):
        def __call__(self, group):
            return torch.ones(len(group[0].idxs))

    original = copy.deepcopy(network)
    pruning, _ = _prune(network, digits, compute, Constant(), ratio=0.5, steps=1, repair="none")
    kept = [layer["channels_after"] / layer["channels_before"] for layer in pruning["layers"][:-1]]
    assert min(kept) >= 0.1
    assert sum(share < 1 for share in kept) > len(kept) / 2
    assert abs(_removed(original, network)[0] - 50) <= 0.1


def test_every_group_keeps_a_tenth_of_its_channels(network, digits, compute):
    pruning, _ = _prune(network, digits, compute, ratio=0.9, steps=1, repair="none")
    for layer in pruning["layers"]:
        if layer["name"] != "fc":
            assert layer["channels_after"] >= max(8, layer["channels_before"] / 10)
    assert pruning["steps"][-1]["parameters_removed_percent"] == pytest.approx(90, abs=0.1)


def test_a_group_may_come_down_to_one_channel_before_the_last_step(digits, compute):
    layers = nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*layers)
    report, _ = _prune(network, digits, compute, ratio=None, macs_ratio=0.5, steps=3, round_to=[1])
    assert [layer["channels_after"] for layer in report["layers"]] == [1, 16]


def test_a_convolution_with_groups_does_not_become_a_depthwise_one(digits, compute):
    layers = nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 16, 3)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    options = {"macs_ratio": None, "steps": [0.7, 0.9, 1], "round_to": [1]}
    with pytest.raises(BudgetMissed, match=r"nearest is 54\.57% of the parameters"):
        _prune(network, digits, compute, ratio=0.7, **options)
    report, _ = _prune(network, digits, compute, ratio=0.5457, **options)
    assert [layer["channels_after"] for layer in report["layers"]] == [8, 8, 16]


def test_fourteen_channels_keep_two(digits, compute):
    network = nn.Sequential(nn.Conv2d(3, 14, 1), nn.ReLU(), nn.Conv2d(14, 10, 16), nn.Flatten())
    with pytest.raises(BudgetMissed, match=r"nearest is 85\.\d\d% of the parameters"):
        _prune(network, digits, compute, ratio=0.95, macs_ratio=None, steps=1, round_to=[1])


def test_an_importance_without_scores_is_refused(digits, compute):
    network = nn.Sequential(nn.Conv2d(3, 14, 1), nn.ReLU(), nn.Conv2d(14, 10, 16), nn.Flatten())
    with pytest.raises(UserError, match="BNScaleImportance gives no scores for the channels of 0: "):
        _prune(network, digits, compute, tp.importance.BNScaleImportance(), ratio=0.2856, macs_ratio=None)


def test_a_network_without_channels_to_remove_is_refused(digits, compute):
    network = nn.Sequential(nn.Conv2d(3, 10, 16), nn.Flatten())
    with pytest.raises(UserError, match="no channels that can be removed; they reach its outputs"):
        _prune(network, digits, compute)
    narrow = nn.Sequential(nn.Conv2d(3, 8, 16), nn.Conv2d(8, 10, 1), nn.Flatten())
    with pytest.raises(BudgetMissed, match=r"cannot be met in this network: the nearest is 0\.00% of the parameters"):
        _prune(narrow, digits, compute, round_to=[32, 16, 8])


def test_batch_norm_that_does_not_fit_the_images_does_no_harm(thin_network, digits, compute):
    network = thin_network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(1e-4)  # as after training on other images: the values grow from layer to layer
    recalibrated = copy.deepcopy(network)
    images = digits.train.select(torch.arange(64))
    recalibrate(recalibrated, images, compute, 64, "")
    settings = PruneSettings(0.1, 0.1, steps=1, batch_size=64, round_to=[2])
    prune_to_budget(network, WandaImportance(), PruneImages(images, images), compute, settings)
    inputs = next(images.batches(64))[0]
    with torch.inference_mode():
        outputs, expected = network(inputs), recalibrated(inputs)
    assert (outputs - expected).square().mean() < 0.2 * expected.var()


def test_layers_that_are_to_be_kept_keep_their_channels_with_those_that_share_them(digits, compute):
    torch.manual_seed(0)
    network = SmallNetwork(10)
    before = layer_widths(network)
    # stem.0 and second.0 are added, so they lose the same channels.
    report, _ = _prune(network, digits, compute, WandaImportance(), 0.3, None, keep_layers=["sec*"], round_to=[1])
    widths = layer_widths(network)
    assert [name for name in widths if widths[name] < before[name]] == ["first.0", "last.0"]
    assert report["steps"][-1]["parameters_removed_percent"] == pytest.approx(30, abs=0.5)
    names = "the layers are stem.0, first.0, second.0, last.0, classifier"
    with pytest.raises(UserError, match=rf"^No layer matches 'sec', which is to be kept; {names}$"):
        _prune(SmallNetwork(10), digits, compute, keep_layers=["first.0", "sec"])


def test_the_sensitivity_of_a_layer_is_what_its_reader_loses(compute):
    # Channels 0 to 3 of ten are always zero, and 4 to 7 are the same: one of these is enough for the reader.
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 10, 1, bias=False), nn.ReLU(), nn.Conv2d(10, 6, 1), nn.Flatten(), nn.Linear(384, 3)
    )
    with torch.no_grad():
        network[0].weight.abs_()[:4] = 0
        network[0].weight[4:8] = network[0].weight[4]
        network[2].weight[:, 8:] *= 3  # these two have the highest scores
    images = random_images(32)
    settings = PruneSettings(0.32, None, 1, [1], "none", nearest=True)
    report, _ = prune_to_budget(network, WandaImportance(), PruneImages(images, images), compute, settings)
    first = report["sensitivity"][0]
    assert (first["layers"], first["readers"], first["channels"]) == (["0"], ["2"], 10)
    assert first["lost_percent"][:7] == pytest.approx([0.0] * 7, abs=0.01)
    assert 0.01 < first["lost_percent"][7] < first["lost_percent"][8]
