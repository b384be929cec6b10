"""Which of several ways is faster: timed by turns in one run, so that a busy or slowing machine slows all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROUNDS = 7
TURN_SECONDS = 0.05  # calls in a turn go on for so long,
CALLS = 3  # and are so many at least: of one call alone, chance decides
Run = Callable[[int], object]  # computes a batch of that size
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Seconds of one way over those of another: the median of the rounds, the least and the most of them."""

    median: float
    least: float
    most: float
    rounds: tuple[float, ...]

    def faster(self, by: float) -> bool:
        """Whether it is so by that share, and was faster in every round but one."""
        return self.median < 1 - by and all(each < 1 for each in sorted(self.rounds)[:-1])

    def as_facts(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "rounds"}


def contest(
    ways: Mapping[str, Run], batches: Sequence[int], rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> dict[str, Ratio]:
    """Each way against the first, over all `batches` (the geometric mean of their ratios).

    Every turn begins with a call that is not counted: threads of whose turn it was before may still be spinning, and
    caches are its.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways)[:: 1 if number % 2 == 0 else -1]
        logs = dict.fromkeys(ways, 0.0)
        for batch in batches:
            for name in order:
                logs[name] += math.log(_turn(ways[name], batch, clock)) / len(batches)
        first = logs[next(iter(ways))]
        for name in ways:
            found[name].append(math.exp(logs[name] - first))
    return {name: Ratio(statistics.median(each), min(each), max(each), tuple(each)) for name, each in found.items()}


def _turn(run: Run, batch: int, clock: Clock) -> float:
    """Seconds of a call: the median of those that fit into a turn."""
    run(batch)
    seconds: list[float] = []
    begin = now = clock()
    while len(seconds) < CALLS or now - begin < TURN_SECONDS:
        before = now
        run(batch)
        now = clock()
        seconds.append(now - before)
    return statistics.median(seconds)
