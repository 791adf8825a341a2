"""What a network costs, and how networks compare: parameters, size, multiply-accumulates, latency, accuracy."""
from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.measure.latency import time_networks
from cleanai.measure.significance import pack
from cleanai.network.activations import CONSUMERS
from cleanai.network.evaluation import Evaluation
from cleanai.runtime.compute import Compute

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compares versions in a way that Python gave up
    import thop


def count_parameters(network: nn.Module) -> dict[str, int]:
    """The number of all parameters, and of those that training changes."""
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }


def count_macs(network: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates for the input `example` of one image, as thop counts them (batch norm included)."""
    # thop leaves buffers in the modules it counts: in a copy they cannot reach a checkpoint.
    return int(thop.profile(copy.deepcopy(network).eval(), inputs=(example,), verbose=False)[0])


def count_layers(network: nn.Module, example: torch.Tensor) -> dict[str, dict[str, int]]:
    """The parameters and the multiply-accumulates, as `count_macs` counts, of each convolution and linear layer."""
    counted = thop.profile(copy.deepcopy(network).eval(), inputs=(example,), verbose=False, ret_layer_info=True)[2]

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


def size_mib(network: nn.Module) -> float:
    """The size of the saved weights in MiB (2^20 bytes)."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell() / 2**20


def compare(
    networks: dict[str, nn.Module],
    evaluations: dict[str, Evaluation],
    heldout: torch.Tensor,
    images: ImageSet,
    compute: Compute,
) -> dict[str, Any]:
    """The `models`, `heldout_bits` and `summary` of a record, for the networks original, pruned and fine_tuned.

    `evaluations` are theirs on `images`; `heldout` holds the indices of those that no channel was measured on. The bits
    say of each image, in order, whether a network recognised it, and whether it was held out (`significance.unpack`).
    """
    example = next(images.batches(1))[0]
    speed = time_networks(networks, images, compute)
    models = {
        name: {
            "accuracy_percent": evaluations[name].accuracy_percent,
            "accuracy_heldout_percent": 100 * evaluations[name].correct[heldout].double().mean().item(),
            "loss": evaluations[name].loss,
            "size_mib": size_mib(network),
            "parameters": count_parameters(network)["parameters"],
            "macs": count_macs(network, example),
            **speed[name],
            "correct_bits": pack(evaluations[name].correct),
        }
        for name, network in networks.items()
    }
    is_heldout = torch.zeros(len(images), dtype=torch.bool)
    is_heldout[heldout] = True
    original, pruned, final = models["original"], models["pruned"], models["fine_tuned"]

    def reduction_percent(key: str) -> float:
        return 100 * (1 - final[key] / original[key])

    return {
        "models": models,
        "heldout_bits": pack(is_heldout),
        "summary": {
            "parameter_reduction_percent": reduction_percent("parameters"),
            "macs_reduction_percent": reduction_percent("macs"),
            "size_reduction_percent": reduction_percent("size_mib"),
            "speedup": original["latency_ms"]["mean"] / final["latency_ms"]["mean"],
            "accuracy_recovery_points": final["accuracy_percent"] - pruned["accuracy_percent"],
            "final_accuracy_drop_points": final["accuracy_percent"] - original["accuracy_percent"],
        },
    }
