"""Latency and throughput of networks, measured in turns, so that a drifting machine affects all alike."""

from __future__ import annotations

import collections
import functools
import itertools
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any, Callable

import torch
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.runtime.compute import Compute
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.progress import progress, say

LATENCY_TURNS = 30
LATENCY_CALLS = 10  # per turn
THROUGHPUT_TURNS = 12
THROUGHPUT_BATCH = 128
LEAST_TURNS = 3
MOST_WARM_UP_TURNS = 10
SHORT_S = 3.0  # of a timing between two steps of pruning
STABLE = 0.05  # warm-up ends when two turns differ by at most this share


@dataclass(frozen=True)
class Times:
    """The seconds of single calls, and how much its turns differ: their 10th to 90th percentile, over their median."""

    seconds: list[float]
    spread_percent: float


def time_networks(
    networks: dict[str, nn.Module],
    images: ImageSet,
    compute: Compute,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, Any]]:
    """Latency of one image and throughput of batches, in evaluation and inference mode, per network.

    The networks' weights and inputs are of `dtype`. `latency_ms` is of `distribution_ms`; `latency_quantiles_ms` holds
    the percentiles p2, p4, ... p98, to draw them; `throughput_images_per_s` is images over seconds, in batches of
    `throughput_batch` images, with `throughput_spread_percent`.

    On a GPU the time of one image is that of a CUDA graph: otherwise it is the time that Python takes to start kernels,
    which pruning does not change. `latency_by` says so, or that a network cannot be recorded as a graph.
    """
    with torch.inference_mode(), compute.repeated_shapes():
        singles, latency_by = _time_singles(networks, images, compute, dtype)
        batches, size = _time_batches(networks, images, _batch_size(singles, compute), compute, dtype)
        timed = {
            name: {
                "latency_ms": distribution_ms(singles[name]),
                "latency_quantiles_ms": _quantiles_ms(singles[name].seconds),
                "throughput_images_per_s": size / statistics.mean(batches[name].seconds),
                "throughput_batch": size,
                "throughput_spread_percent": batches[name].spread_percent,
                **latency_by,
            }
            for name in networks
        }
    return timed


def compare_speed(
    original: nn.Module, network: nn.Module, images: ImageSet, compute: Compute, speedup_of: str
) -> dict[str, Any]:
    """How many times as fast as the original a network is, by the medians of a short timing in turns.

    On single images, or in batches where `speedup_of` is "batch". `latency_median_ms` is the network's time for
    `latency_images` images.
    """
    networks, size = {"original": original, "pruned": network}, 1
    short = replace(compute, timing_s=min(compute.timing_s, SHORT_S))
    with torch.inference_mode(), compute.repeated_shapes():
        times, _ = _time_singles(networks, images, short)
        if speedup_of == "batch":
            times, size = _time_batches(networks, images, _batch_size(times, compute), short)
    before, after = (statistics.median(times[name].seconds) for name in networks)
    return {"speedup": before / after, "latency_median_ms": 1000 * after, "latency_images": size}


def _time_singles(
    networks: dict[str, nn.Module], images: ImageSet, compute: Compute, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of one image per network, and on a GPU `latency_by`."""
    passes, latency_by = _passes(networks, next(images.batches(1))[0].to(dtype)), {}
    if compute.device.type == "cuda":
        passes, latency_by["latency_by"] = _graphs(passes)
    return time_in_turns(passes, LATENCY_TURNS, LATENCY_CALLS, compute, "Timing single images"), latency_by


def _time_batches(
    networks: dict[str, nn.Module], images: ImageSet, size: int, compute: Compute, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Times], int]:
    """Times of a batch of `size` images per network, and that size: it is halved while memory does not suffice."""
    while True:
        try:
            batch = next(images.select(torch.arange(size) % len(images)).batches(size))[0].to(dtype)
            times = time_in_turns(_passes(networks, batch), THROUGHPUT_TURNS, 1, compute, f"Timing batches of {size}")
            return times, size
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not is_shortage(error):
                raise
        batch, size = None, size // 2
        torch.cuda.empty_cache()


def _passes(networks: dict[str, nn.Module], inputs: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The forward pass of these inputs, in evaluation mode, per network."""
    return {name: functools.partial(network.eval(), inputs) for name, network in networks.items()}


def time_in_turns(
    calls: dict[Any, Callable[[], Any]], turns: int, calls_per_turn: int, compute: Compute, title: str
) -> dict[Any, Times]:
    """Seconds of each single call, by name, after a warm-up until turns take equally long.

    Each turn calls everything, and each begins with another: the order makes a difference of some percent. There are
    fewer calls in a turn and fewer turns, but at least LEAST_TURNS of one call, where they would take longer than
    `compute.timing_s`. Of each, the fastest two thirds of its turns count; the others were slowed by other work on the
    machine. No network is favoured. Prints about how long it takes.
    """
    order = collections.deque(calls)

    def turn(count: int) -> dict[str, list[float]]:
        order.rotate(-1)
        return {name: [_seconds(calls[name], compute) for _ in range(count)] for name in order}

    def total(seconds: dict[str, list[float]]) -> float:
        return sum(map(sum, seconds.values()))

    spent = now = total(turn(1))
    if spent < compute.timing_s:  # again, since the first call may choose algorithms and allocate memory
        now = total(turn(1))
        spent += now
    calls_per_turn = max(1, min(calls_per_turn, int(compute.timing_s / LEAST_TURNS / max(now, 1e-9))))
    before = now = now * calls_per_turn
    expected = min(turns, max(LEAST_TURNS, int(compute.timing_s / max(now, 1e-9))))
    say(f"{title}: about {(2 + expected) * now:.0f} s")
    for number in range(MOST_WARM_UP_TURNS):
        if spent > compute.timing_s or (number > 1 and abs(now - before) < STABLE * now):
            break
        before, now = now, total(turn(calls_per_turn))
        spent += now
    turns = min(turns, max(LEAST_TURNS, int(compute.timing_s / max(now, 1e-9))))
    measured = [turn(calls_per_turn) for _ in progress(range(turns), title, "turn")]

    def times(seconds: list[list[float]]) -> Times:
        counted = itertools.chain(*sorted(seconds, key=sum)[: turns * 2 // 3])
        return Times([*counted], _spread_percent([statistics.median(each) for each in seconds]))

    return {name: times([each[name] for each in measured]) for name in calls}


def _batch_size(singles: dict[str, Times], compute: Compute) -> int:
    """THROUGHPUT_BATCH, or less where the turns of networks that take so long for one image would take too long."""
    size, single_s = THROUGHPUT_BATCH, sum(statistics.median(times.seconds) for times in singles.values())
    while size > 1 and size * single_s > compute.timing_s:
        size //= 2
    return size


def _spread_percent(turns: list[float]) -> float:
    tenths = statistics.quantiles(turns, n=10, method="inclusive")
    return 100 * (tenths[-1] - tenths[0]) / max(statistics.median(turns), 1e-9)


def distribution_ms(times: Times) -> dict[str, float]:
    """Mean, percentiles and number of these times, in milliseconds, and `spread_percent` of their turns."""
    values = [1000 * value for value in times.seconds]
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "mean": statistics.mean(values),
        "p50": percentiles[49],
        "p90": percentiles[89],
        "p99": percentiles[98],
        "n": len(values),
        "spread_percent": times.spread_percent,
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

    def replay(_: Callable[[], Any] = call) -> None:  # holds the inputs, which the graph reads
        graph.replay()

    return replay
