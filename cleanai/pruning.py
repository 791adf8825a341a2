"""Pruning in steps: measure the channels, choose, cut them out with torch_pruning, repair."""
from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.optim.swa_utils import update_bn

from cleanai import UserError
from cleanai.activations import CONSUMERS, record_statistics
from cleanai.budget import LEAST_KEPT, ROUND_TO, Costs, choose_channels, refuse_unreachable
from cleanai.compute import Compute
from cleanai.data import ImageSet
from cleanai.importance import ActivationImportance
from cleanai.progress import progress


def prune_to_budget(
    network: nn.Module,
    importance: ActivationImportance,
    calibration: ImageSet,
    repair_on: ImageSet,
    compute: Compute,
    ratio: float,
    steps: int,
    batch_size: int,
) -> tuple[dict[str, Any], nn.Module]:
    """Remove `ratio` of a network's parameters and of its multiply-accumulates, in place.

    In each of `steps` equal steps the channels are measured anew on `calibration`, ranked over the whole network by
    `importance`, cut, and batch norm is recalibrated on `repair_on`, whose labels are not looked at. The layer that
    ends the network keeps its outputs.

    Returns what went (`steps`: shares removed after each, in percent; `layers`: widths before and after), and a copy
    of the network without the same channels that was not repaired. Raises UserError, before anything is touched, when
    so much cannot be removed.
    """
    example = next(calibration.batches(1))[0]
    unrepaired, history = copy.deepcopy(network), []
    widths_before = layer_widths(network)
    shares = []
    for step in range(1, steps + 1):
        graph = _dependency_graph(network, example)
        costs = Costs(network, graph, example)
        if step == 1:
            before = costs.now
            least = {group.root: max(ROUND_TO, round(LEAST_KEPT * group.channels)) for group in costs.groups}
            refuse_unreachable(costs, least, ratio)
        importance.statistics = record_statistics(
            network, calibration, compute, batch_size, f"Step {step}/{steps}, measuring channels"
        )
        scores = [importance(group.group).sort() for group in costs.groups]
        asked = ratio * step / steps
        removed = choose_channels(costs, [score.values for score in scores], least, before, before * (1 - asked))
        for group, score, count in zip(costs.groups, scores, removed.int().tolist()):
            if count:
                root, cut = group.group[0].dep.layer, group.group[0].dep.pruning_fn
                graph.get_pruning_group(root, cut, score.indices[:count].tolist()).prune()
        history += graph.pruning_history()
        compute.place(network)  # cutting takes the weights out of the channels-last order
        recalibrate(network, repair_on, compute, batch_size, f"Step {step}/{steps}, recalibrating batch norm")

        parameters, macs = (100 * (1 - costs(removed) / before)).tolist()
        shares.append(
            {"asked_percent": 100 * asked, "parameters_removed_percent": parameters, "macs_removed_percent": macs}
        )
        print(
            f"Step {step}/{steps}: {100 * asked:.1f}% asked, {parameters:.2f}% of the parameters "
            f"and {macs:.2f}% of the multiply-accumulates removed"
        )
    if abs(parameters - 100 * ratio) > 0.5:
        raise UserError(
            f"--ratio {ratio:g} cannot be met with widths in multiples of {ROUND_TO}: {parameters:.1f}% of the "
            "parameters went. Ask for that, or for another --ratio"
        )
    widths = layer_widths(network)
    layers = [
        {"name": name, "channels_before": width, "channels_after": widths[name]}
        for name, width in widths_before.items()
    ]
    _dependency_graph(unrepaired, example).load_pruning_history(history)
    return {"steps": shares, "layers": layers}, compute.place(unrepaired)


def recalibrate(network: nn.Module, images: ImageSet, compute: Compute, batch_size: int, title: str) -> None:
    """Set the running means and variances of batch norm to plain averages over `images`."""
    # Every batch counts alike in these averages: a smaller last one is left out.
    whole = max(1, len(images) // batch_size)
    batches = itertools.islice((inputs for inputs, _ in images.batches(batch_size)), whole)
    with compute.autocast():
        update_bn(progress(batches, title, "batch", total=whole), network)


def layer_widths(network: nn.Module) -> dict[str, int]:
    """The number of output channels of every convolution and linear layer, by name."""
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in network.named_modules()
        if isinstance(layer, CONSUMERS)
    }


def _dependency_graph(network: nn.Module, example: torch.Tensor) -> tp.DependencyGraph:
    # Evaluation mode: tracing must not move the running statistics of batch norm.
    return tp.DependencyGraph().build_dependency(network.eval(), example_inputs=example)
