"""Checkpoints travel between people: damaged, forged and unsuitable ones are refused in one line."""

import copy
import io
import os
import sys
import zipfile

import pytest
import torch

from cleanai import UserError
from cleanai.network.models import load_network, resnet18_for_small_images, save_network
from cleanai.network.training import TrainSettings, fine_tune
from cleanai.network.training_step import TrainingStep
from cleanai.runtime.checkpoints import load_checkpoint, save_checkpoint
from cleanai.runtime.scenario import Scenario
from tests.helpers import ended, started

SEED = int(os.environ.get("CLEANAI_TEST_SEED", "0"))
FACTS = {
    "model": "ResNet18",
    "dataset": "Digits",
    "classes": list("0123456789"),
    "image_size": [16, 16],
    "config": {"epochs": 4, "seed": 0},
}
# Reads damaged copies of a checkpoint, by a seed, and prints how many were refused and how many read the same. The
# address space may grow by twice the file (and 16 MiB, for what Python and the allocator keep) once it was read whole.
FUZZ = """
import random, resource, sys, zipfile
from pathlib import Path
import torch
from cleanai import UserError
from cleanai.runtime.checkpoints import load_checkpoint

path, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
whole, expected, rng = path.read_bytes(), load_checkpoint(path), random.Random(seed)
damaged = path.with_name("damaged.pth")
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2 * len(whole) + 2**24
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def same(content):
    state = content.pop("state_dict")
    others = {key: value for key, value in expected.items() if key != "state_dict"}
    tensors = expected["state_dict"]
    return content == others and list(state) == list(tensors) and all(
        state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) for name, tensor in tensors.items()
    )

structure = zipfile.ZipFile(path).start_dir
refused = identical = 0
for _ in range(count):
    kind = rng.choice(["cut", "any", "pickle", "directory"])
    damaged.write_bytes(whole)
    with damaged.open("r+b") as file:
        spans = {"pickle": (0, 20000), "directory": (structure, len(whole))}
        place = rng.randrange(*spans.get(kind, (0, len(whole))))
        file.seek(place)
        if kind == "cut":
            file.truncate()
        else:
            file.write(bytes([whole[place] ^ rng.randrange(1, 256)]))
    try:
        assert same(load_checkpoint(damaged)), (kind, place)
        identical += 1
    except UserError as error:
        assert str(damaged) in str(error) and "\\n" not in str(error)
        refused += 1
print(refused, identical)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint like the scripts' with a sixteenth of the channels: 250 KB instead of 45 MB."""
    torch.manual_seed(0)
    state = resnet18_for_small_images(10).state_dict()
    for name, tensor in state.items():
        kept = [len(range(0, size, 16)) if size >= 64 else size for size in tensor.shape]
        state[name] = tensor[tuple(slice(count) for count in kept)].clone()
    path = tmp_path_factory.mktemp("small") / "small.pth"
    save_checkpoint(path, {**FACTS, "state_dict": state})
    load_network(path)
    return path


def _fuzz(path, count):
    with started(["-c", FUZZ, path, count, SEED]) as process:
        result = ended(process)
    assert result.returncode == 0, result.stderr
    refused, identical = map(int, result.stdout.split())
    assert refused + identical == count
    assert refused > count / 2
    return f"\n{count} damaged files: {refused} refused, {identical} read the same; seed {SEED} (CLEANAI_TEST_SEED)"


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as on Linux")


@needs_proc
def test_damaged_checkpoints_are_refused_or_read_the_same(small, capsys):
    counts = _fuzz(small, 150)
    with capsys.disabled():
        print(counts)


@needs_proc
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_thousand_damaged_checkpoints(small):
    print(_fuzz(small, 1000))


@needs_proc
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_damaged_checkpoints_of_full_size(network, tmp_path):
    save_network(tmp_path / "full.pth", network, FACTS)
    print(_fuzz(tmp_path / "full.pth", 50))


def test_no_flipped_byte_of_a_weight_goes_unnoticed(small, tmp_path):
    whole, path = bytearray(small.read_bytes()), tmp_path / "flipped.pth"
    weights = torch.load(small, weights_only=True)["state_dict"]["layer4.1.conv2.weight"].numpy().tobytes()
    begin = whole.index(weights)
    for place in range(begin, begin + len(weights), 1009):
        whole[place] ^= 1
        path.write_bytes(whole)
        with pytest.raises(UserError, match=r"flipped\.pth is damaged"):
            load_checkpoint(path)
        whole[place] ^= 1


