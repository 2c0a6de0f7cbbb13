"""Intervals: as wide as theory says where it says something, and wider where seeds disagree."""

import numpy as np
import pytest

from experiments.desk.bootstrap import interval


def test_one_seed_gives_the_interval_of_a_share():
    values = np.zeros((1, 400))
    values[0, :100] = 1
    low, high = interval(values)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.006)
    assert high == pytest.approx(0.25 + half, abs=0.006)


def test_stories_that_all_agree_leave_no_doubt():
    assert interval(np.ones((3, 50))) == pytest.approx((1, 1))


def test_seeds_that_disagree_widen_it():
    rng = np.random.default_rng(1)
    agreeing = (rng.random((3, 300)) < 0.5).astype(float)
    disagreeing = (rng.random((3, 300)) < np.array([[0.2], [0.5], [0.8]])).astype(float)
    widths = [high - low for low, high in map(interval, (agreeing, disagreeing))]
    assert widths[1] > 2 * widths[0]


def test_it_is_the_same_every_time():
    values = np.random.default_rng(2).random((3, 40))
    assert interval(values) == interval(values)
