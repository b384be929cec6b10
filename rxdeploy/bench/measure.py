"""Timing a call: warm-up until it is stable, then repeats.

The clock and the call come from outside, so that the rules can be tested without time passing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]  # seconds from any start
Call = Callable[[], object]

WARM_UP_SECONDS = 10.0  # at most, but at least one call
WARM_UP_CALLS = 10_000
WINDOW_CALLS = 3
WINDOW_SECONDS = 0.1
AGREEING_WINDOWS = 3
AGREEMENT = 0.02

FEWEST_CALLS = 10
PATIENCE = 10  # times the seconds asked for that FEWEST_CALLS may take ...
LEAST_CALLS = 3  # ... after these

SHORTEST_SEARCH, LONGEST_SEARCH = 0.5, 5.0  # seconds
FASTEST_CALLS = 6


@dataclass(frozen=True)
class WarmUp:
    """How the warm-up went; `stable` is False when it ended by its limit."""

    stable: bool
    calls: int
    seconds: float


def warm_up(call: Call, clock: Clock = time.perf_counter) -> WarmUp:
    """Call until the medians of three successive windows lie within 2%, or for 10 seconds or 10 000 calls.

    A window is at least 3 calls and 0.1 seconds.
    """
    start = now = clock()
    medians: list[float] = []
    window: list[float] = []
    calls, opened = 0, start
    while now - start < WARM_UP_SECONDS and calls < WARM_UP_CALLS:
        before = now
        call()
        now = clock()
        window.append(now - before)
        calls += 1
        if len(window) >= WINDOW_CALLS and now - opened >= WINDOW_SECONDS:
            medians.append(statistics.median(window))
            window, opened = [], now
            if _agree(medians[-AGREEING_WINDOWS:]):
                return WarmUp(True, calls, now - start)
    return WarmUp(False, calls, now - start)


def _agree(medians: list[float]) -> bool:
    return len(medians) == AGREEING_WINDOWS and max(medians) <= min(medians) * (1 + AGREEMENT)


def repeat(call: Call, seconds: float, clock: Clock = time.perf_counter) -> list[float]:
    """The duration of each call, one after the other, in seconds.

    It goes on for `seconds` and 10 calls; where 10 calls would take more than 10 times `seconds`, 3 will do.
    """
    durations: list[float] = []
    start = now = clock()
    while not _enough(len(durations), now - start, seconds):
        before = now
        call()
        now = clock()
        durations.append(now - before)
    return durations


def _enough(calls: int, elapsed: float, seconds: float) -> bool:
    if elapsed >= PATIENCE * seconds:
        return calls >= LEAST_CALLS
    return elapsed >= seconds and calls >= FEWEST_CALLS


def fastest(timed: Callable[[], float], clock: Clock = time.perf_counter) -> float:
    """The shortest time that `timed`, which returns seconds, gives.

    It is called 6 times and for 0.5 seconds at least, until the second half of the calls found nothing more than 1%
    faster than the first half, or for 5 seconds.
    """
    found: list[float] = []
    start = clock()
    while True:
        found.append(timed())
        elapsed = clock() - start
        settled = len(found) >= FASTEST_CALLS and min(found) >= 0.99 * min(found[: len(found) // 2])
        if elapsed >= LONGEST_SEARCH or (settled and elapsed >= SHORTEST_SEARCH):
            return min(found)


def timer(call: Call, clock: Clock = time.perf_counter) -> Callable[[], float]:
    """A function that calls `call` and returns how long it took, in seconds."""

    def timed() -> float:
        before = clock()
        call()
        return clock() - before

    return timed
