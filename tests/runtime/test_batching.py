"""Dynamic batching with an engine whose results are known, and with clocks and gates in the test's hand."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, RxDeployError
from rxdeploy.runtime import batching
from rxdeploy.runtime.batching import Batcher, Batching, Closed, DeadlineExceeded, Rejected
from rxdeploy.runtime.metrics import Metrics

LONG = 20.0  # seconds for what happens at once unless the code is broken
NEVER_MS = 1e9


def image(number: int) -> NDArray[np.uint8]:
    """An image that its number can be read from."""
    pixels = np.full((8, 8, 3), number % 251, np.uint8)
    pixels[0, 0] = number % 256, number // 256, 7
    return pixels


def number_of(pixels: NDArray[np.uint8]) -> int:
    return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])


def logits(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the engine makes of one image."""
    return np.array([number_of(pixels), pixels.sum(), -1], np.float32)


class Engine:
    """Computes `logits`; remembers the numbers of every batch; waits at a gate; fails as it is told."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.fails: Callable[[list[int]], BaseException | None] = lambda numbers: None
        self.result = np.zeros((64, 3), np.float32)  # used for every run, as an engine may

    def __call__(self, images: NDArray) -> NDArray[np.float32]:
        assert images.shape[1:] == (8, 8, 3)
        assert images.dtype == np.uint8
        numbers = [number_of(pixels) for pixels in images]
        self.batches.append(numbers)
        self.entered.release()
        assert self.gate.wait(LONG)
        if error := self.fails(numbers):
            raise error
        self.result[: len(images)] = [logits(pixels) for pixels in images]
        return self.result[: len(images)]

    def wait_until_in_run(self) -> None:
        assert self.entered.acquire(timeout=LONG)

    @property
    def computed(self) -> list[int]:
        return sorted(number for numbers in self.batches for number in numbers)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += threading.current_thread() is not threading.main_thread()
        return self.now

    def wait_for_look(self, batcher: Batcher, number: int) -> None:
        """Until the worker has looked at the queue so many times, and waits for more."""
        until(lambda: self.looks >= number)
        with batcher._queue.lock:  # which the worker holds from looking until it waits
            pass


def prepare(pixels: Any) -> NDArray[np.uint8]:
    if getattr(pixels, "shape", None) != (8, 8, 3):
        raise InputError("not an image")
    return pixels


@pytest.fixture(autouse=True)
def waking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads look only when they are told to, so that a test fails where one is not told."""
    monkeypatch.setattr(batching, "_LOOK_SECONDS", 5 * LONG)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make(engine: Engine, metrics: Metrics) -> Iterator[Callable[..., Batcher]]:
    """Makes batchers of `engine`, and sees that each of them can still be closed when the test is over."""
    made = []

    def make(
        max_batch: int = 4,
        max_delay_ms: float = 0,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        run: Callable[[NDArray], NDArray[np.float32]] = engine,
        **options: Any,
    ) -> Batcher:
        options = {"max_batch": max_batch, "max_delay_ms": max_delay_ms} | options
        made.append(Batcher(run, prepare, Batching(**options), metrics, workers, clock=clock))
        return made[-1]

    yield make
    engine.gate.set()
    for batcher in made:
        in_time(batcher.close)


def in_time(work: Callable[[], object]) -> None:
    """Do what may hang when the code is broken."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LONG)
    assert not thread.is_alive()


def check(future: Future, number: int) -> None:
    np.testing.assert_array_equal(future.result(LONG), logits(image(number)))


def block(engine: Engine, batcher: Batcher, number: int = 999) -> Future:
    """Make the engine busy with one image until its gate is opened."""
    engine.gate.clear()
    future = batcher.submit(image(number))
    engine.wait_until_in_run()
    return future


def until(condition: Callable[[], bool]) -> None:
    """Give other threads their turn until something is so."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


# Every request has its result, once


