"""Peak memory of training, statistics and repair, from tensors without values: seconds, and no memory.

Sizes are those of a card in the same precision. What a card takes besides, for PyTorch itself and for the workspaces of
its algorithms, is about 1 GiB. The bounds are stated in docs/robustness.md.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cleanai.data.images import ImageSet
from cleanai.network.activations import CONSUMERS, MOMENTS, observe
from cleanai.network.models import build
from cleanai.network.training_step import TrainingStep
from cleanai.pruning import repair as repair_module
from cleanai.pruning import rows
from cleanai.pruning.repair import Targets, reconstruct_in_order
from cleanai.runtime.compute import Compute
from tests.cuda.stand_in import GIB

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 4), reason="older tensors without values lack operations")


class Peak(TorchDispatchMode):
    """The bytes of the tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_flatten(made)[0]:
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return made

    def _note(self, storage):
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key, size):
        self._known.discard(key)
        self.alive -= size


def peak_gib(model, side, precision, run):
    """The peak of `run(network, images, compute)`, in GiB: of all but the network itself."""
    compute = Compute(torch.device("cpu"), precision, "", inference_pixels=1000 * 32**2)  # as on a card
    with FakeTensorMode():
        network = build(model, 10)
        count = 1024 if side == 32 else 100  # of the repair; all else passes in batches
        pixels, labels = torch.zeros(count, 3, side, side, dtype=torch.uint8), torch.zeros(count, dtype=torch.long)
        images = ImageSet(pixels, labels, torch.zeros(3), torch.ones(3))
        with Peak() as memory:
            run(network, images, compute)
    return memory.peak / GIB


def training_step(network, images, compute):
    step = TrainingStep(network.train(), images, compute)
    step(torch.zeros(128, dtype=torch.long), torch.zeros(128, 3, dtype=torch.long), 0.001)


def statistics(network, images, compute):
    layers = [module for module in network.modules() if isinstance(module, CONSUMERS)]

    def add(layer, values):
        others = [dim for dim in range(values.ndim) if dim != (values.ndim - 1 if values.ndim == 2 else 1)]
        for moment in MOMENTS.values():
            moment(values).sum(others)

    observe(network, layers, add, images, compute, "")


def repair(network, images, compute):
    layers = {module: 1 for module in network.modules() if isinstance(module, CONSUMERS)}
    reconstruct_in_order(network, Targets(), layers, images, compute, "")


@pytest.mark.parametrize(
    ("model", "side", "run", "precision", "bound_gib"),
    [
        ("ResNet18", 32, training_step, "float32", 0.75),
        ("ResNet18", 32, training_step, "bfloat16", 0.5),
        ("ResNet18", 32, statistics, "float32", 1.25),
        ("ResNet18", 32, repair, "float32", 1.5),
        ("ResNet50", 224, training_step, "float32", 11.0),
        ("ResNet50", 224, training_step, "bfloat16", 6.0),
        ("ResNet50", 224, statistics, "float32", 0.4),
    ],
)
def test_the_peak_is_bounded(model, side, run, precision, bound_gib, monkeypatch):
    for module in (rows, repair_module):  # a mask of tensors without values cannot select
        monkeypatch.setattr(module, "is_kept", lambda count, removed: _Everything(range(count)))
    assert bound_gib / 2 < peak_gib(model, side, precision, run) < bound_gib


class _Everything(list):
    def sum(self):
        """How many these are."""
        return len(self)
