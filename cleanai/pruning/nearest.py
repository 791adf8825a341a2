"""Pruning of small networks, whose widths meet few budgets exactly: to the nearest one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

import torch_pruning as tp
from torch import nn

from cleanai.pruning.pruner import BudgetMissed, PruneImages, PruneSettings, prune_to_budget
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import say

NEAR = 0.02  # the largest distance from a requested share, and at most a tenth of the share that is to remain


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
    try:
        return prune_to_budget(network, importance, images, compute, settings, after_step)
    except BudgetMissed as missed:
        asked, near = (settings.ratio, settings.macs_ratio), missed.shares
        if near is None or any(share and abs(found - share) >= _near(share) for share, found in zip(asked, near)):
            raise
        say(f"Not exactly possible in this network; the nearest: {missed.nearest}")
        settings = replace(settings, ratio=near[0], macs_ratio=near[1])
    return prune_to_budget(network, importance, images, compute, settings, after_step)


def _near(share: float) -> float:
    return min(NEAR, (1 - share) / 10)
