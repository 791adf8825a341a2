"""The end of the repair: layers are refitted to the outputs of the original network, residual streams included.

The error of a pruned residual network accumulates in its stream, the sum that each block adds to. So the last layer of
a branch gets as its target what the original network's sum was, less what the other summand is now (He et al. 2017,
arXiv 1707.06168). All other layers get as their targets their own outputs in the original network.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from cleanai.data.images import ImageSet
from cleanai.network.activations import CONSUMERS, removed_afterwards
from cleanai.pruning.layers import sharing_modules
from cleanai.pruning.least_squares import fit
from cleanai.pruning.repair import new_averages
from cleanai.pruning.rows import input_windows, output_rows
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import progress

_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__)


def original_outputs(network: nn.Module, images: ImageSet, compute: Compute) -> OriginalOutputs:
    """What the original network computes for all images, which pass it in one batch (see `most_images`).

    Batch norm is recalibrated on them.
    """
    original = OriginalOutputs(len(images))
    with original.recording(network), new_averages(network), torch.no_grad(), compute.autocast():
        network(next(images.batches(len(images)))[0])
    return original


def refit(
    network: nn.Module,
    original: OriginalOutputs,
    kept: dict[str, torch.Tensor],
    images: ImageSet,
    compute: Compute,
    title: str,
) -> None:
    """Refit the layers of a pruned network, in the order of their execution, to what the original network computes.

    `kept` are, by layer, the outputs of the original network that the pruned one still has. The same images as in
    `original_outputs` pass the network in one batch, on which batch norm is recalibrated. A layer's weights are
    refitted together with the scale and the shift of the batch norm behind it. Layers that run more than once, those
    that share weights, those of a kind that `input_windows` does not know, and those with the same inputs as in the
    original network stay as they are. `original` is emptied as it is used.
    """
    pruned = _Pruned(network, original, kept, title)
    with pruned.refitting(), new_averages(network), torch.no_grad(), compute.autocast():
        network(next(images.batches(len(images)))[0])


class _Origins:
    """Which layer computes a tensor, alone or with its batch norm. Keeps no tensor alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    def __setitem__(self, tensor: torch.Tensor, name: str) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), tensor._version, name

    def get(self, tensor: torch.Tensor) -> str | None:
        """The name of the layer, or None for a tensor of another origin, or changed in place, as activations do."""
        reference, version, name = self._known.get(id(tensor), (None, 0, None))
        known = reference is not None and reference() is tensor and tensor._version == version
        return name if known else None


class _Additions(TorchFunctionMode):
    """A context that calls `before` with the number and the tensors of each addition of two equal shapes.

    `after`, if given, is called with the number and the sum. While `paused`, additions are not those of the network.
    """

    def __init__(self, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
        super().__init__()
        self._before, self._after, self._number = before, after, 0
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            self.paused
            or func not in _ADDITIONS
            or kwargs
            or len(args) != 2
            or not all(isinstance(each, torch.Tensor) and each.ndim > 1 for each in args)
            or args[0].shape != args[1].shape
        ):
            return func(*args, **(kwargs or {}))
        self._number += 1
        self._before(self._number, *args)
        total = func(*args)
        if self._after:
            self._after(self._number, total)
        return total


