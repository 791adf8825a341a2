import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cleanai.measure import latency
from cleanai.measure.latency import compare_speed, time_in_turns, time_networks


class Clock:
    """A clock on which time only passes in the calls that are timed, so that no test depends on the machine."""

    def __init__(self):
        self.now = 0.0

    def call(self, seconds):
        """A function that takes the next of these numbers of seconds each time."""
        durations = iter(seconds)

        def call():
            self.now += next(durations)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_networks_are_timed_in_turns(digits, compute):
    class Recording(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, inputs):
            assert not self.training
            assert torch.is_inference_mode_enabled()
            assert inputs.dtype == torch.bfloat16
            calls.append((self.name, len(inputs)))
            return inputs

    calls = []
    timed = time_networks({"a": Recording("a"), "b": Recording("b")}, digits.test, compute, torch.bfloat16)
    for name in ("a", "b"):
        distribution = timed[name]["latency_ms"]
        assert distribution["n"] == 200
        assert 0 < distribution["p50"] <= distribution["p90"] <= distribution["p99"]
        assert distribution["mean"] > 0
        quantiles = timed[name]["latency_quantiles_ms"]
        assert len(quantiles) == 49
        assert quantiles == sorted(quantiles)
        assert quantiles[24] == pytest.approx(distribution["p50"], abs=1e-4)
        assert quantiles[44] == pytest.approx(distribution["p90"], abs=1e-4)
        assert timed[name]["throughput_images_per_s"] > 0
        assert timed[name]["throughput_batch"] == 128
        assert distribution["spread_percent"] > 0 and timed[name]["throughput_spread_percent"] > 0
    singles = [name for name, size in calls if size == 1]
    assert singles[:4] == ["b", "a", "a", "b"], "before the warm-up: two single calls show how long one takes"
    warm_up = len(singles) - 4 - 2 * 300
    assert warm_up >= 40, "only two turns or more show whether times are stable"
    # Each turn begins with another network: b a, a b, b a, ...
    turns = [singles[start : start + 20] for start in range(4, len(singles), 20)]
    for number, turn in enumerate(turns):
        first, second = ("b", "a") if number % 2 == 0 else ("a", "b")
        assert turn == [first] * 10 + [second] * 10
    batches = [name for name, size in calls if size == 128]
    assert batches == (["b", "a", "a", "b"] * len(batches))[: len(batches)]


def test_slow_turns_are_left_out(clock, compute):
    """In every third turn other work on the machine slows one of the networks down."""
    calls = {"a": clock.call(itertools.cycle([0.002, 0.002, 0.1])), "b": clock.call(itertools.repeat(0.003))}
    times = time_in_turns(calls, 30, 1, compute, "")
    assert times["a"].seconds == pytest.approx([0.002] * 20)
    assert times["b"].seconds == pytest.approx([0.003] * 20)
    assert times["a"].spread_percent == pytest.approx(100 * (0.1 - 0.002) / 0.002), "the slow turns show in it"
    assert times["b"].spread_percent == pytest.approx(0, abs=1e-6)


def test_a_stall_counts_for_none_though_other_turns_are_slower_as_a_whole(clock, compute):
    stalls = itertools.cycle([0.0001, 0.005, 0.0001])
    calls = {"short": clock.call(stalls), "long": clock.call(itertools.cycle([0.2, 0.1, 0.1]))}
    times = time_in_turns(calls, 30, 1, compute, "")
    assert times["short"].seconds == pytest.approx([0.0001] * 20)
    assert times["long"].seconds == pytest.approx([0.1] * 20)


def test_times_are_of_single_calls(clock, compute):
    times = time_in_turns({"a": clock.call(itertools.cycle([0.003, 0.004]))}, 6, 2, compute, "")
    assert times["a"].seconds == pytest.approx([0.003, 0.004] * 4)


def test_the_warm_up_ends_when_turns_take_equally_long(clock, compute):
    durations = iter([8.0, 4.0, 2.0, 1.0, 0.97, *[0.5] * 6])
    times = time_in_turns({"a": clock.call(durations)}, 6, 1, compute, "")
    assert times["a"].seconds == pytest.approx([0.5] * 4)
    assert not list(durations), "all calls after the warm-up are measured"


def test_a_warm_up_in_which_turns_never_take_equally_long_ends(clock, compute):
    compute = replace(compute, timing_s=1e9)
    times = time_in_turns({"a": clock.call(2.0**power for power in range(18, 0, -1))}, 6, 1, compute, "")
    assert times["a"].seconds == [2, 4, 8, 16], "ten turns of warm-up, and the fastest four of six"


@pytest.mark.parametrize(
    ("call_s", "calls", "passes"),
    [(0.09, 70, 132), (1.0, 6, 17), (6.0, 2, 5), (30.0, 2, 4), (3000.0, 2, 4)],
)
def test_long_timings_are_cut_to_the_seconds_allowed(clock, compute, capsys, call_s, calls, passes):
    """As far as they can be: two thirds of three turns of one call must remain, and a call or two before them."""
    bounded = replace(compute, timing_s=10.0)
    times = time_in_turns({"a": clock.call(itertools.repeat(call_s))}, 30, 10, bounded, "Timing")
    assert times["a"].seconds == pytest.approx([call_s] * calls)
    assert clock.now == pytest.approx(call_s * passes)
    announced = float(capsys.readouterr().out.split("about ")[1].split(" s")[0])
    assert announced == pytest.approx(clock.now, rel=0.3)


@pytest.mark.parametrize(("single_s", "batch"), [(0.01, 128), (0.2, 32), (3.0, 2), (100.0, 1)])
def test_a_slow_network_gets_a_smaller_batch(clock, compute, digits, single_s, batch):
    """One whose pass takes as long for each image of a batch as for a single one."""

    class Slow(nn.Module):
        def forward(self, inputs):
            clock.now += single_s * len(inputs)

    bounded = replace(compute, timing_s=10.0)
    timed = time_networks({"a": Slow()}, digits.test, bounded)["a"]
    assert timed["throughput_batch"] == batch
    assert timed["throughput_images_per_s"] == pytest.approx(1 / single_s)
    assert clock.now <= max(100, 8 * single_s)


@pytest.mark.parametrize("message", ["out of memory", "shapes clash"])
def test_batches_that_do_not_fit_into_memory_are_halved(clock, compute, digits, message):
    class Large(nn.Module):
        def forward(self, inputs):
            clock.now += 0.001
            if len(inputs) > 40:
                raise RuntimeError(message)

    if message == "out of memory":
        assert time_networks({"a": Large()}, digits.test, compute)["a"]["throughput_batch"] == 32
        assert compare_speed(Large(), Large(), digits.test, compute, "batch")["latency_images"] == 32
    else:
        with pytest.raises(RuntimeError, match=message):
            time_networks({"a": Large()}, digits.test, compute)


@pytest.mark.parametrize(("speedup_of", "images", "speedup"), [("single", 1, 3 / 2.5), ("batch", 128, 130 / 66)])
def test_the_speed_up_is_that_of_single_images_or_of_batches(digits, compute, clock, speedup_of, images, speedup):
    class Slow(nn.Module):
        def __init__(self, per_image_ms):
            super().__init__()
            self.per_image_ms = per_image_ms

        def forward(self, inputs):
            clock.now += (2 + self.per_image_ms * len(inputs)) / 1000

    compared = compare_speed(Slow(1.0), Slow(0.5), digits.test, compute, speedup_of)
    expected = {"speedup": speedup, "latency_median_ms": 2 + images / 2, "latency_images": images}
    assert compared == pytest.approx(expected)
    assert clock.now < 15, "a few seconds between two steps"
