"""The convolutions and linear layers of a network, by name."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import Any, Sequence

from torch import nn

from cleanai import UserError
from cleanai.network.activations import CONSUMERS


def find_layers(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The convolutions and linear layers whose names match a pattern, as names of files do.

    UserError for a pattern that matches none.
    """
    names = list(layer_widths(network))
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            some = ", ".join(names if len(names) <= 8 else [*names[:6], "...", names[-1]])
            raise UserError(f"No layer matches {pattern!r}, which is to be kept; the layers are {some}")
        found |= matching
    return found


def sharing_modules(network: nn.Module) -> set[nn.Module]:
    """The modules that hold a parameter which another one holds, too."""
    holders = Counter(id(weight) for module in network.modules() for weight in _own_parameters(module))
    return {module for module in network.modules() if any(holders[id(x)] > 1 for x in _own_parameters(module))}


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def layer_widths(network: nn.Module) -> dict[str, int]:
    """The number of output channels of every convolution and linear layer, by name."""
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in network.named_modules()
        if isinstance(layer, CONSUMERS)
    }


def compare_widths(before: dict[str, int], network: nn.Module) -> list[dict[str, Any]]:
    """The `layer_widths` before, and those of a network now: per layer its `name` and both."""
    widths = layer_widths(network)
    return [{"name": name, "channels_before": width, "channels_after": widths[name]} for name, width in before.items()]
