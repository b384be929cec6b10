"""Whether one way is faster than another, with a clock that only the ways move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from rxdeploy.tuning.contest import ROUNDS, Ratio, contest


class Machine:
    """Whose clock moves by what each way takes, times how busy it is in that round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy: Callable[[int], float] = lambda calls: 1.0
        self.calls = 0

    def clock(self) -> float:
        return self.now

    def way(self, seconds: float, first: float = 0.0) -> Callable[[int], None]:
        """`first` is what a call takes longer when another way ran before it."""

        def run(batch: int) -> None:
            self.calls += 1
            extra, self.last = (first if getattr(self, "last", None) is not run else 0.0), run
            self.now += (seconds * batch + extra) * self.busy(self.calls)

        return run


def test_the_first_is_the_measure() -> None:
    machine = Machine()
    found = contest(
        {"a": machine.way(0.02), "b": machine.way(0.03), "c": machine.way(0.01)}, (1, 8), clock=machine.clock
    )
    assert {name: ratio.median for name, ratio in found.items()} == pytest.approx({"a": 1, "b": 1.5, "c": 0.5})
    assert all(len(ratio.rounds) == ROUNDS for ratio in found.values())


def test_batches_count_alike() -> None:
    machine = Machine()

    def other(batch: int) -> None:
        machine.way(0.01 if batch == 1 else 0.04)(batch)

    found = contest({"a": machine.way(0.02), "b": other}, (1, 8), clock=machine.clock)
    assert found["b"].median == pytest.approx(math.sqrt(0.5 * 2.0))


def test_what_the_turn_before_left_behind_is_not_counted() -> None:
    machine = Machine()
    found = contest({"a": machine.way(0.02, first=5), "b": machine.way(0.01)}, (1,), clock=machine.clock)
    assert found["b"].median == pytest.approx(0.5)


def test_a_machine_that_slows_down_slows_all_alike() -> None:
    machine = Machine()
    machine.busy = lambda calls: 1 + calls / 20
    found = contest({"a": machine.way(0.06), "b": machine.way(0.03)}, (1, 2), clock=machine.clock)
    assert found["b"].median == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("rounds", "by", "expected"),
    [
        ((0.9, 0.9, 0.95), 0.01, True),
        ((0.9, 0.9, 1.4), 0.01, True),  # one round may be disturbed
        ((0.9, 1.01, 1.4), 0.01, False),
        ((0.9, 0.9, 1.01, 1.4), 0.01, False),
        ((0.995, 0.995, 0.995), 0.01, False),  # not worth it
        ((0.9, 0.9, 0.95), 0.2, False),
    ],
)
def test_faster(rounds: Sequence[float], by: float, expected: bool) -> None:
    middle = sorted(rounds)[len(rounds) // 2] if len(rounds) % 2 else sum(sorted(rounds)[1:3]) / 2
    assert Ratio(middle, min(rounds), max(rounds), tuple(rounds)).faster(by) is expected