@pytest.mark.parametrize(
    ("max_batch", "max_delay_ms", "workers", "queue_size"),
    [(1, 0, 1, 1024), (5, 0, 1, 1024), (16, 0.5, 1, 1024), (4, 0.1, 3, 1024), (8, 0, 2, 3), (3, 1, 1, 1)],
)
def test_many_threads(
    make: Callable[..., Batcher],
    engine: Engine,
    metrics: Metrics,
    max_batch: int,
    max_delay_ms: float,
    workers: int,
    queue_size: int,
) -> None:
    def run(images: NDArray) -> NDArray[np.float32]:
        numbers = [number_of(pixels) for pixels in images]
        engine.batches.append(numbers)
        return np.stack([logits(pixels) for pixels in images])

    batcher = make(max_batch, max_delay_ms, workers, run=run, queue_size=queue_size)

    def caller(thread: int) -> None:
        waiting = []
        for i in range(150):
            number = 150 * thread + i
            waiting.append((number, batcher.submit(image(number))))
            if i % (1 + thread) == 0:  # some wait for each, some let several gather
                while waiting:
                    number, future = waiting.pop()
                    check(future, number)
        for number, future in waiting:
            check(future, number)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(caller, thread) for thread in range(8)]:
            done.result()
    assert engine.computed == list(range(1200))
    assert max(map(len, engine.batches)) <= max_batch
    snapshot = metrics.snapshot()
    assert snapshot.batches == Counter(map(len, engine.batches))
    assert (snapshot.requests.count, snapshot.failed, snapshot.queue_depth) == (1200, 0, 0)
    assert 1 <= snapshot.queue_depth_max <= queue_size


def test_results_are_the_callers_own(make: Callable[..., Batcher]) -> None:
    batcher = make(max_batch=3, max_delay_ms=NEVER_MS)
    futures = [batcher.submit(image(number)) for number in (1, 2, 3)]
    futures[0].result(LONG)[:] = -5
    check(futures[1], 2)
    for number in (4, 5, 6):  # the engine writes its results to the same place again
        batcher.submit(image(number))
    batcher.close()
    check(futures[2], 3)
    assert futures[2].result().base is None


def test_one_image_is_not_copied_and_several_use_one_memory(make: Callable[..., Batcher], engine: Engine) -> None:
    seen = []

    def run(images: NDArray) -> NDArray[np.float32]:
        seen.append(images)
        return engine(images)

    batcher = make(run=run)
    single = image(1)
    check(batcher.submit(single), 1)
    engine.wait_until_in_run()
    assert np.shares_memory(seen[0], single)
    for numbers in ((2, 3, 4), (5, 6)):
        block(engine, batcher)
        futures = [batcher.submit(image(number)) for number in numbers]
        engine.gate.set()
        for future, number in zip(futures, numbers, strict=True):
            check(future, number)
        engine.wait_until_in_run()
    several = [images for images in seen if len(images) > 1]
    assert [len(images) for images in several] == [3, 2]
    assert np.shares_memory(*several)


def test_an_image_in_strides(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=3, max_delay_ms=NEVER_MS)
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, ::2] = image(77)
    futures = [batcher.submit(pixels) for pixels in (image(1), wide[:, ::2], image(2))]
    for future, number in zip(futures, (1, 77, 2), strict=True):
        check(future, number)


