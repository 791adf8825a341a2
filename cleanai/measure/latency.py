"""Latency and throughput of networks, measured in turns, so that a drifting machine affects all alike."""

from __future__ import annotations

import collections
import math
import statistics
import time
from typing import Any, Callable

import torch
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.runtime.compute import Compute
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.progress import progress

LATENCY_TURNS = 30
LATENCY_CALLS = 10  # per turn
THROUGHPUT_TURNS = 12
THROUGHPUT_BATCH = 128
LEAST_TURNS = 3
MOST_WARM_UP_TURNS = 10
STABLE = 0.05  # warm-up ends when two turns differ by at most this share


def time_networks(
    networks: dict[str, nn.Module],
    images: ImageSet,
    compute: Compute,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, Any]]:
    """Latency of one image and throughput of batches of 128, in evaluation and inference mode, per network.

    The networks' weights and inputs are of `dtype`. `latency_ms` holds the mean, the percentiles p50, p90
    and p99, and n, the number of timed calls; `latency_quantiles_ms` the percentiles p2, p4, ... p98, to draw them;
    `throughput_images_per_s` is images over seconds.

    On a GPU the time of one image is that of a CUDA graph: otherwise it is the time that Python takes to start kernels,
    which pruning does not change. `latency_by` says so, or that a network cannot be recorded as a graph.
    """
    single = next(images.batches(1))[0].to(dtype)
    batch = next(images.select(torch.arange(THROUGHPUT_BATCH) % len(images)).batches(THROUGHPUT_BATCH))[0].to(dtype)
    networks = {name: network.eval() for name, network in networks.items()}

    def calls(inputs: torch.Tensor) -> dict[str, Callable[[], Any]]:
        return {name: lambda network=network: network(inputs) for name, network in networks.items()}

    with torch.inference_mode(), compute.repeated_shapes():
        passes, latency_by = calls(single), {}
        if compute.device.type == "cuda":
            passes, latency_by["latency_by"] = _graphs(passes)
        singles = time_in_turns(passes, LATENCY_TURNS, LATENCY_CALLS, compute, "Timing single images")
        batches = time_in_turns(calls(batch), THROUGHPUT_TURNS, 1, compute, "Timing batches")
        timed = {
            name: {
                "latency_ms": distribution_ms(singles[name]),
                "latency_quantiles_ms": _quantiles_ms(singles[name]),
                "throughput_images_per_s": THROUGHPUT_BATCH / statistics.mean(batches[name]),
                **latency_by,
            }
            for name in networks
        }
    return timed


def time_in_turns(
    calls: dict[str, Callable[[], Any]], turns: int, calls_per_turn: int, compute: Compute, title: str
) -> dict[str, list[float]]:
    """Seconds of each single call, by name, after a warm-up until turns take equally long.

    Each turn calls everything, and each begins with another: the order makes a difference of some percent. There are
    fewer turns, but at least LEAST_TURNS, where `turns` would take longer than `compute.timing_s`. The fastest two
    thirds of the turns count; the others were slowed by other work on the machine. No network is favoured.
    """
    order = collections.deque(calls)

    def turn() -> dict[str, list[float]]:
        order.rotate(-1)
        return {name: [_seconds(calls[name], compute) for _ in range(calls_per_turn)] for name in order}

    def total(seconds: dict[str, list[float]]) -> float:
        return sum(map(sum, seconds.values()))

    before, spent = math.inf, 0.0
    for _ in range(MOST_WARM_UP_TURNS):
        now = total(turn())
        spent += now
        if abs(now - before) < STABLE * now or (spent > compute.timing_s and before < math.inf):
            break
        before = now
    turns = min(turns, max(LEAST_TURNS, int(compute.timing_s / max(now, 1e-9))))
    measured = sorted((turn() for _ in progress(range(turns), title, "turn")), key=total)[: turns * 2 // 3]
    return {name: [seconds for each in measured for seconds in each[name]] for name in calls}


def distribution_ms(seconds: list[float]) -> dict[str, float]:
    """Mean, percentiles and number of these times, in milliseconds."""
    values = [1000 * value for value in seconds]
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "mean": statistics.mean(values),
        "p50": percentiles[49],
        "p90": percentiles[89],
        "p99": percentiles[98],
        "n": len(values),
    }


def _quantiles_ms(seconds: list[float]) -> list[float]:
    return [round(1000 * value, 4) for value in statistics.quantiles(seconds, n=50, method="inclusive")]


def _seconds(call: Callable[[], Any], compute: Compute) -> float:
    compute.synchronize()
    started = time.perf_counter()
    call()
    compute.synchronize()
    return time.perf_counter() - started


def _graphs(calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], str]:
    """The replays of CUDA graphs of these calls, and how they run; the calls themselves when one cannot be recorded."""
    try:
        return {name: _recorded(call) for name, call in calls.items()}, "as a CUDA graph"
    except RuntimeError as error:  # a network that reads values from the device in its forward pass
        if is_shortage(error):
            raise
        return calls, "without a CUDA graph, which cannot be made of it"


def _recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of what `call` does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # algorithms are chosen and memory is taken before the recording
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
