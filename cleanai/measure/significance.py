"""Whether two networks differ by more than chance on the same images, and how a record holds what each got right."""
from __future__ import annotations

from typing import Any, Sequence

import numpy as np

LEVEL = 0.05  # differences that chance makes less often count as more than chance
_RESAMPLES = 10_000
_SEED = 0


def pack(flags: Sequence[bool]) -> str:
    """Flags (N,) as hexadecimal digits, the first flag being the highest bit: 10,000 of them take 2,500 letters."""
    return np.packbits(np.asarray(flags, dtype=bool)).tobytes().hex()


def unpack(digits: str, count: int) -> np.ndarray:
    """The `count` flags that `pack` was given; ValueError when the digits are not those of so many."""
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} flags")
    return np.unpackbits(packed, count=count).astype(bool)


def compare_paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """What `second` gains over `first`, two networks' rights and wrongs (N,) on the same images.

    - `difference_points`: difference of their accuracies, in percentage points;
    - `interval_points`: its 95% interval, by percentiles of 10,000 bootstrap samples of the images;
    - `only_first`, `only_second`: images that only one of them got right;
    - `p_value`: of the exact McNemar test (McNemar 1947): how often chance alone would divide those images at least as
      unevenly, if each were as likely to fall to either network.
    """
    from scipy.stats import binomtest  # takes a second to import

    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    split = only_first + only_second
    # Drawing images anew draws how many are only the first's, only the second's, and both's or neither's.
    shares = np.array([only_first, only_second, count - split]) / count
    drawn = np.random.default_rng(_SEED).multinomial(count, shares, size=_RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 1] - drawn[:, 0]) / count, [2.5, 97.5])
    return {
        "difference_points": 100 * (only_second - only_first) / count,
        "interval_points": [float(low), float(high)],
        "only_first": only_first,
        "only_second": only_second,
        "p_value": float(binomtest(only_second, split).pvalue) if split else 1.0,
    }


def shown_p(p_value: float) -> str:
    """A p value as it is read."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
