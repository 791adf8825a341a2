"""Pruning of small networks, whose widths meet few budgets exactly: to the nearest one."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Callable

import torch_pruning as tp
from torch import nn

from cleanai.pruning.pruner import BudgetMissed, PruneImages, PruneSettings, prune_to_budget
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import say

NEAR = 0.02  # the largest distance from a requested share, and at most a tenth of the share that is to remain
_TRIES = 5  # the search is not exhaustive: for another budget it may not find again what it found


def prune_near_budget(
    network: nn.Module,
    importance: tp.importance.Importance,
    images: PruneImages,
    compute: Compute,
    settings: PruneSettings,
    after_step: Callable[[int, nn.Module, nn.Module], None] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """As `prune_to_budget`, but where the shares cannot be met exactly the nearest that can, with a line that says so.

    Raises BudgetMissed when one of these differs by more than `NEAR` says.
    """
    asked = [settings.ratio, settings.macs_ratio]
    for _ in range(_TRIES):
        try:
            return prune_to_budget(network, importance, images, compute, settings, after_step)
        except BudgetMissed as error:
            missed = error
        nearest = [float(percent) / 100 for percent in re.findall(r"([\d.]+)%", missed.nearest)]
        nearest[1] -= 0.00005  # it is rounded, and no fewer multiply-accumulates than requested may be removed
        shares = [None if share is None else near for share, near in zip(asked, nearest)]
        if any(share and not (near > 0 and abs(near - share) < _near(share)) for share, near in zip(asked, nearest)):
            break
        if [settings.ratio, settings.macs_ratio] == asked:
            say(f"Not exactly possible in this network; the nearest: {missed.nearest}")
        settings = replace(settings, ratio=shares[0], macs_ratio=shares[1])
    raise missed


def _near(share: float) -> float:
    return min(NEAR, (1 - share) / 10)
