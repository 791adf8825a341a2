"""Peak memory of training, statistics and repair, from tensors without values: seconds, and no memory.

Sizes are those of a card in the same precision. What a card takes besides, for PyTorch itself and for the workspaces of
its algorithms, is about 1 GiB. The bounds are stated in docs/robustness.md.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cleanai.data.images import ImageSet
from cleanai.network.activations import CONSUMERS
from cleanai.network.models import build
from cleanai.network.training_step import TrainingStep
from cleanai.pruning.rows import channel_rows
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
