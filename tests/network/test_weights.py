"""The weights that a network starts from: every form of file, and what is refused."""

import copy
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torchvision.models import googlenet, mobilenet_v2, resnet18, resnet34

from cleanai import UserError
from cleanai.network.models import build, save_network
from cleanai.network.weights import load_weights
from cleanai.run import open_run
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.scenario import Scenario
from tests.helpers import SCRIPTS, SMALL_MODEL, fails, own_scripts, prepare, prune, run
from tests.small_network import SmallNetwork


@pytest.fixture(scope="module")
def published():
    """The state dict of a ResNet-18 for ImageNet."""
    torch.manual_seed(7)
    return resnet18(weights=None).state_dict()


@pytest.fixture
def trained(published):
    """A network like ours, for 10 classes, with other weights."""
    torch.manual_seed(8)
    network = build("ResNet18", 10)
    network.bn1.running_mean.fill_(0.5)
    return network


def _saved(content, path):
    torch.save(content, path)
    return path


def test_of_a_7x7_stem_the_centre_is_used_and_another_classifier_is_not_loaded(tmp_path, published):
    network = build("ResNet18", 10)
    classifier = network.fc.weight.clone()
    assert load_weights(network, _saved(published, tmp_path / "w.pth"), "ResNet18") is False
    assert torch.equal(network.conv1.weight, published["conv1.weight"][:, :, 2:5, 2:5])
    assert torch.equal(network.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])
    assert torch.equal(network.fc.weight, classifier)
    without = {name: tensor for name, tensor in published.items() if not name.startswith("fc.")}
    assert load_weights(network, _saved(without, tmp_path / "w.pth"), "ResNet18") is False


FORMS = {
    "plain.pth": lambda state, path: torch.save(state, path),
    "old.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "wrapped.th": lambda state, path: torch.save({"best_prec1": 93.4, "state_dict": state}, path),
    "published.pt": lambda state, path: torch.save({"epoch": 3, "model_state_dict": state}, path),
    "model.pt": lambda state, path: torch.save({"model": state, "epoch": 3}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{name}": t for name, t in state.items()}, path),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.module.{name}": t for name, t in state.items()}, path),
    "uncounted.pth": lambda state, path: torch.save(
        {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}, path
    ),
    "half.pth": lambda state, path: torch.save(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path
    ),
    "weights.safetensors": lambda state, path: save_file(state, path),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_file_is_loaded(form, trained, tmp_path):
    FORMS[form](trained.state_dict(), tmp_path / form)
    network = build("ResNet18", 10)
    assert load_weights(network, tmp_path / form, "ResNet18") is True
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if form == "half.pth" else {"rtol": 0, "atol": 0}
    for name, tensor in trained.state_dict().items():
        assert network.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(network.state_dict()[name], tensor, **tolerance)


def test_one_of_our_checkpoints_is_loaded(trained, tmp_path):
    save_network(tmp_path / "c.pth", trained, {"model": "ResNet18", "classes": ["a"], "config": {"state_dict": 1}})
    network = build("ResNet18", 10)
    assert load_weights(network, tmp_path / "c.pth", "ResNet18") is True
    assert torch.equal(network.fc.weight, trained.fc.weight)


def test_another_network_loads_all_weights_except_another_classifier(tmp_path):
    torch.manual_seed(3)
    expected = mobilenet_v2().state_dict()
    network = build("MobileNetV2", 3)
    assert load_weights(network, _saved(expected, tmp_path / "w.pth"), "MobileNetV2") is False
    loaded = network.state_dict()
    same = [name for name in loaded if loaded[name].shape == expected[name].shape]
    assert set(loaded) - set(same) == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(loaded[name], expected[name]) for name in same)


def test_a_mask_holds_infinities_where_the_network_has_them(tmp_path):
    def masked(above):
        network = SmallNetwork(10)
        network.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(above))
        torch.save(network.state_dict(), tmp_path / f"{above}.pth")
        return network

    network, _ = masked(1), masked(0)
    assert load_weights(network, tmp_path / "1.pth", "Masked")
    with pytest.raises(UserError, match="mask holds numbers that are not finite"):
        load_weights(network, tmp_path / "0.pth", "Masked")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_part_of_a_network_may_be_called_module(prefix, tmp_path):
    def made():
        network = nn.Module()
        network.module, network.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        return network

    one, other = made(), made()
    for network in one, other:
        network.module.last = nn.Linear(2, 2)
    torch.save({f"{prefix}{name}": tensor for name, tensor in one.state_dict().items()}, tmp_path / "w.pth")
    assert load_weights(other, tmp_path / "w.pth", "Net")
    assert torch.equal(other.module.weight, one.module.weight)


def test_a_weight_that_layers_share_is_in_the_file_once(tmp_path):
    def tied():
        network = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 4)
        )
        network[2].weight = network[1].weight
        return network

    one, other = tied(), tied()
    save_model(one, tmp_path / "tied.safetensors")
    assert load_weights(other, tmp_path / "tied.safetensors", "Tied")
    assert torch.equal(other[1].weight, one[1].weight) and other[2].weight is other[1].weight


def test_extra_classifiers_for_training_are_not_loaded(tmp_path):
    expected = googlenet(init_weights=False).state_dict()  # as published, with two of them
    network = build("GoogLeNet", 1000)
    assert load_weights(network, _saved(expected, tmp_path / "w.pth"), "GoogLeNet") is True
    assert torch.equal(network.inception5b.branch1.conv.weight, expected["inception5b.branch1.conv.weight"])


class _Other(torch.nn.Module):
    pass


