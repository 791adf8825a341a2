"""Batch norm recalibration, and what each part of the repair after pruning brings."""
from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cleanai.compute import Compute
from cleanai.data import ImageSet
from cleanai.evaluation import Evaluation, evaluate
from cleanai.progress import progress


def recalibrate(network: nn.Module, images: ImageSet, compute: Compute, batch_size: int, title: str) -> None:
    """Set the running means and variances of batch norm to plain averages over `images`."""
    # Not torch's update_bn: it puts dropout and stochastic depth into training mode as well.
    norms = [m for m in network.eval().modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # a cumulative average
    # Every batch counts alike in it: a smaller last one is left out.
    whole = max(1, len(images) // batch_size) if norms else 0
    with torch.inference_mode(), compute.autocast():
        for inputs, _ in progress(itertools.islice(images.batches(batch_size), whole), title, "batch", total=whole):
            network(inputs)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum


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
