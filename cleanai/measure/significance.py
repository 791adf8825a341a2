"""Whether the accuracies of two networks on the same images differ significantly."""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np

LEVEL = 0.05  # a smaller p value is significant
_QUANTILE = 1.959963984540054  # of the normal distribution: 95% lie within plus and minus it


def pack(flags: Sequence[bool]) -> str:
    """Flags (N,) as hexadecimal digits, the first flag in the highest bit."""
    return np.packbits(np.asarray(flags, dtype=bool)).tobytes().hex()


def unpack(digits: str, count: int) -> np.ndarray:
    """The `count` flags that `pack` was given; ValueError when the digits are not those of so many."""
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} flags")
    return np.unpackbits(packed, count=count).astype(bool)


def heldout_flags(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """For each network of a pruning script's record, which held-out images it classifies correctly: (N,)."""
    count = record["dataset"]["test_images"]
    heldout = unpack(record["heldout_bits"], count)
    return {name: unpack(model["correct_bits"], count)[heldout] for name, model in record["models"].items()}


def compare_paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """The gain of `second` over `first`: flags (N,) of the images that each network classifies correctly.

    - `difference_points`: difference of their accuracies, in percentage points;
    - `interval_points`: its 95% interval, Tango's score interval for paired proportions (Statistics in Medicine 17,
      1998), which holds for few images, too;
    - `only_first`, `only_second`: images that only one of them classifies correctly;
    - `p_value`: of the exact McNemar test (McNemar 1947).
    """
    from scipy.stats import binomtest  # takes a second to import

    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    split = only_first + only_second
    return {
        "difference_points": 100 * (only_second - only_first) / count,
        "interval_points": [100 * bound for bound in _score_interval(only_second, only_first, count)],
        "only_first": only_first,
        "only_second": only_second,
        "p_value": float(binomtest(only_second, split).pvalue) if split else 1.0,
    }


def _score_interval(gained: int, lost: int, count: int) -> list[float]:
    """The 95% interval of (gained - lost) / count: the differences that Tango's score test does not reject."""

    def score(difference: float) -> float:
        # The most likely share of lost images, if this were the difference: the root of a quadratic equation.
        linear = (2 * count - gained + lost) * difference - gained - lost
        constant = -lost * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 - 8 * count * constant, 0)) - linear) / (4 * count)
        variance = count * (2 * share + difference * (1 - difference))
        return (gained - lost - count * difference) / math.sqrt(max(variance, 1e-300))

    def bound(rejected: float, sign: int) -> float:
        """Bisection, as the score falls steadily, between a difference that is rejected and the observed one."""
        kept = (gained - lost) / count
        while abs(kept - rejected) > 1e-12:
            middle = (kept + rejected) / 2
            kept, rejected = (kept, middle) if sign * score(middle) > _QUANTILE else (middle, rejected)
        return kept

    return [bound(-1.0, 1), bound(1.0, -1)]


def judge_drop(first: np.ndarray, second: np.ndarray, accept_drop: float) -> dict[str, Any]:
    """Whether the accuracy of `second` is less than `accept_drop` points below that of `first`: a verdict.

    A test of non-inferiority, on flags as in `compare_paired`. `result` is "PASS" when the 95% interval of the
    difference lies above -accept_drop, "FAIL" when it lies below it, else "NOT SHOWN".
    """
    compared = compare_paired(first, second)
    low, high = compared["interval_points"]
    result = "PASS" if low > -accept_drop else "FAIL" if high < -accept_drop else "NOT SHOWN"
    kept = {key: compared[key] for key in ("difference_points", "interval_points")}
    return {"result": result, "accept_drop_points": accept_drop, **kept}


def verdict(p_value: float) -> str:
    """For example "significant (p < 0.001)" or "not significant (p = 0.714)"."""
    shown = "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
    return f"{'significant' if p_value < LEVEL else 'not significant'} (p {shown})"


def stricter_test(compared: dict[str, Any]) -> str:
    """A sentence where the test of `compare_paired` and its interval seem to contradict each other; else nothing."""
    low, high = compared["interval_points"]
    if compared["p_value"] < LEVEL or low <= 0 <= high:
        return ""
    return "The exact test is stricter than the interval, which barely leaves out zero."
