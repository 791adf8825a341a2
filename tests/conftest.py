from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cleanai.data.images import Images
from cleanai.data.sources import load_images
from cleanai.network.models import resnet18_for_small_images
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.scenario import PROJECT, Scenario
from tests.scripts import SCRIPTS, prepare, prune

REAL_IMAGES = PROJECT / "downloaded_datasets" / "CIFAR10"
needs_real_images = pytest.mark.skipif(
    not (REAL_IMAGES / "train").is_dir(), reason="the CIFAR-10 image folder is not there"
)


@pytest.fixture(scope="session")
def compute() -> Compute:
    return choose_compute("cpu", "float32")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Images:
    return load_images("Digits", tmp_path_factory.mktemp("no-data"))


@pytest.fixture(scope="session")
def _trained(digits, compute, tmp_path_factory):
    """A ResNet-18 whose channels and batch norms have seen images, so that they differ as in a real network."""
    from cleanai.network.training import TrainSettings, fine_tune

    torch.manual_seed(0)
    network = resnet18_for_small_images(10)
    scenario = Scenario("T", "ResNet18", "Digits", tmp_path_factory.mktemp("trained"))
    small = digits.with_train_samples(256, seed=0)
    fine_tune(network, small, compute, scenario, {"config": {}}, TrainSettings(epochs=1, batch_size=32))
    return network.eval()


@pytest.fixture
def network(_trained):
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A folder, named as folders are named, in which all three scripts have run; and what they printed."""
    folder = tmp_path_factory.mktemp("Çalışma Dosyaları")
    results = [prepare(folder, "--dataset", "Digits", "--epochs", "6")]
    results += [prune(script, folder, "--dataset", "Digits", "--epochs", "5") for script in SCRIPTS[1:]]
    for result in results:
        assert result.returncode == 0, result.stderr
    return folder, [result.stdout for result in results]


def make_image_folder(root: Path, size: tuple[int, int] = (8, 8), per_class: int = 2) -> Path:
    """An image folder of two classes whose pictures are plain colours: red cats and blue dogs."""
    for part in ("train", "test"):
        for name, color in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                Image.new("RGB", size, color).save(folder / f"{number}.png")
    return root


def copy_real_images(data_dir: Path, per_class: int) -> None:
    """Copy the first real CIFAR-10 images of each class into a dataset of that name in `data_dir`."""
    for part in ("train", "test"):
        for folder in sorted((REAL_IMAGES / part).iterdir()):
            target = data_dir / "CIFAR10" / part / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:per_class]:
                shutil.copy(path, target)
