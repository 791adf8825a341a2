"""The repair after pruning: batch norm recalibrated, layers reconstructed in order, and what each part of it brings."""
from __future__ import annotations

import contextlib
import itertools
from typing import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cleanai.activations import channel_rows, window_rows
from cleanai.compute import Compute
from cleanai.data import ImageSet
from cleanai.evaluation import Evaluation, evaluate
from cleanai.progress import progress
from cleanai.reconstruction import reconstruct, reconstruct_windows


def recalibrate(network: nn.Module, images: ImageSet, compute: Compute, batch_size: int, title: str) -> None:
    """Set the running means and variances of batch norm to plain averages over `images`."""
    # Not torch's update_bn: it puts dropout and stochastic depth into training mode as well.
    with _new_averages(network) as norms, torch.inference_mode(), compute.autocast():
        # Every batch counts alike: a smaller last one is left out.
        whole = max(1, len(images) // batch_size) if norms else 0
        for inputs, _ in progress(itertools.islice(images.batches(batch_size), whole), title, "batch", total=whole):
            network(inputs)


@contextlib.contextmanager
def _new_averages(network: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Let batch norm normalise by each batch that passes, and average over these; nothing else is in training mode."""
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
    received: dict[nn.Module, torch.Tensor],
    made: dict[nn.Module, torch.Tensor],
    removed: dict[nn.Module, torch.Tensor],
    spreads: dict[nn.Module, int],
    images: ImageSet,
    compute: Compute,
    title: str,
) -> None:
    """Let the layers of a network, one after the other as they run, make up for the channels that are about to go.

    `received` and `made` are the rows of what layers received and made of `images` (`record_rows`), `removed` the
    inputs (R,) that each loses; their weights become zero. All images pass the network in one batch, which batch norm
    is recalibrated on, and each layer, just before it runs, gets the weights with which its outputs come nearest to
    what they were, out of what it receives now: so it makes up for what the layers before it could not, too. In memory
    are what `images` are between two layers, once more while a layer's windows are taken, and the rows. A layer that
    runs several times keeps its weights: what it receives later is not known yet when it runs first.

    Accuracy on 2,500 training images (84.8% before) with half of the parameters and of the multiply-accumulates gone
    in five steps: 83.1 with Neuron Coverage and 83.4 with WANDA; without windows 82.2 and 82.5, and with each layer
    reconstructed by itself 81.2 and 81.5.
    """
    waiting = dict(received)
    bar = iter(progress(range(len(waiting)), title, "layer"))

    def repair(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        before = waiting.pop(layer, None)
        if before is None:
            return
        with torch.autocast(args[0].device.type, enabled=False):
            now = channel_rows(layer, args[0], len(images), spreads[layer]).float()
            if now.shape != before.shape:
                return
            reconstruct(layer, before, now, removed[layer], spreads[layer])
            if layer in made:
                seen = window_rows(layer, args[0], len(images)).float()
                reconstruct_windows(layer, made[layer], seen, removed[layer])
        next(bar, None)

    handles = [layer.register_forward_pre_hook(repair) for layer in waiting]
    try:
        with _new_averages(network), torch.no_grad(), compute.autocast():
            network(next(images.batches(len(images)))[0])
    finally:
        for handle in handles:
            handle.remove()


def repair_accuracies(
    repair: str,
    pruned: nn.Module,
    unrepaired: nn.Module,
    repair_on: ImageSet,
    test: ImageSet,
    compute: Compute,
    batch_size: int,
) -> tuple[dict[str, float], Evaluation]:
    """Accuracy on `test` as cut and after each part of the repair that was made, and all that `pruned` makes of it.

    `unrepaired` is recalibrated for it, to tell what reconstruction adds.
    """
    repaired = evaluate(pruned, test, compute, "Evaluating the pruned network")
    if repair == "none":
        return {"accuracy_raw_percent": repaired.accuracy_percent}, repaired
    accuracies = {"accuracy_raw_percent": evaluate(unrepaired, test, compute, "Evaluating as cut").accuracy_percent}
    if repair == "bn":
        accuracies["accuracy_recalibrated_percent"] = repaired.accuracy_percent
    else:
        recalibrate(unrepaired, repair_on, compute, batch_size, "Recalibrating the unrepaired network")
        recalibrated = evaluate(unrepaired, test, compute, "Evaluating without reconstruction")
        accuracies["accuracy_recalibrated_percent"] = recalibrated.accuracy_percent
        accuracies["accuracy_reconstructed_percent"] = repaired.accuracy_percent
    return accuracies, repaired
