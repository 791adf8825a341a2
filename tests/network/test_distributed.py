"""Two processes on one training, started by torchrun on the CPU."""

import pytest
import torch

from cleanai.runtime.checkpoints import load_checkpoint, read_record
from cleanai.runtime.scenario import PROJECT
from tests.helpers import SCRIPTS, ended, script_command, started
from tests.small_network import SmallNetwork

WORKER = """
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

from cleanai.runtime import distributed
from cleanai.runtime.compute import choose_compute
from cleanai.pruning.criteria import WandaImportance
from tests.small_network import SmallNetwork
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.scenario import Scenario
from cleanai.data.sources import load_images
from cleanai.network.training_step import TrainingStep
from cleanai.network.training import TrainSettings, fine_tune

folder = Path(sys.argv[1])
compute = choose_compute("cpu", "float32")
images = load_images("Digits", folder).with_train_samples(64, seed=0)
images = replace(images, test=images.test.select(torch.arange(40)))
torch.manual_seed(distributed.rank())  # all must train the weights of the first process
network = compute.place(SmallNetwork(10))
trial = copy.deepcopy(network).train()
moves = images.train.draw_moves(32, False, torch.Generator().manual_seed(0))
TrainingStep(trial, images.train, compute)(torch.arange(32), moves, rate=0.0)
gradients = {name: parameter.grad for name, parameter in trial.named_parameters()}
buffers = dict(trial.named_buffers())
scenario = Scenario("T", "ResNet18", "Digits", folder)
settings = TrainSettings(epochs=2, batch_size=32)
history, _ = fine_tune(network, images, compute, settings, scenario, {"config": {}})
random = torch.rand(8)  # as dropout would draw next
trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
few = images.train.select(torch.arange(32))
settings = PruneSettings(0.2, 0.2, steps=1, batch_size=16)
prune_to_budget(network, WandaImportance(), PruneImages(few, few), compute, settings)
state = {
    "first": {**gradients, **buffers}, "history": history, "trained": trained, "pruned": network.state_dict(),
    "random": random,
}
torch.save(state, folder / f"{distributed.rank()}.pt")
"""
PREPARE = ["--dataset", "Digits", "--weights", "none", "--epochs", "1"]


def _torchrun(*command):
    with started(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command],
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(PROJECT),
    ) as process:
        return ended(process)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The results of two processes together, and of one alone."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    for name in ("two", "one"):
        (folder / name).mkdir()
    result = _torchrun(folder / "worker.py", folder / "two")
    assert result.returncode == 0, result.stderr
    with started([folder / "worker.py", folder / "one"], PYTHONPATH=str(PROJECT)) as process:
        assert ended(process).returncode == 0
    paths = (folder / "two" / "0.pt", folder / "two" / "1.pt", folder / "one" / "0.pt")
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.parametrize("stage", ["trained", "pruned"])
def test_all_processes_end_with_the_same_network(states, stage):
    first, second, _ = (state[stage] for state in states)
    whole = sum(tensor.numel() for tensor in SmallNetwork(10).state_dict().values())
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert sum(tensor.numel() for tensor in first.values()) <= whole * (1 if stage == "trained" else 0.81)


def test_two_processes_train_like_one(states):
    two, _, one = states
    assert len(two["history"]) == len(one["history"]) == 2
    for of_two, of_one in zip(two["history"], one["history"]):
        assert of_two["train_loss"] == pytest.approx(of_one["train_loss"], rel=0.01)
        assert of_two["train_accuracy_percent"] == pytest.approx(of_one["train_accuracy_percent"], abs=3)
    # Gradients in float32 and float64 differ by 1%: rounding decides on which side of zero a ReLU finds its input.
    for name, expected in one["first"].items():
        difference = (two["first"][name] - expected).double().norm()
        assert difference <= (1e-4 if "running" in name else 0.05) * expected.double().norm(), name


def test_each_process_draws_its_own_dropout(states):
    first, second, alone = (state["random"] for state in states)
    assert torch.equal(first, alone)
    assert not torch.equal(first, second)


@pytest.mark.long
def test_a_script_under_torchrun_writes_the_same_files_and_prints_once(tmp_path):
    few = ["--train-samples", "32", "--batch-size", "16", "--checkpoints-dir", tmp_path, "--fresh"]
    result = _torchrun(*script_command(SCRIPTS[0], *PREPARE, *few))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Device: cpu") == 1
    assert result.stdout.count("Epoch 1/1") == 1
    assert result.stdout.count("FINE-TUNING RESULTS") == 1
    assert sorted(path.name for path in (tmp_path / "TS1").iterdir()) == [
        "ResNet18_Digits_FT_final.pth",
        "ResNet18_Digits_pretrained.pth",
        "TS1_ResNet18_Digits.json",
    ]
    assert read_record(tmp_path / "TS1" / "TS1_ResNet18_Digits.json")["environment"]["processes"] == 2
    assert load_checkpoint(tmp_path / "TS1" / "ResNet18_Digits_FT_final.pth")["epoch"] == 1


def test_a_batch_that_cannot_be_shared_evenly_is_refused_once(tmp_path):
    uneven = _torchrun(*script_command(SCRIPTS[0], *PREPARE, "--batch-size", "15", "--checkpoints-dir", tmp_path))
    assert uneven.returncode != 0
    assert uneven.stderr.count("Error: --batch-size 15 cannot be shared evenly by 2 processes") == 1
