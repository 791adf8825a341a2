"""Pruning in steps: score the channels, choose the widths, repair, and cut with torch_pruning."""

from __future__ import annotations

import time
from typing import Any, Callable

import torch
import torch_pruning as tp
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.network.trial import copied
from cleanai.pruning.groups import sound_groups
from cleanai.pruning.layers import compare_widths, layer_widths
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.pruning.steps import Pruning
from cleanai.pruning.tracing import prepared, require_plain, require_working, unwrapped
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import say


def prune_to_budget(
    network: nn.Module,
    importance: tp.importance.Importance,
    images: PruneImages,
    compute: Compute,
    settings: PruneSettings,
    after_step: Callable[[int, nn.Module, nn.Module], Any] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Remove shares of a network's parameters and multiply-accumulates, in place.

    In each step `importance` orders the channels within each group, scored again on the calibration images. The number
    of channels that each group loses is chosen over the whole network so that both budgets are met and the consumers'
    outputs lose least (see `group_losses`): first for the whole way, then for the part of this step. Then the repair
    runs, and the channels are cut. The network's outputs keep their width.

    Returns a report, and a copy of the network without the same channels, not repaired. The report has `steps` (shares
    requested and removed after each step, in percent, and its seconds), `layers` (widths before and after), and
    `sensitivity` (of each group before the first step, see `sensitivity_of`). `after_step` is called with the
    number of each step, the network as if this step were the last (one of its own, which may be kept), and that copy,
    and must not change them; a true answer ends the pruning. Both keep the mode, precision, device and frozen
    parameters of the network; weights that two layers share are not pruned. In DataParallel the network inside is
    pruned.

    Raises UserError, before anything is changed, when the shares cannot be met or the network cannot be pruned.
    """
    started = time.perf_counter()
    network = unwrapped(network)
    require_plain(network)
    with prepared(network):
        pruning = Pruning(network, importance, images, compute, settings)
    with torch.inference_mode(False):
        pruning.original, pruning.unrepaired = copied(network), copied(network)
    widths_before = layer_widths(network)
    with prepared(network):
        pruning.prepare()
    steps = []
    for step, fraction in enumerate(settings.fractions, 1):
        title = f"Step {step}/{len(settings.fractions)}"
        with prepared(network), prepared(pruning.unrepaired):
            removed_shares = pruning.step(title, fraction)
        seconds = time.perf_counter() - started
        steps.append({**_report(title, pruning.requested(fraction), removed_shares, seconds), "seconds": seconds})
        finished, last = network, step == len(settings.fractions)
        if after_step is not None and not last:
            with torch.inference_mode(False):
                finished = copied(network)
        if after_step is not None or last:
            pruning.finish(finished, last)
        if after_step is not None and after_step(step, finished, pruning.unrepaired):
            network.load_state_dict(finished.state_dict())
            break
        started = time.perf_counter()
    layers = compare_widths(widths_before, network)
    return {"steps": steps, "layers": layers, "sensitivity": pruning.sensitivity}, pruning.unrepaired


def require_prunable(network: nn.Module, images: ImageSet) -> None:
    """Raise the UserErrors of `prune_to_budget` that do not depend on its settings: before hours of training.

    Network and random numbers stay as they are.
    """
    network, (two, _) = copied(network), next(images.select(torch.arange(2) % len(images)).batches(2))
    require_plain(network)
    with torch.random.fork_rng([two.device] if two.is_cuda else []), prepared(network):
        require_working(network, two)
        sound_groups(network, two)


def _report(title: str, requested: list[float | None], removed: list[float], seconds: float) -> dict[str, Any]:
    shown = [
        f"{100 * share:.2f}% of {name} ({'free' if target is None else f'{100 * target:.2f}% requested'})"
        for name, target, share in zip(("parameters", "MACs"), requested, removed)
    ]
    say(f"{title}: removed {' and '.join(shown)}, {seconds:.0f} s")
    return {
        f"{name}_{what}_percent": None if share is None else 100 * share
        for what, values in (("asked", requested), ("removed", removed))
        for name, share in zip(("parameters", "macs"), values)
    }
