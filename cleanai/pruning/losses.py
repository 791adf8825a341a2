"""What the outputs of the following layers lose without channels of a group."""

from __future__ import annotations

import math
from typing import Any, Iterable

import torch
from torch import nn

from cleanai.network.activations import CONSUMERS
from cleanai.pruning.groups import Group
from cleanai.pruning.least_squares import output_errors

SENSITIVITY = tuple(tenth / 10 for tenth in range(1, 10))  # shares of a group's channels


def group_losses(group: Group, order: torch.Tensor, grams: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
    """The network's loss without the first 0, 1, ... all of a group's units in `order`: (units + 1,).

    A consumer keeps a share 1 - e of its outputs' power, e being the squared error after reconstruction
    (`output_errors`). Such shares multiply along the network, so the loss is -log(1 - e), summed over the consumers:
    a layer that is nearly wiped out costs far more than several that lose a little. docs/method.md compares this rule
    with others.
    """
    kept = [
        1 - output_errors(layer, grams[layer], group.inputs(layer)[order], group.spreads[layer])
        for layer in group.consumers
    ]
    losses = -torch.stack(kept).clamp_min(1e-9).log().sum(0)
    return torch.cat([losses.new_zeros(1), losses])


def losses_of_cuts(losses: list[torch.Tensor], cuts: list[list[int]], groups: list[Group]) -> list[torch.Tensor]:
    """Of the losses per unit, those of each allowed cut."""
    return [loss[torch.tensor(cut) * group.units // group.channels] for loss, cut, group in zip(losses, cuts, groups)]


def sensitivity_of(network: nn.Module, groups: list[Group], losses: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Per group of a network the `layers` that produce its channels, the `readers`, the `channels`, and `lost_percent`.

    That is the share of the readers' outputs that is lost, by its `group_losses`, at each share of the channels in
    `SENSITIVITY`.
    """
    names = {layer: name for name, layer in network.named_modules()}
    order = {name: number for number, name in enumerate(names.values())}

    def named(layers: Iterable[nn.Module]) -> list[str]:
        return sorted((names[layer] for layer in layers if isinstance(layer, CONSUMERS)), key=order.__getitem__)

    entries = []
    for group, loss in zip(groups, losses):
        lost = [1 - math.exp(-loss[round(share * group.units)].item()) for share in SENSITIVITY]
        entries.append(
            {
                "layers": named(group.producers),
                "readers": named(group.consumers),
                "channels": group.channels,
                "lost_percent": [round(100 * share, 3) for share in lost],
            }
        )
    return sorted(entries, key=lambda entry: order[entry["layers"][0]])