def test_a_future_kept_does_not_keep_its_image(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make()
    running = block(engine, batcher)
    pixels = [image(1), image(2)]
    lives = [weakref.ref(each) for each in pixels]
    futures = [batcher.submit(pixels.pop()) for _ in range(2)]
    futures[0].cancel()
    engine.gate.set()
    wait_for([running, *futures], LONG)
    until(lambda: not any(each() is not None for each in lives))


# When a batch starts


def test_a_complete_batch_does_not_wait(make: Callable[..., Batcher], engine: Engine) -> None:
    clock = Clock()
    batcher = make(max_batch=3, max_delay_ms=NEVER_MS, clock=clock)
    clock.wait_for_look(batcher, 1)
    futures = [batcher.submit(image(0))]
    clock.wait_for_look(batcher, 2)
    futures += [batcher.submit(image(number)) for number in range(1, 6)]
    for number, future in enumerate(futures):
        check(future, number)
    assert engine.batches == [[0, 1, 2], [3, 4, 5]]


def test_a_full_queue_is_a_complete_batch(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=100, max_delay_ms=NEVER_MS, queue_size=2)
    for number, future in enumerate([batcher.submit(image(number)) for number in range(2)]):
        check(future, number)
    assert engine.batches == [[0, 1]]


def test_the_oldest_waits_max_delay_and_no_longer(make: Callable[..., Batcher], engine: Engine) -> None:
    clock = Clock()
    batcher = make(max_batch=8, max_delay_ms=2, clock=clock)
    futures = [batcher.submit(image(0))]
    clock.now = 0.0015
    futures.append(batcher.submit(image(1)))
    clock.now = 0.00199
    assert not engine.entered.acquire(timeout=0.02)  # the worker looks every 2 ms of real time
    futures.append(batcher.submit(image(2)))
    clock.now = 0.002
    for number, future in enumerate(futures):
        check(future, number)
    assert engine.batches == [[0, 1, 2]]


def test_while_the_worker_is_busy_the_next_batches_fill(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=4, max_delay_ms=0)
    block(engine, batcher)
    futures = [batcher.submit(image(number)) for number in range(10)]
    engine.gate.set()
    for number, future in enumerate(futures):
        check(future, number)
    assert engine.batches == [[999], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_workers_compute_at_the_same_time(make: Callable[..., Batcher], engine: Engine) -> None:
    barrier = threading.Barrier(3)

    def run(images: NDArray) -> NDArray[np.float32]:
        barrier.wait(LONG)
        return np.stack([logits(pixels) for pixels in images])

    batcher = make(max_batch=2, max_delay_ms=NEVER_MS, workers=3, run=run)
    for number, future in enumerate([batcher.submit(image(number)) for number in range(6)]):
        check(future, number)


def test_a_free_worker_takes_what_comes_while_another_computes(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(workers=2)
    first = block(engine, batcher)
    second = batcher.submit(image(1))
    engine.wait_until_in_run()
    assert engine.batches == [[999], [1]]
    engine.gate.set()
    check(first, 999)
    check(second, 1)


def test_a_busy_worker_leaves_the_rest_to_another(make: Callable[..., Batcher], engine: Engine) -> None:
    clock = Clock()
    batcher = make(max_batch=4, max_delay_ms=5, workers=2, clock=clock)
    engine.gate.clear()
    futures = [batcher.submit(image(number)) for number in range(6)]
    engine.wait_until_in_run()  # one is held with four of them, at the time when they came
    clock.now = 0.005
    engine.wait_until_in_run()
    assert engine.batches == [[0, 1, 2, 3], [4, 5]]
    engine.gate.set()
    for number, future in enumerate(futures):
        check(future, number)


def test_who_takes_a_batch_tells_another_of_the_rest(make: Callable[..., Batcher]) -> None:
    """As when two wake at the same time, and the second was told of the first requests only."""
    batcher = make(max_batch=4)
    queue = batcher._queue
    requests = [batcher._request(image(number), None) for number in range(6)]
    with queue.lock:
        queue.requests.extend(requests)
        assert queue.take() == requests[:4]
    check(requests[4], 4)
    check(requests[5], 5)


# Errors


def test_what_prepare_refuses_is_not_queued(make: Callable[..., Batcher], engine: Engine, metrics: Metrics) -> None:
    batcher = make()
    with pytest.raises(InputError, match="not an image"):
        batcher.submit("a cat")
    check(batcher.submit(image(1)), 1)
    assert engine.batches == [[1]]
    assert metrics.snapshot().failed == 0


@pytest.mark.parametrize("kind", [InputError, CheckFailed])
def test_one_bad_image_fails_alone(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics, kind: type[RxDeployError]
) -> None:
    engine.fails = lambda numbers: kind("image 2 is bad") if 2 in numbers else None
    batcher = make(max_batch=4, max_delay_ms=NEVER_MS)
    futures = [batcher.submit(image(number)) for number in range(4)]
    for number in (0, 1, 3):
        check(futures[number], number)
    with pytest.raises(kind, match="image 2 is bad"):
        futures[2].result(LONG)
    assert engine.batches == [[0, 1, 2, 3], [0], [1], [2], [3]]
    snapshot = metrics.snapshot()
    assert (snapshot.failed, snapshot.requests.count, snapshot.batches) == (1, 3, {4: 1})


ERRORS = [
    ValueError("broken"),
    EnvironmentLacks("no memory on the GPU"),
    MemoryError(),
    SystemExit(3),
    KeyboardInterrupt(),
    UnicodeDecodeError("utf-8", b"", 0, 1, "cannot be copied by its args"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_the_engine_is_everyones_and_the_worker_goes_on(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics, error: BaseException
) -> None:
    engine.fails = lambda numbers: error if 1 in numbers else None
    batcher = make(max_batch=3, max_delay_ms=NEVER_MS)
    futures = [batcher.submit(image(number)) for number in range(6)]
    errors = [future.exception(LONG) for future in futures[:3]]
    assert [(type(found), str(found)) for found in errors] == [(type(error), str(error))] * 3
    assert len(set(map(id, errors))) == 3  # each with a traceback of its own
    for number in (3, 4, 5):
        check(futures[number], number)
    assert engine.batches == [[0, 1, 2], [3, 4, 5]]
    assert metrics.snapshot().failed == 3


def test_an_error_that_cannot_be_copied(make: Callable[..., Batcher], engine: Engine) -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    engine.fails = lambda numbers: Odd(1, 2)
    batcher = make(max_batch=2, max_delay_ms=NEVER_MS)
    for future in [batcher.submit(image(number)) for number in range(2)]:
        with pytest.raises(Odd, match="1 and 2"):
            future.result(LONG)


@pytest.mark.parametrize("result", [None, np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)])
def test_an_engine_that_gives_something_else(make: Callable[..., Batcher], result: Any) -> None:
    batcher = make(max_batch=3, max_delay_ms=NEVER_MS, run=lambda images: result)
    for future in [batcher.submit(image(number)) for number in range(3)]:
        assert isinstance(future.exception(LONG), RuntimeError | TypeError)


def test_a_worker_that_dies_takes_all_with_it(
    make: Callable[..., Batcher], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make()
    block(engine, batcher)
    waiting = batcher.submit(image(1))

    def take(queue: object) -> None:
        raise MemoryError("no room for a list")

    monkeypatch.setattr(batching._Queue, "take", take)
    engine.gate.set()
    with pytest.raises(Closed, match="no room for a list"):
        waiting.result(LONG)
    with pytest.raises(Closed, match="no room for a list"):
        batcher.submit(image(2))


def test_a_worker_that_dies_with_a_batch(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_failed(number: int = 1) -> None:
        raise MemoryError("no room for a number")

    monkeypatch.setattr(metrics, "count_failed", count_failed)
    engine.fails = lambda numbers: ValueError("broken")
    batcher = make(max_batch=2, max_delay_ms=NEVER_MS)
    for future in [batcher.submit(image(number)) for number in range(2)]:
        with pytest.raises(MemoryError, match="no room for a number"):
            future.result(LONG)


def test_a_callback_harms_nobody_else(make: Callable[..., Batcher], engine: Engine) -> None:
    def callback(future: Future) -> None:
        raise SystemExit

    batcher = make(max_batch=3)
    block(engine, batcher)
    futures = [batcher.submit(image(number)) for number in range(3)]
    futures[0].add_done_callback(callback)
    engine.gate.set()
    for number, future in enumerate(futures):
        check(future, number)
    check(batcher.submit(image(5)), 5)


# Cancellation and deadlines


def test_a_cancelled_request_is_not_computed(make: Callable[..., Batcher], engine: Engine, metrics: Metrics) -> None:
    batcher = make(max_batch=4)
    running = block(engine, batcher)
    futures = [batcher.submit(image(number)) for number in range(4)]
    assert futures[1].cancel()
    assert futures[1].cancel()
    assert metrics.snapshot().queue_depth == 3
    assert not running.cancel()
    assert wait_for([futures[1]], LONG).done  # its waiters are told at once
    engine.gate.set()
    for number in (0, 2, 3):
        check(futures[number], number)
    check(running, 999)
    with pytest.raises(CancelledError):
        futures[1].result()
    assert engine.batches == [[999], [0, 2, 3]]
    assert metrics.snapshot().cancelled == 1


def test_cancelling_in_the_moment_of_starting(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was taken out of the queue, and is cancelled before it is marked as running."""
    batcher = make(max_batch=3)
    block(engine, batcher)
    futures = [batcher.submit(image(number)) for number in range(3)]
    take = batching._Queue.take

    def take_and_cancel(queue: Any) -> Any:
        batch = take(queue)
        queue.lock.release()
        if batch[0] is futures[0]:
            assert futures[0].cancel()
        queue.lock.acquire()
        return batch

    monkeypatch.setattr(batching._Queue, "take", take_and_cancel)
    engine.gate.set()
    check(futures[1], 1)
    check(futures[2], 2)
    assert futures[0].cancelled()
    assert engine.batches == [[999], [1, 2]]
    assert metrics.snapshot().cancelled == 1


def test_a_deadline_is_kept_while_the_worker_hangs(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics
) -> None:
    batcher = make()
    block(engine, batcher)
    patient = batcher.submit(image(2), deadline=1000)
    late = batcher.submit(image(1), deadline=0.01)
    hurried = batcher.submit(image(3), deadline=0.005)
    for future in (late, hurried):
        with pytest.raises(DeadlineExceeded):
            future.result(LONG)
    assert metrics.snapshot().queue_depth == 1
    engine.gate.set()
    check(patient, 2)
    check(batcher.submit(image(4), deadline=LONG), 4)
    assert engine.computed == [2, 4, 999]
    assert metrics.snapshot().expired == 2


def test_a_worker_does_not_start_what_is_late(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody keeps deadlines in time, they are still looked at before a batch starts."""
    monkeypatch.setattr(batching._Queue, "keep_deadlines", lambda queue: None)
    clock = Clock()
    batcher = make(clock=clock)
    block(engine, batcher)
    late, in_time = batcher.submit(image(1), deadline=1), batcher.submit(image(2), deadline=3)
    clock.now = 2.0
    engine.gate.set()
    check(in_time, 2)
    with pytest.raises(DeadlineExceeded):
        late.result(LONG)
    assert engine.computed == [2, 999]
    assert metrics.snapshot().expired == 1


def test_a_batch_starts_early_for_a_deadline(make: Callable[..., Batcher], engine: Engine) -> None:
    clock = Clock()
    batcher = make(max_batch=4, max_delay_ms=1000, clock=clock)
    patient = batcher.submit(image(0))
    hurried = batcher.submit(image(1), deadline=0.02)
    assert not engine.entered.acquire(timeout=0.03)
    clock.now = 0.01
    check(hurried, 1)
    check(patient, 0)
    assert engine.batches == [[0, 1]]


@pytest.mark.parametrize("deadline", [0, -1.0, -float("inf")])
def test_a_deadline_that_has_passed(make: Callable[..., Batcher], engine: Engine, deadline: float) -> None:
    with pytest.raises(DeadlineExceeded):
        make().submit(image(1), deadline=deadline).result(LONG)
    assert not engine.batches


def test_deadlines_that_are_none(make: Callable[..., Batcher]) -> None:
    batcher = make()
    with pytest.raises(InputError, match="deadline"):
        batcher.submit(image(1), deadline=float("nan"))
    check(batcher.submit(image(2), deadline=float("inf")), 2)


# A full queue


def test_rejection(make: Callable[..., Batcher], engine: Engine, metrics: Metrics) -> None:
    batcher = make(max_batch=2, queue_size=2, when_full="reject")
    block(engine, batcher)
    futures = [batcher.submit(image(number)) for number in range(2)]
    with pytest.raises(Rejected, match="2 requests wait already"):
        batcher.submit(image(2))
    futures[1].cancel()
    futures.append(batcher.submit(image(3)))  # there is room again
    engine.gate.set()
    check(futures[0], 0)
    check(futures[2], 3)
    assert engine.computed == [0, 3, 999]
    snapshot = metrics.snapshot()
    assert (snapshot.rejected, snapshot.queue_depth_max) == (1, 2)


def test_blocking_until_there_is_room_in_the_order_of_arrival(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)
    batcher.submit(image(0))
    with ThreadPoolExecutor(3) as pool:
        callers = []
        for number in range(1, 4):
            callers.append(pool.submit(batcher.submit, image(number)))
            until(lambda count=number: len(batcher._queue.outside) == count)
        assert not any(caller.done() for caller in callers)
        engine.gate.set()
        for number, caller in enumerate(callers, 1):
            check(caller.result(LONG), number)
    assert engine.batches == [[999], [0], [1], [2], [3]]


def test_blocking_no_longer_than_timeout(make: Callable[..., Batcher], engine: Engine, metrics: Metrics) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)
    queued = batcher.submit(image(0), timeout=0)
    for timeout in (0.01, 0, -1):
        with pytest.raises(Rejected):
            batcher.submit(image(1), timeout=timeout)
    engine.gate.set()
    check(queued, 0)
    assert engine.computed == [0, 999]
    assert metrics.snapshot().rejected == 3


@pytest.mark.parametrize("timeout", [LONG, 1e300, float("inf")])
def test_room_within_timeout(make: Callable[..., Batcher], engine: Engine, timeout: float) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)
    futures = [batcher.submit(image(0))]
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(batcher.submit, image(1), timeout=timeout)
        until(lambda: caller.done() or len(batcher._queue.outside) == 1)
        engine.gate.set()
        futures.append(caller.result(LONG))
    for number, future in enumerate(futures):
        check(future, number)


def test_a_deadline_passes_while_waiting_for_room(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)
    queued = batcher.submit(image(0))
    with pytest.raises(DeadlineExceeded):
        batcher.submit(image(1), deadline=0.005).result(LONG)
    engine.gate.set()
    check(queued, 0)


def test_what_expires_makes_room(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)
    late = batcher.submit(image(0), deadline=0.005)
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(batcher.submit, image(1)).result(LONG)
    with pytest.raises(DeadlineExceeded):
        late.result(LONG)
    engine.gate.set()
    check(queued, 1)


def test_a_callback_that_submits_to_a_full_queue(make: Callable[..., Batcher], engine: Engine) -> None:
    """It runs in the thread that makes room: waiting there would be for ever."""
    batcher = make(max_batch=1, queue_size=1)
    outcome: Future = Future()

    def callback(future: Future) -> None:
        try:
            batcher.submit(image(2))
        except Rejected as error:
            outcome.set_result(error)

    running = block(engine, batcher)
    running.add_done_callback(callback)
    queued = batcher.submit(image(1))
    engine.gate.set()
    assert outcome.result(LONG)
    check(queued, 1)


# The end


def test_close_computes_what_waits(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=4, max_delay_ms=NEVER_MS)
    futures = [batcher.submit(image(number)) for number in range(10)]
    in_time(batcher.close)
    assert all(future.done() for future in futures)
    for number, future in enumerate(futures):
        check(future, number)
    assert not any(thread.is_alive() for thread in batcher._queue.threads)
    with pytest.raises(Closed, match="closed"):
        batcher.submit(image(1))
    in_time(batcher.close)
    in_time(lambda: batcher.close(drain=False))


def test_close_without_computing(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=2)
    running = block(engine, batcher)
    futures = [batcher.submit(image(number)) for number in range(3)]
    closer = threading.Thread(target=batcher.close, args=(False,), daemon=True)
    closer.start()
    for future in futures:
        with pytest.raises(Closed):
            future.result(LONG)
    assert closer.is_alive()  # a run cannot be stopped
    engine.gate.set()
    closer.join(LONG)
    assert not closer.is_alive()
    check(running, 999)
    assert engine.batches == [[999]]


@pytest.mark.parametrize("drain", [True, False])
def test_closing_from_many_threads(make: Callable[..., Batcher], engine: Engine, drain: bool) -> None:
    batcher = make(max_batch=2, workers=2)
    futures = [batcher.submit(image(number), deadline=LONG) for number in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(batcher.close, drain) for _ in range(8)]:
            done.result(LONG)
    assert not any(thread.is_alive() for thread in batcher._queue.threads)
    for number, future in enumerate(futures):
        assert future.done()
        if drain or not future.exception():
            check(future, number)
        else:
            assert isinstance(future.exception(), Closed)


def test_closing_refuses_who_waits_for_room(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)
    queued = batcher.submit(image(0))
    with ThreadPoolExecutor(2) as pool:
        blocked = pool.submit(batcher.submit, image(1))
        until(lambda: len(batcher._queue.outside) == 1)
        closer = pool.submit(batcher.close)
        with pytest.raises(Closed):
            blocked.result(LONG)
        engine.gate.set()
        closer.result(LONG)
    check(queued, 0)
    assert engine.computed == [0, 999]


def test_changing_ones_mind_while_closing(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1)
    block(engine, batcher)
    queued = batcher.submit(image(0))
    closers = [threading.Thread(target=batcher.close, args=(drain,), daemon=True) for drain in (True, False)]
    closers[0].start()
    until(lambda: batcher._queue.closed)
    assert not queued.done()
    closers[1].start()
    with pytest.raises(Closed):
        queued.result(LONG)
    engine.gate.set()
    for closer in closers:
        closer.join(LONG)
        assert not closer.is_alive()


@pytest.mark.parametrize("drain", [True, False])
def test_closing_from_a_callback(make: Callable[..., Batcher], engine: Engine, drain: bool) -> None:
    batcher = make(max_batch=1)
    running = block(engine, batcher)
    running.add_done_callback(lambda future: batcher.close(drain))
    queued = batcher.submit(image(1))
    engine.gate.set()
    if drain:
        check(queued, 1)
    else:
        assert isinstance(queued.exception(LONG), Closed)
    for thread in batcher._queue.threads:
        thread.join(LONG)
        assert not thread.is_alive()


def test_a_batcher_that_is_dropped_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_LOOK_SECONDS", 0.01)

    def run(images: NDArray) -> NDArray[np.float32]:
        return engine(images)

    run_lives = weakref.ref(run)
    batcher = Batcher(run, prepare, Batching(max_batch=4, max_delay_ms=NEVER_MS), Metrics(), workers=2)
    future = batcher.submit(image(1), deadline=1e6)
    threads = list(batcher._queue.threads)
    assert len(threads) == 3
    del run, batcher
    gc.collect()
    check(future, 1)
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    del threads, thread
    gc.collect()
    assert run_lives() is None  # though the future is kept


def test_closing_in_a_destructor_in_the_worker_itself(
    make: Callable[..., Batcher], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage is collected in any thread at any time, also in a worker that holds the lock."""
    batcher = make(max_batch=4, max_delay_ms=NEVER_MS)
    seconds_to_start = batching._Queue.seconds_to_start

    class Owner:
        def __del__(self) -> None:
            batcher.close()

    def drop_owner(queue: Any, now: float) -> float:
        if queue.requests:
            Owner()
        return seconds_to_start(queue, now)

    monkeypatch.setattr(batching._Queue, "seconds_to_start", drop_owner)
    check(batcher.submit(image(1)), 1)
    for thread in batcher._queue.threads:
        thread.join(LONG)
        assert not thread.is_alive()


def test_no_thread_to_be_had(make: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    start = threading.Thread.start
    started = []

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(EnvironmentLacks, match="can't start new thread"):
        Batcher(engine, prepare, Batching(max_batch=4), Metrics(), workers=2)
    monkeypatch.undo()
    started[0].join(LONG)
    assert not started[0].is_alive()


PROGRAM = """
import sys, threading, time
import numpy as np
from rxdeploy.runtime.batching import Batcher, Batching
from rxdeploy.runtime.metrics import Metrics

started = threading.Event()

def run(images):
    started.set()
    time.sleep(0.05)
    print("computed", len(images), flush=True)
    return np.zeros((len(images), 3), np.float32)

batcher = Batcher(run, lambda image: image, Batching(max_batch=2), Metrics())
futures = [batcher.submit(np.zeros(3, np.uint8), deadline=100) for _ in range(9)]
for future in futures[-1:]:
    future.add_done_callback(lambda future: print(type(future.exception()).__name__, flush=True))
started.wait()
"""


def test_the_exit_of_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[:-1] == ["Closed", "computed 2"]  # the batch in work is finished, no other begun


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_is_told(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1)
    running = block(engine, batcher)
    queued = batcher.submit(image(1), deadline=1000)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with batcher._queue.lock, running._condition, queued._condition:
            held.set()
            release.wait(LONG)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(LONG)
    child = os.fork()
    if not child:
        signal.alarm(int(LONG))  # ends it if it hangs
        status = 1
        try:
            for future in (running, queued):
                with pytest.raises(Closed, match="forked"):
                    future.result(LONG)
            with pytest.raises(Closed, match="load after the fork"):
                batcher.submit(image(2))
            batcher.close()
            another = Batcher(lambda images: images[:, 0, 0], prepare, Batching(max_batch=1), Metrics())
            assert another.submit(image(3), deadline=100).result(LONG)[0] == 3
            status = 0
        finally:
            os._exit(status)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.gate.set()  # the parent goes on
    check(running, 999)
    check(queued, 1)


# asyncio


def test_coroutines(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=8, max_delay_ms=1)

    async def main() -> list[NDArray[np.float32]]:
        return await asyncio.gather(*(batcher.submit_async(image(number)) for number in range(100)))

    for number, result in enumerate(asyncio.run(main())):
        np.testing.assert_array_equal(result, logits(image(number)))
    assert engine.computed == list(range(100))


def test_waiting_for_room_holds_neither_the_loop_nor_a_thread(
    make: Callable[..., Batcher], engine: Engine, metrics: Metrics
) -> None:
    batcher = make(max_batch=2, queue_size=2)
    block(engine, batcher)
    threads = threading.active_count()

    async def main() -> list[NDArray[np.float32]]:
        tasks = [asyncio.create_task(batcher.submit_async(image(number))) for number in range(20)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # all have submitted
        assert threading.active_count() == threads
        assert metrics.snapshot().queue_depth == 2
        assert not any(task.done() for task in tasks)
        engine.gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), LONG)

    for number, result in enumerate(asyncio.run(main())):
        np.testing.assert_array_equal(result, logits(image(number)))
    assert engine.batches[1:] == [[n, n + 1] for n in range(0, 20, 2)]


def test_cancelling_tasks_cancels_requests(make: Callable[..., Batcher], engine: Engine, metrics: Metrics) -> None:
    batcher = make(max_batch=2, queue_size=2)
    block(engine, batcher)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit_async(image(number))) for number in range(5)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # queued
        tasks[3].cancel()  # waiting for room
        await asyncio.sleep(0)
        engine.gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONG)

    results = asyncio.run(main())
    for number in (0, 2, 4):
        np.testing.assert_array_equal(results[number], logits(image(number)))
    assert [type(results[number]) for number in (1, 3)] == [asyncio.CancelledError] * 2
    assert engine.batches == [[999], [0, 2], [4]]
    assert metrics.snapshot().cancelled == 2


def test_errors_reach_coroutines(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1, when_full="reject")
    block(engine, batcher)

    async def main() -> None:
        with pytest.raises(InputError, match="not an image"):
            await batcher.submit_async("a cat")
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(batcher.submit_async(image(1), deadline=0.005), LONG)
        queued = asyncio.create_task(batcher.submit_async(image(2)))
        await asyncio.sleep(0)
        with pytest.raises(Rejected):
            await batcher.submit_async(image(3))
        threading.Thread(target=batcher.close, args=(False,), daemon=True).start()
        with pytest.raises(Closed):
            await asyncio.wait_for(queued, LONG)
        with pytest.raises(Closed):
            await batcher.submit_async(image(4))

    asyncio.run(main())


def test_closing_refuses_a_coroutine_that_waits_for_room(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1, queue_size=1)
    block(engine, batcher)

    async def main() -> None:
        queued, outside = (asyncio.create_task(batcher.submit_async(image(number))) for number in (1, 2))
        await asyncio.sleep(0)
        threading.Thread(target=batcher.close, daemon=True).start()
        with pytest.raises(Closed):
            await asyncio.wait_for(outside, LONG)
        engine.gate.set()
        np.testing.assert_array_equal(await asyncio.wait_for(queued, LONG), logits(image(1)))

    asyncio.run(main())


def test_a_loop_that_ends_before_its_request(make: Callable[..., Batcher], engine: Engine) -> None:
    batcher = make(max_batch=1)
    block(engine, batcher)

    async def main() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(batcher.submit_async(image(1)), 0.005)

    asyncio.run(main())
    engine.gate.set()
    check(batcher.submit(image(2)), 2)
    assert engine.computed == [2, 999]


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_batch": True},
        {"max_batch": 2.0},
        {"max_delay_ms": -1},
        {"max_delay_ms": float("nan")},
        {"max_delay_ms": float("inf")},
        {"max_delay_ms": "2"},
        {"queue_size": 0},
        {"queue_size": None},
        {"when_full": "drop"},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Batching(**options)


def test_a_batcher_needs_a_batch_size(engine: Engine) -> None:
    assert Batching().max_batch is None
    with pytest.raises(InputError, match="max_batch"):
        Batcher(engine, prepare, Batching(), Metrics())
