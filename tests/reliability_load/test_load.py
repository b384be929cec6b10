"""Many threads of mixed requests on an engine that fails, with everything that happens counted and checked.

The long run with real engines is reliability/load.py; here the engine is arithmetic, and each result says of which
image it is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rxdeploy.errors import CheckFailed, EnvironmentLacks
from rxdeploy.runtime.batching import Batcher, Batching, Closed, DeadlineExceeded, Rejected
from rxdeploy.runtime.metrics import Metrics

LONG = 60.0  # seconds for what ends soon unless it is lost
THREADS, ROUNDS, MAX_BATCH = 16, 40, 8


class Failure(CheckFailed):
    """Of a batch; each of its images is tried alone."""


class FailureOfAll(EnvironmentLacks):
    """Of a whole batch."""


def image(number: int) -> NDArray[np.float32]:
    return np.array([number, -number], np.float32)


def logits(number: int) -> NDArray[np.float32]:
    return np.array([number, 3 * number + 1], np.float32)


class Engine:
    """`logits` of `image`, in memory that every run uses again; every so manyeth run fails."""

    def __init__(self) -> None:
        self.runs = 0
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.memory = threading.local()

    def __call__(self, images: NDArray) -> NDArray[np.float32]:
        assert self.gate.wait(LONG)
        with self.lock:
            self.runs += 1
            run = self.runs
        if run % 7 == 0:
            raise Failure("made to fail")
        if run % 23 == 0:
            raise FailureOfAll("made to fail")
        if not hasattr(self.memory, "result"):
            self.memory.result = np.empty((MAX_BATCH, 2), np.float32)
        result: NDArray[np.float32] = self.memory.result[: len(images)]
        result[:, 0], result[:, 1] = images[:, 0], 3 * images[:, 0] + 1
        return result[:-1] if run % 31 == 0 else result  # one too few


class Ledger:
    """What became of every request, by its number."""

    def __init__(self) -> None:
        self.ends: dict[int, list[str]] = {}
        self.done: Counter[int] = Counter()
        self.wrong: list[tuple[int, Any]] = []
        self.lock = threading.Lock()

    def ended(self, number: int, end: str) -> None:
        with self.lock:
            self.ends.setdefault(number, []).append(end)

    def outcome(self, number: int, result: Any) -> None:
        if not np.array_equal(result, logits(number)):
            self.wrong.append((number, result))
        self.ended(number, "result")

    def failure(self, number: int, error: BaseException) -> None:
        kinds = {
            CancelledError: "cancelled",
            asyncio.CancelledError: "cancelled",
            DeadlineExceeded: "expired",
            Rejected: "rejected",
            Closed: "closed",
            Failure: "failed",
            FailureOfAll: "failed",
        }
        end = next((end for kind, end in kinds.items() if isinstance(error, kind)), None)
        if end is None and "results" in str(error):
            end = "failed"
        self.ended(number, end or repr(error))

    def watch(self, number: int, future: Future) -> None:
        def done(_: Any) -> None:
            with self.lock:
                self.done[number] += 1

        future.add_done_callback(done)

    def counts(self) -> Counter[str]:
        return Counter(end for ends in self.ends.values() for end in ends)


def caller(batcher: Batcher, ledger: Ledger, numbers: Iterator[int], seed: int, rounds: int) -> None:
    """Bursts of requests, some with deadlines, some cancelled, some from an event loop."""
    choose = random.Random(seed)

    def deadline() -> float | None:
        return choose.choice([None, None, choose.uniform(0, 0.01)])

    async def from_a_loop(own: list[int]) -> None:
        async def one(number: int) -> None:
            try:
                ledger.outcome(number, await batcher.submit_async(image(number), deadline()))
            except Exception as error:
                ledger.failure(number, error)

        await asyncio.wait_for(asyncio.gather(*map(one, own)), LONG)

    for _ in range(rounds):
        own = [next(numbers) for _ in range(choose.randint(1, 12))]
        if choose.random() < 0.2:
            asyncio.run(from_a_loop(own))
            continue
        futures: dict[int, Future] = {}
        for number in own:
            try:
                futures[number] = batcher.submit(image(number), deadline(), timeout=choose.choice([None, 0.001]))
            except (Rejected, Closed) as error:
                ledger.failure(number, error)
            else:
                ledger.watch(number, futures[number])
                if choose.random() < 0.15:
                    futures[number].cancel()
        for number, future in futures.items():
            try:
                ledger.outcome(number, future.result(LONG))
            except (CancelledError, Exception) as error:
                ledger.failure(number, error)


@pytest.mark.parametrize("when_full", ["block", "reject"])
@pytest.mark.parametrize("closing", [None, True, False], ids=["to the end", "drained", "not drained"])
def test_every_request_has_one_end_and_it_is_its_own(
    when_full: Any, closing: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    engine, ledger, metrics = Engine(), Ledger(), Metrics()
    batcher = Batcher(engine, lambda pixels: pixels, Batching(MAX_BATCH, 1.0, 24, when_full), metrics, workers=2)
    each = THREADS * 12 * ROUNDS
    threads = [
        threading.Thread(
            target=caller, args=(batcher, ledger, iter(range(n * each, (n + 1) * each)), n, ROUNDS), daemon=True
        )
        for n in range(THREADS)
    ]
    with caplog.at_level(logging.ERROR):
        for thread in threads:
            thread.start()
        if closing is not None:
            while engine.runs < 60:  # in the midst of it
                threading.Event().wait(0.001)
            batcher.close(closing)
        for thread in threads:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in threads), "lost: somebody still waits"
        batcher.close()
    assert not batcher._queue.requests and not batcher._queue.outside
    assert caplog.records == []  # a result set twice would be logged
    assert ledger.wrong == []
    assert {len(ends) for ends in ledger.ends.values()} == {1}
    assert set(ledger.done.values()) == {1}, "a future is done once"
    counts, snapshot = ledger.counts(), metrics.snapshot()
    known = {"result", "cancelled", "expired", "rejected", "failed", "closed"}
    assert counts.keys() <= known
    assert counts["result"] > 20 and counts["failed"] > 0
    assert (counts["closed"] > 0) == (closing is not None)
    counted = {
        "result": snapshot.requests.count,
        "cancelled": snapshot.cancelled,
        "expired": snapshot.expired,
        "rejected": snapshot.rejected,
        "failed": snapshot.failed,
    }
    assert counted == {end: counts[end] for end in counted}, "the session's metrics saw the same"
    assert sum(size * number for size, number in snapshot.batches.items()) == counts["result"] + counts["failed"]
    assert snapshot.queue_depth == 0 and snapshot.queue_depth_max <= 24


def test_overload_is_refused_at_once_and_what_was_accepted_is_computed() -> None:
    """No clock decides: while the engine does nothing at all, every thread is through with all of its requests."""
    engine, ledger, metrics = Engine(), Ledger(), Metrics()
    engine.gate.clear()
    batcher = Batcher(engine, lambda pixels: pixels, Batching(4, 1.0, 10, "reject"), metrics, workers=1)
    accepted: dict[int, Future] = {}

    def submit(first: int) -> None:
        for number in range(first, first + 100):
            try:
                accepted[number] = batcher.submit(image(number))
            except Rejected as error:
                ledger.failure(number, error)

    threads = [threading.Thread(target=submit, args=(100 * n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert 10 <= len(accepted) <= 14  # the queue, and the batch that stands at the gate
    assert ledger.counts() == {"rejected": 100 * THREADS - len(accepted)} == {"rejected": metrics.snapshot().rejected}
    assert metrics.snapshot().queue_depth_max == 10
    engine.gate.set()
    for number, future in accepted.items():
        np.testing.assert_array_equal(future.result(LONG), logits(number))
    batcher.close()
