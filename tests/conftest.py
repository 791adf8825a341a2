from __future__ import annotations

import copy

import pytest
import torch

from cleanai.data.images import Images
from cleanai.data.sources import load_images
from cleanai.network.models import resnet18_for_small_images
from cleanai.runtime.compute import Compute, choose_compute
from tests.helpers import SCRIPTS, prepare, prune
from tests.small_network import SmallNetwork, thin_resnet18


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    """Prose is wrapped to the terminal: the same for all who run the tests."""
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(autouse=True, scope="session")
def few_rows():
    """The end of the repair in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cleanai.pruning.rows.FIT_ROWS", 2**11)
        yield


@pytest.fixture(scope="session")
def compute() -> Compute:
    return choose_compute("cpu", "float32")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Images:
    return load_images("Digits", tmp_path_factory.mktemp("no-data"))


@pytest.fixture(scope="session")
def trained_network(digits, compute):
    """A ResNet-18 whose channels and batch norms have seen images, so that they differ as in a real network.

    One for all tests: who changes it works on a copy, as the fixture `network` is.
    """
    return _trained(resnet18_for_small_images, digits.with_train_samples(256, seed=0), compute, epochs=1)


@pytest.fixture
def network(trained_network):
    return copy.deepcopy(trained_network)


@pytest.fixture(scope="session")
def trained_thin_network(digits, compute):
    """The same where the widths do not matter: with a quarter of the channels."""
    return _trained(thin_resnet18, digits.with_train_samples(512, seed=0), compute, epochs=2)


@pytest.fixture
def thin_network(trained_thin_network):
    return copy.deepcopy(trained_thin_network)


@pytest.fixture(scope="session")
def trained_small_network(digits, compute):
    """A network for which a sweep takes seconds."""
    return _trained(SmallNetwork, digits.with_train_samples(512, seed=0), compute, epochs=4)


def _trained(build, images, compute, epochs):
    from cleanai.network.training import TrainSettings, train

    torch.manual_seed(0)
    network = build(10)
    train(network, images, compute, TrainSettings(epochs=epochs, batch_size=32))
    return network.eval()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A folder, named as folders are named, in which scripts 1 to 3 have run; and what they printed.

    It takes most of a minute. In `make test` one file goes to one process: only test_scripts.py uses it there.
    """
    folder = tmp_path_factory.mktemp("Çalışma Dosyaları")
    results = [prepare(folder, "--dataset", "Digits", "--epochs", "6")]
    results += [prune(script, folder, "--dataset", "Digits", "--epochs", "5") for script in SCRIPTS[1:]]
    for result in results:
        assert result.returncode == 0, result.stderr
    return folder, [result.stdout for result in results]
