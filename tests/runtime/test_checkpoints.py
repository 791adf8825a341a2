import json
import pickle
from pathlib import Path

import pytest
import torch

from cleanai import UserError
from cleanai.network.models import load_network, save_network
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.checkpoints import (
    find_checkpoint,
    find_record,
    load_checkpoint,
    read_record,
    save_checkpoint,
    write_record,
)
from cleanai.runtime.files import write_bytes
from tests.helpers import SMALL_MODEL, ended, started
from tests.small_network import SmallNetwork

FACTS = {
    "model": "ResNet18",
    "dataset": "Digits",
    "classes": list("0123456789"),
    "image_size": [16, 16],
    "config": {"epochs": 4, "seed": 0},
}


def test_an_earlier_run_with_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"config": {"epochs": 4, "batch_size": 64}})
    assert find_checkpoint(path, {"epochs": 4, "batch_size": 64})["config"]["epochs"] == 4
    with pytest.raises(UserError, match=r"was made with --batch-size 64, and this run is with --batch-size 128: "):
        find_checkpoint(path, {"epochs": 4, "batch_size": 128})
    save_checkpoint(path, {"config": {"round_to": [8, 4], "lr": 0.1, "train_samples": None, "seed": 0}})
    with pytest.raises(
        UserError, match=r"was made with --round-to 8 4 --lr 0\.1 and without --train-samples, and this "
    ):
        find_checkpoint(path, {"round_to": [2], "lr": 0.2, "train_samples": 3, "seed": 0})
    with pytest.raises(UserError, match=r"run without --train-samples, use another"):
        save_checkpoint(path, {"config": {"train_samples": None}})
        find_checkpoint(path, {"train_samples": 50})
    assert find_checkpoint(tmp_path / "none.pth", {}) is None


def test_a_run_from_before_a_setting_is_one_with_what_it_did(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"config": {"epochs": 4}})
    assert find_checkpoint(path, {"epochs": 4, "calibrate_on": "test"})
    with pytest.raises(UserError, match=r"with --calibrate-on test, and this run is with --calibrate-on train: "):
        find_checkpoint(path, {"epochs": 4, "calibrate_on": "train"})


def test_another_fine_tuned_model_and_other_conditions_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"config": {"fine_tuned_model": "1", "conditions": "float32, 3 images"}})
    for other in ({"fine_tuned_model": "2"}, {"conditions": "bfloat16, 3 images"}):
        with pytest.raises(UserError, match=r"a\.pth was made .*start over with --fresh"):
            find_checkpoint(path, {"fine_tuned_model": "1", "conditions": "float32, 3 images", **other})


def test_a_record_survives_and_refuses_like_a_checkpoint(tmp_path):
    path = tmp_path / "deep" / "Çalışma.json"
    record = {"config": {"lr": 0.1}, "x": "ğ", "numbers": [1, 0.1, 1e-7, None, True]}
    write_record(path, record)
    assert find_record(path, {"lr": 0.1}) == record
    with pytest.raises(UserError, match=r"--lr 0\.1"):
        find_record(path, {"lr": 0.2})
    assert read_record(tmp_path / "none.json") is None


def test_a_record_with_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_record(tmp_path / "a.json", {"accuracy_percent": float("nan")})
    assert not any(tmp_path.iterdir())


def _edited(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    content["models"]["accuracy_percent"] = 99.0
    return json.dumps(content, indent=1).encode("utf-8")


@pytest.mark.parametrize(
    "damaged",
    [
        _edited,
        lambda path: path.read_bytes()[:-20],
        lambda path: path.read_bytes().replace(b"91.5", b"91.6"),
        lambda path: path.read_bytes().replace(b'"sha256"', b'"sha255"'),
        lambda path: b'{"config": {}}',
        lambda path: b'{"config": 3, "sha256": null}',
        lambda path: b"[1]",
        lambda path: b"",
        lambda path: b"\0",
        lambda path: b"\xff",
        lambda path: b"[" * 100_000,
    ],
)
def test_a_record_that_was_edited_or_damaged_is_named(tmp_path, damaged):
    path = tmp_path / "x.json"
    write_record(path, {"config": {}, "models": {"accuracy_percent": 91.5}})
    path.write_bytes(damaged(path))
    with pytest.raises(UserError, match=r"x\.json is damaged or was edited: move it away") as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_a_record_written_with_other_spaces_is_the_same(tmp_path):
    path = tmp_path / "x.json"
    write_record(path, {"config": {}, "x": "ğ"})
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert read_record(path) == {"config": {}, "x": "ğ"}


def test_a_missing_entry_is_named_with_its_file(tmp_path):
    checkpoint, record = tmp_path / "a.pth", tmp_path / "a.json"
    save_checkpoint(checkpoint, {"config": {"lr": 0.1}})
    write_record(record, {"models": [{"loss": 0.3}]})
    for path, entry in (
        (checkpoint, lambda: load_checkpoint(checkpoint)["classes"]),
        (checkpoint, lambda: load_checkpoint(checkpoint)["config"]["classes"]),
        (record, lambda: read_record(record)["classes"]),
        (record, lambda: read_record(record)["models"][0]["classes"]),
    ):
        with pytest.raises(UserError) as error:
            entry()
        assert str(error.value).startswith(f'{path} has no "classes": ')


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, kept):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"state_dict": {"w": torch.randn(5000)}})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a\.pth is damaged or not a checkpoint of this project .*: move it away"):
        load_checkpoint(path)


def test_a_foreign_file_is_named(tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"foreign\.pth is damaged"):
        load_checkpoint(path)