def _with(name, tensor):
    return lambda state: {**state, name: tensor}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_with("bn1.weight", torch.zeros(32)), r"bn1\.weight is 32 in it, and 64 in the network"),
        (_with("conv1.weight", torch.zeros(64, 3, 4, 4)), r"conv1\.weight is 64x3x4x4"),
        (_with("layer1.0.bn1.bias", torch.full((64,), float("nan"))), r"layer1\.0\.bn1\.bias holds numbers that are"),
        (lambda state: {k: v for k, v in state.items() if k != "bn1.bias"}, r"bn1\.bias is missing in it"),
        (lambda state: resnet34().state_dict(), r"the network has no layer1\.2\.conv1\.weight"),
        (lambda state: {}, "holds no state dict"),
        (lambda state: [state], "holds no state dict"),
        (lambda state: {"state_dict": {}, "epoch": 3}, "holds no state dict"),
        (lambda state: {"net": state}, r"holds no state dict \(net is no tensor\)"),
        (lambda state: {"model": {**state, "epoch": 3}}, r"holds no state dict \(epoch is no tensor\)"),
        (lambda state: _Other(), "it holds a whole network or other Python objects, which are not loaded"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_nothing_is_changed(change, expected, trained, tmp_path):
    network = build("ResNet18", 10)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=expected) as error:
        load_weights(network, _saved(change(trained.state_dict()), tmp_path / "w.pth"), "ResNet18")
    assert "\n" not in str(error.value)
    assert "w.pth" in str(error.value)
    assert "delete" not in str(error.value)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_weights_are_refused(name, trained, tmp_path):
    FORMS["weights.safetensors" if name.endswith("s") else "plain.pth"](trained.state_dict(), tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    for damaged in (content[:-1000], b"", b"weights", b'{"epochs": 3}'):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name) as error:
            load_weights(trained, tmp_path / name, "ResNet18")
        assert "weights_only" not in str(error.value), "PyTorch's advice is for others"
    if name == "w.pth":  # an archive has checksums
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_weights(trained, tmp_path / name, "ResNet18")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder in which script 1 has trained a network, and copies of the scripts for that network."""
    folder = tmp_path_factory.mktemp("prepared")
    scripts = own_scripts(folder, MODEL=SMALL_MODEL)
    result = prepare(folder, "--dataset", "Digits", "--epochs", "1", script=scripts[SCRIPTS[0]])
    assert result.returncode == 0, result.stderr
    return folder / "TS1", scripts


def test_a_trained_network_is_pruned_without_more_training_and_its_file_is_named(prepared, tmp_path):
    folder, scripts = prepared
    weights = folder / "SmallNetwork_Digits_FT_final.pth"
    options = [tmp_path, "--dataset", "Digits", "--epochs", "0", "--weights"]
    untrained = prepare(*options, weights, script=scripts[SCRIPTS[0]])
    assert untrained.returncode == 0, untrained.stderr
    first, own = (read_record(each / "TS1_SmallNetwork_Digits.json") for each in (folder, tmp_path / "TS1"))
    assert own["models"]["after"] == own["models"]["before"] == first["models"]["after"]
    assert own["config"]["weights"] == weights.name
    pruned = prune(scripts[SCRIPTS[2]], tmp_path, "--dataset", "Digits", "--epochs", "1")
    assert pruned.returncode == 0, pruned.stderr
    digest = own["config"]["weights_sha256"]
    assert f"Original network: from {weights.name} ({digest[:8]}…), taken as it is" in pruned.stdout

    # Another file of the same name.
    other = tmp_path / "other" / weights.name
    other.parent.mkdir()
    save_network(other, SmallNetwork(10), {})
    again = prepare(*options, other, script=scripts[SCRIPTS[0]])
    fails(again, f"another file called {weights.name}")


@pytest.mark.parametrize(
    ("weights", "expected"), [("missing.pth", "neither imagenet, none, nor a file"), ("other.pth", "conv1.weight")]
)
def test_weights_are_checked_before_any_work(weights, expected, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    out = tmp_path / "out"
    result = run(SCRIPTS[0], "--dataset", "Digits", "--weights", tmp_path / weights, "--checkpoints-dir", out)
    fails(result, weights, expected)
    assert not out.exists()


def test_weights_are_read_before_the_images(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    for model, weights, expected in (
        ("ResNet18", tmp_path / "w.pth", "w.pth"),
        (SMALL_MODEL, "imagenet", "no ImageNet"),
    ):
        with pytest.raises(UserError, match=expected):
            open_run(Scenario("TS1", model, "CIFAR10", tmp_path), Namespace(weights=weights))


def test_with_0_epochs_the_weights_must_include_a_classifier(tmp_path, published):
    _saved(published, tmp_path / "w.pth")
    options = ["--dataset", "Digits", "--epochs", "0", "--checkpoints-dir", tmp_path / "out"]
    fails(run(SCRIPTS[0], *options, "--weights", tmp_path / "w.pth"), "w.pth", "--epochs 1", "classifier")
    fails(run(SCRIPTS[0], *options, "--weights", "none"), "--epochs", "--weights")
    assert not (tmp_path / "out").exists()


def test_fresh_never_deletes_the_weights_that_it_starts_from(prepared):
    folder, scripts = prepared
    weights = folder / "SmallNetwork_Digits_FT_final.pth"
    options = ["--dataset", "Digits", "--epochs", "1", "--weights", weights, "--fresh"]
    result = prepare(folder.parent, *options, script=scripts[SCRIPTS[0]])
    fails(result, weights.name, "--fresh")
    assert weights.exists()
