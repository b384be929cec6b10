"""The rules of warming up and repeating, with a clock that goes only when a call takes time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest

from rxdeploy.bench.measure import fastest, repeat, timer, warm_up


class Time:
    """A clock, and calls that take the durations given."""

    def __init__(self, durations: Iterable[float]) -> None:
        self.now = 100.0
        self._durations: Iterator[float] = iter(durations)
        self.calls = 0

    def clock(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += next(self._durations)


def test_warm_up_ends_when_three_windows_agree() -> None:
    """Windows of three calls of 0.1 s: medians 0.4, 0.2, then 0.1 thrice."""
    time = Time([0.4] * 3 + [0.2] * 3 + [0.1] * 9 + [9.0])
    found = warm_up(time.call, time.clock)
    assert (found.stable, found.calls) == (True, 15)
    assert found.seconds == pytest.approx(1.2 + 0.6 + 0.9)


def test_within_two_percent_is_agreement_and_beyond_is_not() -> None:
    assert warm_up(*_time([1.0] * 3 + [1.019] * 3 + [1.0] * 3)).stable
    drifting = _time(itertools.chain([1.0] * 3, [1.015] * 3, [1.03] * 3, itertools.repeat(50.0)))
    assert not warm_up(*drifting).stable


def _time(durations: Iterable[float]) -> tuple:
    time = Time(durations)
    return time.call, time.clock


def test_one_slow_call_does_not_spoil_a_window() -> None:
    time = Time([0.1, 5.0, 0.1] + [0.1] * 6)
    assert warm_up(time.call, time.clock).stable


def test_a_window_of_quick_calls_is_a_tenth_of_a_second() -> None:
    time = Time(itertools.repeat(2**-10))
    found = warm_up(time.call, time.clock)
    assert found.stable and found.calls == 3 * 103  # 103 / 1024 is the first not below 0.1


def test_warm_up_gives_up_after_ten_seconds() -> None:
    time = Time(itertools.cycle([0.1] * 3 + [0.2] * 3))
    found = warm_up(time.call, time.clock)
    assert not found.stable and 10 <= found.seconds <= 10.2
    slow = Time(itertools.repeat(30.0))
    found = warm_up(slow.call, slow.clock)
    assert (found.stable, found.calls) == (False, 1)


def test_warm_up_gives_up_after_ten_thousand_calls() -> None:
    time = Time(itertools.repeat(0.0))
    assert (warm_up(time.call, time.clock).calls, time.calls) == (10_000, 10_000)


def test_repeat_goes_on_for_its_time_and_ten_calls() -> None:
    time = Time(itertools.repeat(0.25))
    assert repeat(time.call, 3, time.clock) == [0.25] * 12
    slow = Time([1.0, 2.0] * 5)
    assert repeat(slow.call, 3, slow.clock) == [1.0, 2.0] * 5


def test_repeat_of_very_slow_calls_is_cut_short() -> None:
    time = Time(itertools.repeat(8.0))
    assert repeat(time.call, 3, time.clock) == [8.0] * 4  # 32 s are more than 10 times 3
    time = Time(itertools.repeat(100.0))
    assert repeat(time.call, 3, time.clock) == [100.0] * 3


def test_fastest_goes_on_while_it_finds_anything_faster() -> None:
    """Each call 3% faster than the one before, ten times: over when the first half has the last; 0.5% is none."""
    time = Time(0.2 * 0.97 ** min(index, 9) for index in itertools.count())
    assert fastest(timer(time.call, time.clock), time.clock) == pytest.approx(0.2 * 0.97**9)
    assert time.calls == 20
    steady = Time([0.2] * 3 + [0.199] * 3)
    assert fastest(timer(steady.call, steady.clock), steady.clock) == pytest.approx(0.199)


def test_fastest_ends_after_five_seconds() -> None:
    time = Time(itertools.repeat(4.0))
    assert fastest(timer(time.call, time.clock), time.clock) == 4.0
    assert time.calls == 2


def test_fastest_of_quick_calls_takes_half_a_second() -> None:
    time = Time(itertools.repeat(1 / 128))
    fastest(timer(time.call, time.clock), time.clock)
    assert time.now - 100 == 0.5
