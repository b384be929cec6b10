"""Percentiles and confidence intervals, against NumPy, SciPy and series whose answer is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from rxdeploy.bench import statistics
from rxdeploy.bench.statistics import latency, percentile, throughput


@pytest.mark.parametrize("size", [2, 3, 10, 99, 100, 101, 999, 1000, 1001, 12345, 41000])
def test_percentiles_are_by_nearest_rank(size: int) -> None:
    samples = np.random.default_rng(size).lognormal(size=size)
    for percent, value in latency(samples.tolist()).percentiles.items():
        if value is not None:
            rank = math.ceil(Fraction(str(percent)) * size / 100)
            assert value == sorted(samples)[rank - 1]
            if percent in (50, 90, 99):  # 99.9 is rounded up in NumPy
                assert value == np.percentile(samples, percent, method="inverted_cdf")


@pytest.mark.parametrize(("percent", "enough"), [(50, 2), (90, 10), (99, 100), (99.9, 1000)])
def test_a_percentile_needs_a_sample_beyond_it(percent: float, enough: int) -> None:
    few = np.arange(enough - 1, dtype=float)
    assert percentile(few, percent) is None
    many = np.arange(enough, dtype=float)
    assert percentile(many, percent) == enough - 2  # all but the last


def test_latency_on_paper() -> None:
    found = latency([0.4, 0.1, 0.3, 0.2])
    assert (found.calls, found.mean, found.fastest, found.median) == (4, 0.25, 0.1, 0.2)
    assert latency([0.7]).median == 0.7
    assert latency([0.7]).percentiles == {50: None, 90: None, 99: None, 99.9: None}


def test_students_t() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy knows the t-distribution")
    expected = [stats.t.ppf(0.975, degrees) for degrees in range(1, statistics.MOST_BLOCKS)]
    np.testing.assert_allclose(statistics._T_975, expected, atol=5e-4)


def test_throughput_on_paper() -> None:
    """20 blocks of two calls, their means 0.09 and 0.11 in turn: a standard deviation of 0.01 * sqrt(20 / 19)."""
    found = throughput([0.08, 0.10, 0.10, 0.12] * 10, images=4)
    assert found.blocks == 20
    assert found.images_per_s == pytest.approx(4 / 0.1)
    margin = 2.093 * 0.01 * (20 / 19) ** 0.5 / 20**0.5
    assert found.low == pytest.approx(4 / (0.1 + margin))
    assert found.high == pytest.approx(4 / (0.1 - margin))


@pytest.mark.parametrize(("calls", "blocks"), [(1, 1), (2, 2), (4, 4), (5, 5), (9, 5), (10, 5), (30, 15), (41, 20)])
def test_blocks_hold_two_calls_where_they_can(calls: int, blocks: int) -> None:
    assert throughput([1.0] * calls, 1).blocks == blocks


def test_calls_that_are_all_alike_leave_no_doubt() -> None:
    found = throughput([0.5] * 40, images=2)
    assert (found.low, found.images_per_s, found.high) == (4, 4, 4)


def test_one_call_says_nothing_of_the_interval() -> None:
    found = throughput([0.5], images=2)
    assert (found.images_per_s, found.low, found.high) == (4, None, None)


def test_two_calls_may_say_that_there_is_no_upper_bound() -> None:
    found = throughput([0.1, 0.5], images=1)
    assert found.low is not None and found.low > 0 and found.high is None


def test_the_interval_holds_for_calls_that_resemble_each_other() -> None:
    """Durations with a slow drift (autoregressive, 0.9): an interval from single calls would be far too narrow."""
    random = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(300):
        noise, drift = random.normal(0, 0.01, 4000), np.empty(4000)
        drift[0] = noise[0]
        for index in range(1, len(drift)):
            drift[index] = 0.9 * drift[index - 1] + noise[index]
        durations = 1 + drift
        found = throughput(durations, images=1)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1 <= found.high
        margin = 1.96 * durations.std() / len(durations) ** 0.5
        naive += abs(durations.mean() - 1) <= margin
    assert covered >= 0.9 * 300
    assert naive < 0.6 * 300
