"""What a network costs: parameters, multiply-accumulates, size."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from torch import nn

from cleanai.network.activations import CONSUMERS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its version check uses a deprecated function
    import thop
    from thop.profile import register_hooks


def count_parameters(network: nn.Module) -> dict[str, int]:
    """The numbers of all and of trainable parameters."""
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }


def count_macs(network: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates for the input `example` of one image, as thop counts them (batch norm included)."""
    return int(_profiled(network, example)[0])


def count_layers(network: nn.Module, example: torch.Tensor) -> dict[str, dict[str, int]]:
    """The parameters and the multiply-accumulates, as `count_macs` counts, of each convolution and linear layer."""
    counted = _profiled(network, example, ret_layer_info=True)[2]

    def macs(name: str) -> int:
        *parents, last = name.split(".")
        modules = counted
        for parent in parents:
            modules = modules[parent][2]
        return int(modules[last][0])

    return {
        name: {"parameters": count_parameters(layer)["parameters"], "macs": macs(name)}
        for name, layer in network.named_modules()
        if isinstance(layer, CONSUMERS)
    }


def _profiled(network: nn.Module, example: torch.Tensor, **options: bool) -> Any:
    """What thop finds. It leaves buffers in the modules, so it gets a copy; it does not know subclasses by itself."""
    parents = {type(module) for module in network.modules() if _counts_as_its_children(module)}
    kinds = {type(module) for module in network.modules()} - register_hooks.keys() - parents
    rules = {kind: register_hooks[base] for kind in kinds for base in kind.__mro__[::-1] if base in register_hooks}
    network = copy.deepcopy(network).eval()
    return thop.profile(network, inputs=(example,), custom_ops=rules, verbose=False, **options)


def _counts_as_its_children(module: nn.Module) -> bool:
    """Whether thop counts what is in a module instead of the module. It cannot count both, in a layer of one's own."""
    inner = [*module.modules()][1:]
    return bool(inner) and (not isinstance(module, CONSUMERS) or any(isinstance(each, CONSUMERS) for each in inner))


def size_mib(network: nn.Module) -> float:
    """The size of the saved weights in MiB (2^20 bytes)."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell() / 2**20
