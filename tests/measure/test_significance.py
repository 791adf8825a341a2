"""The paired comparison, against statsmodels, and against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from statsmodels.stats.contingency_tables import mcnemar

from cleanai.measure.significance import compare_paired, judge_drop, pack, unpack

QUANTILE = 1.959963984540054


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


def _score(difference, gained, lost, count):
    """Tango's statistic: the share of lost images that is most likely at this difference is found by a search."""

    def unlikely(share):
        rest = max(1 - 2 * share - difference, 1e-300)
        shares = ((gained, share + difference), (lost, share), (count - gained - lost, rest))
        return -sum(images * math.log(each) for images, each in shares)

    bounds = (max(0, -difference) + 1e-12, (1 - difference) / 2)
    share = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    return (gained - lost - count * difference) / math.sqrt(count * (2 * share + difference - difference**2))


@pytest.mark.parametrize(("gained", "lost", "count"), [(12, 2, 50), (3, 17, 200), (300, 310, 10_000), (5, 1, 6)])
def test_the_interval_ends_where_the_score_test_begins_to_reject(gained, lost, count):
    low, high = compare_paired(*_pair(count - gained - lost, lost, gained, 0))["interval_points"]
    assert low < 100 * (gained - lost) / count < high
    for bound, expected in ((low, QUANTILE), (high, -QUANTILE)):
        assert _score(bound / 100, gained, lost, count) == pytest.approx(expected, abs=0.002)


def test_the_interval_of_a_published_size():
    # 12 images gained and 2 lost of 50.
    assert compare_paired(*_pair(30, 2, 12, 6))["interval_points"] == pytest.approx([6.11, 34.47], abs=0.01)


@pytest.mark.parametrize("count", [1, 8, 40, 10_000])
def test_intervals_of_networks_that_agree_or_differ_on_every_image(count):
    # Without a discordant image the score is count x d / sqrt(count x d (1 - d)); with nothing but gained ones it is
    # count x (1 - d) / sqrt(count (1 - d) (1 + d)). Both are solved by hand for d.
    square = QUANTILE**2
    agreeing = compare_paired(*_pair(count, 0, 0, 0))
    bound = 100 * square / (count + square)
    assert agreeing["interval_points"] == pytest.approx([-bound, bound], abs=1e-6)
    assert (agreeing["difference_points"], agreeing["p_value"]) == (0, 1)
    low = 100 * (count - square) / (count + square)
    assert compare_paired(*_pair(0, 0, count, 0))["interval_points"] == pytest.approx([low, 100], abs=1e-6)
    assert compare_paired(*_pair(0, count, 0, 0))["interval_points"] == pytest.approx([-100, -low], abs=1e-6)


@pytest.mark.parametrize(
    ("counts", "accept_drop", "expected"),
    [
        # 1,000 images that agree: the interval is 100 x 3.8415 / 1003.8415 = 0.3827 points to each side of zero.
        ((1000, 0, 0, 0), 0.39, "PASS"),
        ((1000, 0, 0, 0), 0.38, "NOT SHOWN"),
        # 8 images that are all lost: the interval is -100 to -35.118 points.
        ((0, 8, 0, 0), 35.1, "FAIL"),
        ((0, 8, 0, 0), 35.2, "NOT SHOWN"),
        # 8 images that are all gained: 35.118 to 100 points.
        ((0, 0, 8, 0), 0.01, "PASS"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(counts, accept_drop, expected):
    judged = judge_drop(*_pair(*counts), accept_drop)
    assert judged["result"] == expected
    assert judged["accept_drop_points"] == accept_drop


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
