"""Two processes on one training, started by torchrun on the CPU."""
import json
import os
import subprocess
import sys

import pytest
import torch

from cleanai.runtime.checkpoints import load_checkpoint
from cleanai.runtime.scenario import PROJECT

WORKER = """
import copy
import sys
from pathlib import Path

import torch

from cleanai.runtime import distributed
from cleanai.runtime.compute import choose_compute
from cleanai.pruning.criteria import WandaImportance
from cleanai.network.models import resnet18_for_small_images
from cleanai.pruning.pruner import prune_to_budget
from cleanai.runtime.scenario import Scenario
from cleanai.data.sources import load_images
from cleanai.network.training_step import TrainingStep
from cleanai.network.training import TrainSettings, fine_tune

folder = Path(sys.argv[1])
compute = choose_compute("cpu", "float32")
images = load_images("Digits", folder).with_train_samples(64, seed=0)
torch.manual_seed(distributed.rank())  # what the first process began with must be what all train
network = compute.place(resnet18_for_small_images(10))
trial = copy.deepcopy(network).train()
moves = images.train.draw_moves(32, False, torch.Generator().manual_seed(0))
TrainingStep(trial, images.train, compute)(torch.arange(32), moves, rate=0.0)
gradients = {name: parameter.grad for name, parameter in trial.named_parameters()}
buffers = dict(trial.named_buffers())
scenario = Scenario("T", "ResNet18", "Digits", folder)
history, _ = fine_tune(network, images, compute, scenario, {"config": {}}, TrainSettings(epochs=2, batch_size=32))
trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
pictures = images.train.select(torch.arange(32))
prune_to_budget(network, WandaImportance(), pictures, pictures, compute, 0.2, 0.2, steps=1, batch_size=16)
state = {"first": {**gradients, **buffers}, "history": history, "trained": trained, "pruned": network.state_dict()}
torch.save(state, folder / f"{distributed.rank()}.pt")
"""


def _torchrun(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*arguments, *map(str, command)], capture_output=True, encoding="utf-8", env=environment, check=False
    )


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What two processes ended with, and what one alone does."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    for name in ("two", "one"):
        (folder / name).mkdir()
    result = _torchrun(folder / "worker.py", folder / "two")
    assert result.returncode == 0, result.stderr
    subprocess.run([sys.executable, str(folder / "worker.py"), str(folder / "one")], check=True)
    paths = (folder / "two" / "0.pt", folder / "two" / "1.pt", folder / "one" / "0.pt")
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.parametrize("stage", ["trained", "pruned"])
def test_all_processes_end_with_the_same_network(states, stage):
    first, second, _ = (state[stage] for state in states)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert sum(tensor.numel() for tensor in first.values()) < 12e6 * (1 if stage == "trained" else 0.85)


def test_two_processes_learn_what_one_does(states):
    two, _, one = states
    for ours, alone in zip(two["history"], one["history"]):
        assert ours["train_loss"] == pytest.approx(alone["train_loss"], rel=0.01)
        assert ours["train_accuracy_percent"] == pytest.approx(alone["train_accuracy_percent"], abs=3)
    # Gradients in float32 and float64 differ by 1%: rounding decides on which side of zero a ReLU finds its input.
    for name, expected in one["first"].items():
        difference = (two["first"][name] - expected).double().norm()
        assert difference <= (1e-4 if "running" in name else 0.05) * expected.double().norm(), name


def test_a_script_under_torchrun_leaves_the_same_files_and_prints_once(tmp_path):
    options = ["--dataset", "Digits", "--weights", "none", "--epochs", "1", "--train-samples", "32"]
    options += ["--batch-size", "16", "--checkpoints-dir", tmp_path]
    script = PROJECT / "test_scenarios" / "TS1_01_prepare_model.py"
    result = _torchrun(script, *options, "--fresh")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Device: cpu") == 1
    assert result.stdout.count("Epoch 1/1") == 1
    assert result.stdout.count("FINE-TUNING RESULTS") == 1
    assert sorted(path.name for path in (tmp_path / "TS1").iterdir()) == [
        "ResNet18_Digits_FT_final.pth",
        "ResNet18_Digits_pretrained.pth",
        "TS1_ResNet18_Digits.json",
    ]
    record = json.loads((tmp_path / "TS1" / "TS1_ResNet18_Digits.json").read_text(encoding="utf-8"))
    assert record["environment"]["processes"] == 2
    assert load_checkpoint(tmp_path / "TS1" / "ResNet18_Digits_FT_final.pth")["epoch"] == 1


def test_a_batch_that_cannot_be_shared_evenly_is_refused_once(tmp_path):
    options = ["--dataset", "Digits", "--weights", "none", "--epochs", "1", "--checkpoints-dir", tmp_path]
    script = PROJECT / "test_scenarios" / "TS1_01_prepare_model.py"
    uneven = _torchrun(script, *options, "--batch-size", "15")
    assert uneven.returncode != 0
    assert uneven.stderr.count("Error: --batch-size 15 cannot be shared evenly by 2 processes") == 1
