"""What a network costs: parameters, size, multiply-accumulates, latency and throughput."""
from __future__ import annotations

from torch import nn


def count_parameters(network: nn.Module) -> dict[str, int]:
    """The number of all parameters, and of those that training changes."""
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }
