import time

import pytest
import torch
from torch import nn

from cleanai.measure.latency import time_in_turns, time_networks


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
        latency = timed[name]["latency_ms"]
        assert latency["n"] == 200
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert latency["mean"] > 0
        quantiles = timed[name]["latency_quantiles_ms"]
        assert len(quantiles) == 49
        assert quantiles == sorted(quantiles)
        assert quantiles[24] == pytest.approx(latency["p50"], abs=1e-4)
        assert quantiles[44] == pytest.approx(latency["p90"], abs=1e-4)
        assert timed[name]["throughput_images_per_s"] > 0
    singles = [name for name, size in calls if size == 1]
    warm_up = len(singles) - 2 * 300
    assert warm_up >= 40, "two turns at least tell whether times are stable"
    # Each turn begins with another network: b a, a b, b a, ...
    turns = [singles[start : start + 20] for start in range(0, len(singles), 20)]
    for number, turn in enumerate(turns):
        first, second = ("b", "a") if number % 2 == 0 else ("a", "b")
        assert turn == [first] * 10 + [second] * 10
    batches = [name for name, size in calls if size == 128]
    assert batches == (["b", "a", "a", "b"] * len(batches))[: len(batches)]


def test_turns_in_which_the_machine_was_busy_are_left_out_for_all(compute):
    """Every third turn something else holds the machine up while one of the networks happens to be timed."""
    count = 0

    def disturbed():
        nonlocal count
        count += 1
        time.sleep(0.1 if count % 3 == 0 else 0.002)

    seconds = time_in_turns({"a": disturbed, "b": lambda: time.sleep(0.002)}, 30, 1, compute, "")
    assert [len(values) for values in seconds.values()] == [20, 20]
    assert sum(value >= 0.1 for value in seconds["a"]) <= 2  # ten of them were measured


def test_times_are_of_single_calls(compute):
    seconds = time_in_turns({"a": lambda: time.sleep(0.003)}, 6, 2, compute, "")["a"]
    assert len(seconds) == 8
    assert min(seconds) >= 0.003
    assert sum(seconds) == pytest.approx(8 * 0.003, rel=3)