@dataclass
class OriginalOutputs:
    """What the original network computes for so many `images`, by the names of its layers.

    `inputs`: shape and sum of a layer's inputs, which show whether they are the same in another network. `outputs`:
    rows of its outputs, behind its batch norm if it has one of its own, none where `sums` has them. `norms`: the names
    of these. `ends`: by the number of an addition the layer that is fitted to the sum. `sums`: rows of this sum, by
    that layer.
    """

    images: int
    inputs: dict[str, tuple[torch.Size, float]] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def copied(self) -> OriginalOutputs:
        """The same, for one more refit."""
        return replace(self, outputs=dict(self.outputs), sums=dict(self.sums))

    @contextlib.contextmanager
    def recording(self, network: nn.Module) -> Iterator[None]:
        """A context in which `network` runs once."""
        self._modules = dict(network.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._origins = _Origins()
        self._runs: Counter[nn.Module] = Counter()
        hooks = []
        for module in self._names:
            if isinstance(module, CONSUMERS):
                hooks.append(module.register_forward_hook(self._after_layer))
            elif isinstance(module, _BatchNorm) and module.affine:
                hooks.append(module.register_forward_hook(self._after_norm))
        with removed_afterwards(hooks), _Additions(self._before_addition, self._after_addition):
            yield
        twice = {module for module, count in self._runs.items() if count > 1}
        left_alone = {self._names[module] for module in twice | sharing_modules(network)}
        for name in list(self.outputs):
            if name in left_alone or self.norms.get(name) in left_alone:
                del self.outputs[name]
        self.ends = {number: name for number, name in self.ends.items() if name in self.outputs}
        self.sums = {name: self.sums[name] for name in self.ends.values()}
        del self._modules, self._names, self._origins, self._runs

    def _after_layer(self, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._runs[layer] += 1
        name = self._names[layer]
        self.inputs[name] = _shape_and_sum(args[0])
        self._note(name, output)

    def _after_norm(self, norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._runs[norm] += 1
        name = self._origins.get(args[0])
        if name is not None and name not in self.norms:
            self.norms[name] = self._names[norm]
            self._note(name, output)

    def _note(self, name: str, output: torch.Tensor) -> None:
        self.outputs[name] = output_rows(self._modules[name], output, self.images)
        self._origins[output] = name

    def _before_addition(self, number: int, *summands: torch.Tensor) -> None:
        ends = [name for name in map(self._origins.get, summands) if name and name not in self.ends.values()]
        if ends:  # two of them where the shortcut has a layer, too: the one with more weights is fitted
            self.ends[number] = max(ends, key=lambda name: self._modules[name].weight[0].numel())

    def _after_addition(self, number: int, total: torch.Tensor) -> None:
        if number in self.ends:
            name = self.ends[number]
            self.sums[name] = output_rows(self._modules[name], total, self.images)
            self.outputs[name] = torch.empty(0)  # the sum is the target


def _shape_and_sum(values: torch.Tensor) -> tuple[torch.Size, float]:
    # By parts: PyTorch converts all that it adds to float64 first.
    return values.shape, torch.stack([part.sum(dtype=torch.float64) for part in values.split(256)]).sum().item()


class _Pruned:
    """Refits the layers of a pruned network while it runs."""

    def __init__(self, network: nn.Module, targets: OriginalOutputs, kept: dict[str, torch.Tensor], title: str) -> None:
        modules = dict(network.named_modules())
        self._targets, self._kept = targets, kept
        self._layers = {name: modules[name] for name in targets.outputs}
        self._names = {layer: name for name, layer in self._layers.items()}
        self._norms = {name: modules[targets.norms[name]] for name in targets.outputs if name in targets.norms}
        self._last = {self._norms.get(name, self._layers[name]): name for name in targets.sums}
        self._inputs: dict[str, torch.Tensor] = {}  # of the layers that are fitted at an addition
        self._origins, self._repeated = _Origins(), False
        self._additions = _Additions(self._before_addition)
        self._bar = iter(progress(range(len(self._layers)), title, "layer"))

    @contextlib.contextmanager
    def refitting(self) -> Iterator[None]:
        """A context in which the network runs once."""
        hooks = [layer.register_forward_pre_hook(self._before_layer) for layer in self._names]
        hooks += [module.register_forward_hook(self._after_branch) for module in self._last]
        with removed_afterwards(hooks), self._additions:
            yield
        for _ in self._bar:
            pass

    def _before_layer(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        name = self._names[layer]
        if self._repeated:
            return
        if name in self._targets.sums:
            self._inputs[name] = args[0]
        else:
            self._fit(name, args[0], self._kept_of(name, self._targets.outputs.pop(name)))

    def _after_branch(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not self._repeated:
            self._origins[output] = self._last[module]

    def _before_addition(self, number: int, first: torch.Tensor, second: torch.Tensor) -> None:
        name = self._targets.ends.get(number)
        if name is None or self._repeated:
            return
        branch, other = (first, second) if self._origins.get(first) == name else (second, first)
        values, total = self._inputs.pop(name), self._kept_of(name, self._targets.sums.pop(name))
        self._fit(name, values, total - output_rows(self._layers[name], other, len(values)).float())
        self._repeated = True
        torch.clear_autocast_cache()  # or the layer would run with the former weights, cast before
        outputs = self._layers[name](values)
        del values  # each of these tensors has all images
        if name in self._norms:
            self._norms[name].reset_running_stats()
            outputs = self._norms[name](outputs)
        self._repeated = False
        branch.copy_(outputs)

    def _kept_of(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self._kept[name].to(rows.device)].float()

    def _fit(self, name: str, values: torch.Tensor, target: torch.Tensor) -> None:
        next(self._bar, None)
        if _shape_and_sum(values) == self._targets.inputs[name]:
            return
        self._additions.paused = True
        with torch.autocast(values.device.type, enabled=False):
            windows = input_windows(self._layers[name], values, len(values))
            if windows is not None:
                fit(self._layers[name], self._norms.get(name), windows.float(), target)
        self._additions.paused = False