def _changed(path, target, **changes):
    """Save the checkpoint in `path` with other entries, and without those that are None."""
    content = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, target)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"x\.pth was written by a newer version of this project"),
        ({"version": "1"}, r"x\.pth is damaged"),
        ({"format": None}, r"x\.pth is damaged"),
        ({"state_dict": [1]}, r"x\.pth is damaged"),
        ({"classes": None}, r'x\.pth has no "classes"'),
        ({"state_dict": None}, r'x\.pth has no "state_dict"'),
        ({"image_size": None}, r'x\.pth has no "image_size"'),
        ({"classes": list("abc")}, r"x\.pth does not hold a ResNet18 of 3 classes"),
        ({"model": "NoSuchNetwork"}, "NoSuchNetwork"),
    ],
)
def test_missing_newer_and_other_entries_are_named(small, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_network(_changed(small, tmp_path / "x.pth", **changes))


def _with_tensor(path, name, tensor):
    return {**load_checkpoint(path)["state_dict"], name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("surplus.weight", torch.zeros(3)),
        ("layer1.0.bn1.weight", torch.ones(5)),
        ("layer2.0.conv1.weight", torch.zeros(8, 5, 3, 3)),
        ("layer4.0.conv2.weight", torch.zeros(7)),
        ("fc.weight", torch.zeros(10, 32, dtype=torch.float64)),
        ("fc.bias", "a string"),
    ],
)
def test_weights_that_do_not_fit_are_refused(small, tmp_path, name, tensor):
    path = _changed(small, tmp_path / "x.pth", state_dict=_with_tensor(small, name, tensor))
    with pytest.raises(UserError, match=r"x\.pth (does not (hold|fit)|is damaged)") as error:
        load_network(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(small, tmp_path, value):
    weights = load_checkpoint(small)["state_dict"]["fc.weight"].clone()
    weights[3, 1] = value
    path = _changed(small, tmp_path / "x.pth", state_dict=_with_tensor(small, "fc.weight", weights))
    with pytest.raises(UserError, match=r"x\.pth holds numbers that are not finite"):
        load_network(path)


def test_a_checkpoint_of_another_dataset_or_model_is_refused(small):
    assert load_checkpoint(small, model="ResNet18", dataset="Digits")["classes"] == FACTS["classes"]
    with pytest.raises(UserError, match=r"small\.pth is made for the dataset Digits, and this run is for CIFAR10"):
        load_checkpoint(small, model="ResNet18", dataset="CIFAR10")
    with pytest.raises(UserError, match=r"small\.pth .* ResNet18, .* ResNet50"):
        load_checkpoint(small, model="ResNet50")


def test_forged_sizes_take_no_memory(small, tmp_path):
    path = tmp_path / "x.pth"
    huge = torch.zeros(1).expand(10**12)  # one number that claims to be 4 TB
    with pytest.raises(UserError, match=r"x\.pth is damaged"):
        load_network(_changed(small, path, state_dict=_with_tensor(small, "fc.bias", huge)))
    # A storage that is said to be larger than it is: reading it would run over its end.
    file = io.BytesIO()
    torch.save({"format": "cleanai-checkpoint", "version": 1, "x": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(path, "w") as forged:
        for name in whole.namelist():
            longer = whole.read(name).replace(b"K\x04tq", b"J\x00\x00\x00\x7ftq")  # 2^31 numbers instead of 4
            forged.writestr(name, longer)
            assert name[-4:] != ".pkl" or longer != whole.read(name)
    with pytest.raises(UserError, match=r"x\.pth is damaged"):
        load_checkpoint(path)
    # An archive that grows a thousandfold when it is unpacked.
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(UserError, match=r"x\.pth is damaged"):
        load_checkpoint(path)


def test_a_list_that_holds_itself_a_million_times_is_read_at_once(tmp_path):
    nested = [torch.zeros(1)]
    for _ in range(40):
        nested = [nested, nested]
    save_checkpoint(tmp_path / "x.pth", {"nested": nested})
    assert load_checkpoint(tmp_path / "x.pth")["nested"][0][1] is not None


def test_an_optimizer_of_another_network_is_refused(digits, compute, tmp_path):
    scenario = Scenario("TS1", "ResNet18", "Digits", tmp_path)
    network = resnet18_for_small_images(10)
    step = TrainingStep(network, digits.train, compute)
    step(torch.arange(4), torch.zeros(4, 3, dtype=torch.long), rate=0.001)
    state = step.state_dict()
    wrong_shape = copy.deepcopy(state)
    wrong_shape["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    for wrong in ({**state, "optimizer": {"state": {}, "param_groups": []}}, wrong_shape, {"scaler": {}}):
        save_network(scenario.resume, network, {**FACTS, "epoch": 1, "training": wrong, "history": []})
        with pytest.raises(UserError, match=f"{scenario.resume.name} .*--fresh"):
            fine_tune(network, digits, compute, TrainSettings(epochs=4, batch_size=16), scenario, FACTS)
