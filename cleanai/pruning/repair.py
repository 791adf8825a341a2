"""The repair after pruning: batch norm is recalibrated, and layers are reconstructed in order."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cleanai.data.images import ImageSet
from cleanai.network.activations import removed_afterwards
from cleanai.pruning.least_squares import reconstruct, reconstruct_windows, zero_inputs
from cleanai.pruning.rows import NO_CHANNELS, channel_rows, is_kept, window_rows
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import progress

REPAIR_BYTES = 3 * 2**30  # of activations; a fixed bound, so that results do not depend on the memory that is free


@dataclass
class Targets:
    """Per layer the input rows and the output rows before pruning (`record_rows`), and the removed inputs (R,)."""

    inputs: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    removed: dict[nn.Module, torch.Tensor] = field(default_factory=dict)


def most_images(network: nn.Module, example: torch.Tensor) -> int:
    """How many images like `example` (1, 3, H, W) may pass `network` at once: about `REPAIR_BYTES` in float32.

    An estimate, without gradients: the largest module's input and output, and as much again for a residual branch.
    """
    largest = 0

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        largest = max(largest, sum(each.numel() for each in (*args, output) if isinstance(each, torch.Tensor)))

    handles = [module.register_forward_hook(look) for module in network.modules() if not any(module.children())]
    with removed_afterwards(handles), torch.inference_mode():
        network.eval()(example)
    return max(1, REPAIR_BYTES // (2 * 4 * max(1, largest)))


def recalibrate(network: nn.Module, images: ImageSet, compute: Compute, batch_size: int, title: str) -> None:
    """Set the running means and variances of batch norm to plain averages over `images`."""
    # torch's update_bn would put dropout and stochastic depth into training mode as well.
    with new_averages(network) as norms, torch.inference_mode(), compute.autocast():
        # Every batch counts alike: a smaller last one is left out.
        batches = max(1, len(images) // batch_size) if norms else 0
        for inputs, _ in progress(itertools.islice(images.batches(batch_size), batches), title, "batch", batches):
            network(inputs)


@contextlib.contextmanager
def new_averages(network: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Let batch norm normalise by each batch and average over the batches. All else is in evaluation mode."""
    norms = [m for m in network.eval().modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # a cumulative average
    try:
        yield norms
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.eval().momentum = momentum


def reconstruct_in_order(
    network: nn.Module,
    targets: Targets,
    spreads: dict[nn.Module, int],
    images: ImageSet,
    compute: Compute,
    title: str,
) -> tuple[dict[nn.Module, torch.Tensor], dict[nn.Module, torch.Tensor]]:
    """Reconstruct the layers of a network in the order of their execution, before the removed inputs are cut.

    All images pass the network in one batch, on which batch norm is recalibrated. Each layer, just before it runs, gets
    the weights with which its present inputs approximate its outputs before pruning, so it also compensates for errors
    of the layers before it. The weights of removed inputs become zero. A layer without targets is left alone. A layer
    that runs more than once only gets these zeros: its later inputs are unknown at its first run.

    Returns the `channel_rows` and the `window_rows` of the present inputs of the layers in `spreads`, without the
    removed ones: those that `record_rows` would find after the cut. Returns nothing when a layer or a batch norm runs
    more than once. Memory holds all images between two layers (see `most_images`), and the rows.
    """
    channels: dict[nn.Module, torch.Tensor] = {}
    windows: dict[nn.Module, torch.Tensor] = {}
    runs: Counter[nn.Module] = Counter()
    bar = iter(progress(range(len(spreads)), title, "layer"))

    def repair(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        runs[layer] += 1
        if runs[layer] > 1:
            return
        next(bar, None)
        before, removed = targets.inputs.get(layer), targets.removed.get(layer, NO_CHANNELS)
        with torch.autocast(args[0].device.type, enabled=False):
            now = channel_rows(layer, args[0], len(images), spreads[layer]).float()
            channels[layer] = now[:, :, is_kept(now.shape[2], removed)]
            rows = window_rows(layer, args[0], len(images), removed)
            if rows is not None:
                windows[layer] = rows.float()
            if before is not None and before.shape != now.shape:  # of several runs
                zero_inputs(layer, removed, spreads[layer])
            elif before is not None:
                reconstruct(layer, before, now, removed, spreads[layer])
                if layer in targets.outputs:
                    reconstruct_windows(layer, targets.outputs[layer], windows[layer], removed)

    handles = [layer.register_forward_pre_hook(repair) for layer in spreads]
    with removed_afterwards(handles), new_averages(network) as norms, torch.no_grad(), compute.autocast():
        network(next(images.batches(len(images)))[0])
    if max([*runs.values(), *(int(norm.num_batches_tracked) for norm in norms)], default=0) > 1:
        return {}, {}
    return channels, windows
