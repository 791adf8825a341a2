"""The paired comparison, against statsmodels and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar

from cleanai.measure.significance import compare_paired, pack, unpack


def _pair(both, only_first, only_second, neither):
    """The flags of two networks that classify these numbers of images correctly, in random order."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    order = np.random.default_rng(1).permutation(len(first))
    return np.array(first)[order], np.array(second)[order]


@pytest.mark.parametrize("counts", [(800, 10, 25, 165), (30, 9, 1, 5), (2900, 140, 131, 429), (5, 0, 6, 2)])
def test_the_p_value_is_that_of_statsmodels(counts):
    both, only_first, only_second, neither = counts
    compared = compare_paired(*_pair(*counts))
    expected = mcnemar([[both, only_first], [only_second, neither]], exact=True).pvalue
    assert compared["p_value"] == pytest.approx(expected, rel=1e-9)
    assert (compared["only_first"], compared["only_second"]) == (only_first, only_second)
    assert compared["difference_points"] == pytest.approx(100 * (only_second - only_first) / sum(counts))


def test_a_p_value_calculated_by_hand():
    # 9 images are correct only with one network, 1 only with the other: 2 x (1 + 10) of the 2^10 ways are at least as
    # uneven.
    assert compare_paired(*_pair(30, 9, 1, 5))["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)


def test_the_interval_is_that_of_the_bootstrap_of_scipy():
    first, second = _pair(800, 10, 25, 165)
    low, high = compare_paired(first, second)["interval_points"]
    points = 100.0 * (second.astype(int) - first.astype(int))
    resampled = bootstrap((points,), np.mean, n_resamples=4000, batch=500, method="percentile", random_state=0)
    expected = resampled.confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.15)  # both are random
    assert low < 1.5 < high
    assert compare_paired(first, second)["interval_points"] == [low, high], "the same numbers every time"


def test_networks_that_agree_on_every_image_have_no_difference():
    compared = compare_paired(*_pair(30, 0, 0, 10))
    assert (compared["difference_points"], compared["p_value"]) == (0, 1)
    low, high = compared["interval_points"]
    assert low == -high and 2 < high < 10, "40 images that agree do not show that all would"
    few, many = (compare_paired(*_pair(count, 0, 0, 0))["interval_points"][1] for count in (8, 10_000))
    assert few > 10 and many < 0.05


@pytest.mark.parametrize("count", [1, 7, 8, 9, 10_000])
def test_flags_are_packed_and_unpacked(count):
    flags = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.8
    packed = pack(flags)
    assert len(packed) == 2 * -(-count // 8)
    assert unpack(packed, count).tolist() == flags.tolist()


@pytest.mark.parametrize("digits", ["ff", "fffff0", "zz", "fff"])
def test_digits_of_another_length_are_refused(digits):
    with pytest.raises(ValueError):
        unpack(digits, 16)
