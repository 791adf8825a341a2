"""What a network costs: parameters, size, multiply-accumulates, latency and throughput."""
from __future__ import annotations

import copy
import functools
import io
import statistics
import time
from typing import Any, Callable

import thop
import torch
from torch import nn

from cleanai.compute import Compute
from cleanai.data import ImageSet
from cleanai.progress import progress
from cleanai.training import Evaluation

LATENCY_WARM_UP = 20  # calls
LATENCY_TURNS = 20
LATENCY_CALLS = 10  # per turn
THROUGHPUT_TURNS = 6  # the first one warms up
THROUGHPUT_BATCH = 128


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


def size_mib(network: nn.Module) -> float:
    """The size of the saved weights in MiB (2^20 bytes)."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell() / 2**20


def time_networks(networks: dict[str, nn.Module], images: ImageSet, compute: Compute) -> dict[str, dict[str, Any]]:
    """Latency of one image and throughput of batches of 128, in float32, evaluation and inference mode, per network.

    The networks take turns, so that a machine whose speed drifts treats all alike. `latency_ms` holds the mean, the
    percentiles p50, p90 and p99, and n, the number of timed calls; `throughput_images_per_s` is images over seconds.
    """
    single = next(images.batches(1))[0]
    batch = next(images.select(torch.arange(THROUGHPUT_BATCH) % len(images)).batches(THROUGHPUT_BATCH))[0]
    networks = {name: network.eval() for name, network in networks.items()}
    batches_s: dict[str, list[float]] = {name: [] for name in networks}
    latency_ms = time_calls({name: functools.partial(network, single) for name, network in networks.items()}, compute)
    with torch.inference_mode():
        for _ in progress(range(THROUGHPUT_TURNS), "Timing batches", "turn"):
            for name, network in networks.items():
                batches_s[name].append(_seconds(functools.partial(network, batch), compute))
    return {
        name: {
            "latency_ms": latency_ms[name],
            "throughput_images_per_s": THROUGHPUT_BATCH / statistics.mean(batches_s[name][1:]),
        }
        for name in networks
    }


def time_calls(calls: dict[str, Callable[[], Any]], compute: Compute) -> dict[str, dict[str, float]]:
    """Latency in ms of each of `calls` in inference mode, in turns: mean, percentiles p50, p90, p99, and n calls."""
    calls_ms: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(LATENCY_WARM_UP):
                call()
        for _ in progress(range(LATENCY_TURNS), "Timing single images", "turn"):
            for name, call in calls.items():
                calls_ms[name] += [1000 * _seconds(call, compute) for _ in range(LATENCY_CALLS)]
    return {name: _distribution(values) for name, values in calls_ms.items()}


def compare(
    networks: dict[str, nn.Module],
    evaluations: dict[str, Evaluation],
    heldout: torch.Tensor,
    images: ImageSet,
    compute: Compute,
) -> dict[str, Any]:
    """The `models` and `summary` of a record, for the networks original, pruned and fine_tuned.

    `evaluations` are theirs on `images`; `heldout` holds the indices of those that no channel was measured on.
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
        }
        for name, network in networks.items()
    }
    original, pruned, final = models["original"], models["pruned"], models["fine_tuned"]

    def reduction_percent(key: str) -> float:
        return 100 * (1 - final[key] / original[key])

    return {
        "models": models,
        "summary": {
            "parameter_reduction_percent": reduction_percent("parameters"),
            "macs_reduction_percent": reduction_percent("macs"),
            "size_reduction_percent": reduction_percent("size_mib"),
            "speedup": original["latency_ms"]["mean"] / final["latency_ms"]["mean"],
            "accuracy_recovery_points": final["accuracy_percent"] - pruned["accuracy_percent"],
            "final_accuracy_drop_points": final["accuracy_percent"] - original["accuracy_percent"],
        },
    }


def _seconds(call: Callable[[], Any], compute: Compute) -> float:
    compute.synchronize()
    started = time.perf_counter()
    call()
    compute.synchronize()
    return time.perf_counter() - started


def _distribution(values: list[float]) -> dict[str, float]:
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "mean": statistics.mean(values),
        "p50": percentiles[49],
        "p90": percentiles[89],
        "p99": percentiles[98],
        "n": len(values),
    }