class _Attack:
    def __reduce__(self):
        return exec, ("import pathlib, tempfile; pathlib.Path(tempfile.gettempdir(), 'cleanai-attack').touch()",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    attack = {"format": "cleanai-checkpoint", "x": _Attack()}
    torch.save(attack, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(attack))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "cleanai-attack").exists()


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(UserError, match=r"a\.bin cannot be written \(No space left on device\)"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pruned_network_reloads_in_a_fresh_process_with_weights_only(tmp_path, digits, compute):
    network = SmallNetwork(10).eval()
    images = digits.test.select(torch.arange(32))
    settings = PruneSettings(0.2, 0.2, steps=1, batch_size=32)
    prune_to_budget(network, WandaImportance(), PruneImages(images, images), compute, settings)
    path, outputs = tmp_path / "n.pth", tmp_path / "o.pth"
    save_network(path, network, {**FACTS, "model": SMALL_MODEL})
    program = (
        "import sys, torch; from pathlib import Path; from cleanai.network.models import load_network\n"
        "assert torch.load(sys.argv[1], weights_only=True)['model'] == sys.argv[3]\n"
        "torch.manual_seed(1); x = torch.randn(4, 3, 16, 16)\n"
        "torch.save(load_network(Path(sys.argv[1]), sys.argv[3])(x).detach(), sys.argv[2])"
    )
    with started(["-c", program, path, outputs, SMALL_MODEL]) as process:
        result = ended(process)
    assert result.returncode == 0, result.stderr
    torch.manual_seed(1)
    with torch.no_grad():
        expected = network(torch.randn(4, 3, 16, 16))
    assert torch.equal(torch.load(outputs, weights_only=True), expected)


def test_subnormal_weights_are_saved_as_zeros(tmp_path, network):
    network.fc.weight.data[0, :2] = torch.tensor([1e-40, 1e-30])
    save_network(tmp_path / "n.pth", network, FACTS)
    saved = load_network(tmp_path / "n.pth").fc.weight
    assert saved[0, 0] == 0
    assert saved[0, 1] == network.fc.weight[0, 1]
    assert torch.equal(saved[1:], network.fc.weight[1:])


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "n.pth"
    save_checkpoint(path, {**FACTS, "state_dict": {"conv1.weight": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"n\.pth .*ResNet18"):
        load_network(path)


def test_every_flipped_byte_at_the_end_of_a_file_is_named_or_harmless(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"config": {}, "state_dict": {"w": torch.arange(9.0)}})
    whole = path.read_bytes()
    refused = 0
    for place in range(-700, 0):  # the archive's directory and its ends
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.arange(9.0))
        except UserError as error:
            assert str(error).startswith(f"{path} is damaged")
            refused += 1
    assert refused > 300


def test_strings_of_a_file_are_printed_on_one_line(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": "a\nb\x1b[31mş\u202e", "config": {"dataset": "x\ry"}})
    with pytest.raises(UserError) as error:
        load_checkpoint(path, model="ResNet18")
    assert r"the model a\nb\x1b[31mş\u202e, and" in str(error.value)
    with pytest.raises(UserError, match=r"--dataset \"x\\ry\","):
        find_checkpoint(path, {"dataset": "z"})


def test_layers_that_share_a_weight_are_no_damage_and_forged_tensors_are(tmp_path):
    path, shared = tmp_path / "a.pth", torch.randn(5000)
    save_checkpoint(path, {"state_dict": {"one": shared, "two": shared[:]}})
    state = load_checkpoint(path)["state_dict"]
    assert torch.equal(state["one"], shared) and torch.equal(state["two"], shared)
    for forged in ({"w": torch.zeros(1).expand(10**6)}, {str(number): shared[:] for number in range(100)}):
        save_checkpoint(path, {"state_dict": forged})
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)


class Masked(SmallNetwork):
    """A network with minus infinity in a buffer, as causal masks have it."""

    def __init__(self, classes):
        super().__init__(classes)
        self.register_buffer("mask", torch.full((classes, classes), -torch.inf).triu(1))


def test_a_mask_of_infinities_is_no_damage_and_weights_that_are_not_finite_are(tmp_path):
    path, network = tmp_path / "n.pth", Masked(10)
    model = f"{__file__}:Masked"
    save_network(path, network, {**FACTS, "model": model})
    assert load_network(path, model).mask.isinf().any()
    weights = [(network.classifier.weight, torch.inf), (network.classifier.weight, torch.nan)]
    for tensor, number in [*weights, (network.stem[1].running_var, torch.inf)]:
        before = tensor.data.clone()
        tensor.data.view(-1)[0] = number
        save_network(path, network, {**FACTS, "model": model})
        with pytest.raises(UserError, match=r"not finite.*--lr") as error:
            load_network(path, model)
        assert "delete" not in str(error.value)
        tensor.data.copy_(before)
    save_network(path, network, {**FACTS, "model": model, "training": {"of Adam": torch.tensor(torch.inf)}})
    with pytest.raises(UserError, match=r"not finite.*--lr"):
        load_checkpoint(path)


def test_a_run_with_other_images_is_refused_and_an_older_one_is_not(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"config": {"lr": 0.1, "test_sha256": "1"}})
    with pytest.raises(UserError, match=r"a\.pth was made from other images .*--fresh"):
        find_checkpoint(path, {"lr": 0.1, "test_sha256": "2"})
    save_checkpoint(path, {"config": {"lr": 0.1}})
    assert find_checkpoint(path, {"lr": 0.1, "test_sha256": "2"})


def test_a_file_that_another_program_holds_for_a_moment_is_written_on_windows(tmp_path, monkeypatch):
    path, replace, tries = tmp_path / "a.bin", Path.replace, []

    def held(self, target):
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError(13, "Access is denied")
        return replace(self, target)

    monkeypatch.setattr("cleanai.runtime.files._WINDOWS", True)
    monkeypatch.setattr(Path, "replace", held)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and len(tries) == 3
