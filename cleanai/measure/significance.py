"""Whether the accuracies of two networks on the same images differ significantly."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

LEVEL = 0.05  # a smaller p value is significant
_RESAMPLES = 10_000
_SEED = 0


def pack(flags: Sequence[bool]) -> str:
    """Flags (N,) as hexadecimal digits, the first flag in the highest bit."""
    return np.packbits(np.asarray(flags, dtype=bool)).tobytes().hex()


def unpack(digits: str, count: int) -> np.ndarray:
    """The `count` flags that `pack` was given; ValueError when the digits are not those of so many."""
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} flags")
    return np.unpackbits(packed, count=count).astype(bool)


def compare_paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """The gain of `second` over `first`: flags (N,) of the images that each network classifies correctly.

    - `difference_points`: difference of their accuracies, in percentage points;
    - `interval_points`: its 95% interval, by percentiles of 10,000 bootstrap samples of the images, to which half an
      image is added for each network that only this one classifies correctly: a few images that agree prove nothing;
    - `only_first`, `only_second`: images that only one of them classifies correctly;
    - `p_value`: of the exact McNemar test (McNemar 1947).
    """
    from scipy.stats import binomtest  # takes a second to import

    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    split = only_first + only_second
    # Resampling the images resamples these three counts.
    shares = np.array([only_first + 0.5, only_second + 0.5, count - split]) / (count + 1)
    drawn = np.random.default_rng(_SEED).multinomial(count, shares, size=_RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 1] - drawn[:, 0]) / count, [2.5, 97.5])
    return {
        "difference_points": 100 * (only_second - only_first) / count,
        "interval_points": [float(low), float(high)],
        "only_first": only_first,
        "only_second": only_second,
        "p_value": float(binomtest(only_second, split).pvalue) if split else 1.0,
    }


def verdict(p_value: float) -> str:
    """For example "significant (p < 0.001)" or "not significant (p = 0.714)"."""
    return f"{'significant' if p_value < LEVEL else 'not significant'} ({shown_p(p_value)})"


def shown_p(p_value: float) -> str:
    """For example "p = 0.714"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
