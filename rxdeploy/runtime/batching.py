"""Dynamic batching: many callers with one image each, and an engine that is faster with several at once.

A batch starts when `max_batch` requests wait or the oldest has waited `max_delay_ms`, whichever comes first, and
a worker thread is free. Callers hold a `concurrent.futures.Future`.

How it ends. `close` computes or refuses what waits, and joins the threads. A Batcher that is dropped without it
ends by itself: the workers hold its queue, not it, and see within a second that it is gone. At the exit of the
interpreter what waits is refused, and a batch being computed is given five seconds. A forked child has none of
the threads: there every request fails at once.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.runtime.metrics import Metrics

log = logging.getLogger("rxdeploy.runtime")

_LOOK_SECONDS = 1.0  # how often an idle thread looks whether its batcher is still there
_EXPIRY_SECONDS = 0.001  # how soon after one another deadlines are looked at
_EXIT_SECONDS = 5.0
_NO_IMAGE = np.empty(0, np.uint8)
_FORKED = "this process was forked from the one that loaded the session, whose threads it has not; load after the fork"


class Closed(InputError):
    """The session was closed, or this process forked from the one that has it."""


class Rejected(EnvironmentLacks):
    """There was no room for the request in the queue."""


class DeadlineExceeded(EnvironmentLacks):
    """The request was not started by its deadline."""


@dataclass(frozen=True)
class Batching:
    """How single images are gathered. InputError for values out of range.

    `max_batch`: most images at once, None for what suits the bundle. `max_delay_ms`: longest that a request
    waits for companions while a worker is free. `queue_size`: most requests waiting. `when_full`: what `submit`
    does when that many wait, "block" until there is room or "reject".
    """

    max_batch: int | None = None
    max_delay_ms: float = 2.0
    queue_size: int = 1024
    when_full: Literal["block", "reject"] = "block"

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue_size"):
            value = getattr(self, name)
            if not (name == "max_batch" and value is None) and (not _is_integer(value) or value < 1):
                raise InputError(f"{name} is {value!r}; it must be a whole number, at least 1")
        if not isinstance(self.max_delay_ms, int | float) or not 0 <= self.max_delay_ms < math.inf:
            raise InputError(f"max_delay_ms is {self.max_delay_ms!r}; it must be a number, at least 0")
        if self.when_full not in ("block", "reject"):
            raise InputError(f"when_full is {self.when_full!r}; it must be block or reject")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Batcher:
    """Gathers single images into batches for `run`, from any number of threads and event loops.

    `prepare(image)` gives the array to compute, without a batch axis and always of one shape and dtype; what it
    raises goes to the caller of `submit`. `run(batch)`, called from `workers` threads, takes (n, ...) and gives
    (n, classes), which it may overwrite afterwards. When it raises InputError or CheckFailed for several images,
    each is run alone and has its own outcome; any other error is that of every request of the batch.

    The threads hold `run`: let it not hold this Batcher, or dropping the Batcher will not end them.

    `metrics` gets the batches and what became of the requests; runs, and those that failed, are for `run` to record.
    """

    def __init__(
        self,
        run: Callable[[NDArray], NDArray[np.float32]],
        prepare: Callable[[Any], NDArray],
        batching: Batching,
        metrics: Metrics,
        workers: int = 1,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if batching.max_batch is None:
            raise InputError("max_batch is None; a Batcher needs a number")
        self._prepare, self._clock = prepare, clock
        self._delay = batching.max_delay_ms / 1000
        self._blocks = batching.when_full == "block"
        self._queue = queue = _Queue(batching.max_batch, batching.queue_size, metrics, clock)
        queue.owner = weakref.ref(self, queue.abandon)
        metrics.watch_queue(queue.depth)
        try:
            for i in range(workers):
                queue.start(_Worker(queue, run, metrics, i))
        except EnvironmentLacks:
            queue.close(drain=False)
            raise

    def submit(
        self, image: Any, deadline: float | None = None, timeout: float | None = None
    ) -> Future[NDArray[np.float32]]:
        """Queue one image; the future is of its logits, float32 (classes,), in memory of their own.

        The image is read when its batch starts: leave it as it is until the future is done. `deadline`: seconds
        from now; a request not started by then fails with DeadlineExceeded, about a millisecond later at most.
        `timeout`: longest to wait for room, in seconds; None for as long as it takes. Raises what `prepare`
        does, Closed, and Rejected where there is no room.
        """
        request = self._request(image, deadline)
        if not self._queue.put(request, self._blocks):
            self._queue.await_room(request, timeout)
        return request

    async def submit_async(self, image: Any, deadline: float | None = None) -> NDArray[np.float32]:
        """The logits of one image, as from `submit`, for an event loop.

        Waiting, for room too, holds neither the loop nor a thread; cancelling the task cancels the request.
        """
        import asyncio  # an event loop is running: it was imported long ago

        request = self._request(image, deadline)
        self._queue.put(request, self._blocks)
        return await asyncio.wrap_future(request)

    def close(self, drain: bool = True) -> None:
        """Accept nothing more; compute what waits (`drain`) or fail it with Closed; end the threads.

        Requests that still wait for room fail with Closed. Returns when the threads have ended, and at once
        when it is called from one of them: from a callback of a future, say. May be called again.
        """
        self._queue.close(drain)

    def is_worker(self) -> bool:
        """Whether the calling thread is one of those that compute."""
        return threading.current_thread() in self._queue.threads

    def _request(self, image: Any, deadline: float | None) -> _Request:
        now = self._clock()
        if deadline is None:
            return _Request(self._queue, self._prepare(image), now, now + self._delay, math.inf)
        if math.isnan(deadline):
            raise InputError("deadline is not a number")
        self._queue.keep_deadlines()
        # One that may not wait as long as the others waits half its time: enough is left to start it.
        start_by = now + min(self._delay, deadline / 2)
        return _Request(self._queue, self._prepare(image), now, start_by, now + deadline)


class _Request(Future[NDArray[np.float32]]):
    """One image on its way, and the future that its caller holds."""

    def __init__(self, queue: _Queue, image: NDArray, submitted: float, start_by: float, expires: float) -> None:
        super().__init__()
        self.queue = queue
        self.image = image
        self.submitted = submitted
        self.start_by = start_by  # when a batch with it starts, complete or not
        self.expires = expires
        self.admitted: threading.Event | None = None  # set when one that waited for room waits no longer
        self.refused: Closed | None = None  # why not

    def cancel(self) -> bool:
        """As Future.cancel; and its place in the queue is free at once."""
        if not super().cancel():
            return False
        if self.queue.remove(self):
            self.start()
        return True

    def start(self) -> bool:
        """Whether it is still wanted. For who took it out of the queue, once."""
        if self.set_running_or_notify_cancel():
            return True
        self.image = _NO_IMAGE
        self.queue.metrics.count_cancelled()
        return False

    def settle(self, result: NDArray[np.float32] | None, error: BaseException | None = None) -> None:
        """Hand over the outcome of one that was started."""
        self.image = _NO_IMAGE  # a caller may keep the future, and its image would stay with it
        try:
            if error is None:
                self.set_result(result)  # type: ignore[arg-type]
            else:
                self.set_exception(error)
        except BaseException:  # a callback's SystemExit, or a future settled by its caller: not the others' matter
            log.exception("a result could not be handed over")


class _Queue:
    """The requests that wait, and outside them those for which there is no room yet; each is in one place at most.

    Who takes a request out of here settles it: computes, fails or drops it. Callbacks of futures are other
    people's code, so that is done without the lock.
    """

    def __init__(self, max_batch: int, size: int, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.most = min(max_batch, size)
        self.size = size
        self.metrics = metrics
        self.clock = clock
        self.requests: deque[_Request] = deque()
        self.outside: deque[_Request] = deque()  # empty unless `requests` is full
        self.deepest = 0
        self.look = math.inf  # when a waiting worker, or one told to, looks at the queue next
        self.expiry = math.inf  # when the keeper does
        # Both are stored without the lock by who must not wait for it.
        self.closed, self.drain = False, True
        self.why_closed = "the session is closed; load the bundle again"
        self.owner: weakref.ref[Batcher] | None = None
        self.threads: list[_Worker | _Keeper] = []
        self.keeper: _Keeper | None = None
        self._make_locks()
        _QUEUES.add(self)

    def _make_locks(self) -> None:
        self.lock = threading.Lock()
        self.ready = threading.Condition(self.lock)  # workers wait for a batch
        self.due = threading.Condition(self.lock)  # the keeper waits for a deadline

    def depth(self) -> tuple[int, int]:
        """How many wait, and how many at most did."""
        return len(self.requests), self.deepest

    def start(self, thread: _Worker | _Keeper) -> None:
        """Start one of the threads that `close` ends."""
        try:
            thread.start()
        except RuntimeError as error:
            raise EnvironmentLacks(f"batching: the thread {thread.name} cannot be started: {error}") from None
        self.threads.append(thread)

    def keep_deadlines(self) -> None:
        """Start the thread that watches deadlines, when there is none."""
        if self.keeper is None and not self.closed:
            with self.lock:
                if self.keeper is None:
                    keeper = _Keeper(self)
                    self.start(keeper)
                    self.keeper = keeper

    # Coming in

    def put(self, request: _Request, blocks: bool) -> bool:
        """Whether it is queued; if not, it waits outside. Closed, and Rejected where it may not wait (`blocks`)."""
        with self.lock:
            if self.closed:
                raise Closed(self.why_closed)
            queued = len(self.requests) < self.size
            if queued:
                self._append(request)
            elif blocks:
                request.admitted = threading.Event()
                self.outside.append(request)
            if request.expires < self.expiry:
                self.expiry = request.expires
                self.due.notify()
        if not queued and not blocks:
            self.reject()
        return queued

    def _append(self, request: _Request) -> None:
        requests = self.requests
        requests.append(request)
        waiting = len(requests)
        if waiting > self.deepest:
            self.deepest = waiting
        # A worker is woken for the first request and for a complete batch, not for each between.
        if request.start_by < self.look:
            self.look = request.start_by
            self.ready.notify()
        elif not waiting % self.most:
            self.ready.notify()

    def reject(self) -> NoReturn:
        """Raise Rejected."""
        self.metrics.count_rejected()
        raise Rejected(f"{self.size} requests wait already; submit it later, or load with a larger queue_size")

    def await_room(self, request: _Request, timeout: float | None) -> None:
        """Block until a request from outside is queued, or has failed there. Rejected after `timeout`; Closed."""
        assert request.admitted is not None
        if threading.current_thread() in self.threads:
            timeout = 0  # in a callback: this very thread makes room
        try:
            admitted = request.admitted.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        except BaseException:  # KeyboardInterrupt
            self.remove(request)
            raise
        if not admitted and self.remove(request):
            self.reject()
        if request.refused:
            raise request.refused

    def _admit(self) -> None:
        while self.outside and len(self.requests) < self.size and not self.closed:
            request = self.outside.popleft()
            self._append(request)
            if request.admitted:
                request.admitted.set()

    # Going out

    def next_batch(self) -> list[_Request]:
        """The next batch, waited for; empty when there will be none."""
        with self.lock:
            while True:
                if self.closed and not (self.drain and self.requests):
                    return []
                seconds = self.seconds_to_start(self.clock())
                if seconds <= 0:
                    return self.take()
                self.ready.wait(min(seconds, _LOOK_SECONDS))

    def seconds_to_start(self, now: float) -> float:
        """How long until a batch starts, as things are; sets when to look again."""
        if len(self.requests) >= self.most or (self.closed and self.requests):
            return 0
        self.look = min((request.start_by for request in self.requests), default=math.inf)
        return self.look - now

    def take(self) -> list[_Request]:
        """Take a batch out, in the order of submission, and let in as many from outside."""
        batch = [self.requests.popleft() for _ in range(min(len(self.requests), self.most))]
        self.look = math.inf
        self._admit()
        if self.requests:
            self.ready.notify()  # another worker looks after the rest, or this one will, later
        return batch

    def remove(self, request: _Request) -> bool:
        """Whether it was still waiting, here or outside, and now is not."""
        with self.lock:
            for place in (self.requests, self.outside):
                if request in place:
                    place.remove(request)
                    self._admit()
                    return True
        return False

    def expire(self) -> bool:
        """Wait for the next deadline, a while, or fail what was not started by it; False when there will be none."""
        with self.lock:
            if self.closed and not self.requests:
                return False
            now = self.clock()
            if self.expiry > now:
                self.due.wait(min(max(self.expiry - now, _EXPIRY_SECONDS), _LOOK_SECONDS))
                return True
            waiting = [*self.requests, *self.outside]
            self.requests = deque(request for request in self.requests if request.expires > now)
            self.outside = deque(request for request in self.outside if request.expires > now)
            self.expiry = min((request.expires for request in waiting if request.expires > now), default=math.inf)
            self._admit()
        self.fail_expired(request for request in waiting if request.expires <= now)
        return True

    def fail_expired(self, requests: Iterable[_Request]) -> None:
        """Fail requests that came out too late."""
        for request in requests:
            if request.start():
                self.metrics.count_expired()
                error = DeadlineExceeded("the request was not started by its deadline; more is submitted than computed")
                request.settle(None, error)
            if request.admitted:
                request.admitted.set()

    # The end

    def close(self, drain: bool, timeout: float | None = None) -> None:
        """See Batcher.close; `timeout`: longest to wait for each thread."""
        self.drain = self.drain and drain
        self.closed = True
        if threading.current_thread() in self.threads:
            return  # which looks at `closed` next. It may hold the lock, where a destructor brought us here
        self.wind_up()
        for thread in self.threads:
            thread.join(timeout)

    def abandon(self, _: object) -> None:
        """What the garbage collector calls, maybe in the middle of anything: nothing here that could wait."""
        self.closed = True

    def wind_up(self, error: BaseException | None = None) -> None:
        """When `closed`: refuse what will not be computed, because of `error` perhaps, and tell the threads."""
        if not self.lock.acquire(timeout=_LOOK_SECONDS):
            return  # this very thread holds it, in a destructor; the workers will see to it
        try:
            refused = [*self.outside, *(() if self.drain else self.requests)]
            self.outside.clear()
            if not self.drain:
                self.requests.clear()
            self.ready.notify_all()
            self.due.notify_all()
        finally:
            self.lock.release()
        for request in refused:
            request.refused = Closed(self.why_closed)
            request.refused.__cause__ = error
            if request.start():
                request.settle(None, request.refused)
            if request.admitted:
                request.admitted.set()

    def after_fork(self) -> None:
        """In a forked child: the threads are gone, and a lock that one of them held is held for ever."""
        self._make_locks()
        self.why_closed, self.closed, self.drain = _FORKED, True, False
        in_work = [request for thread in self.threads for request in thread.batch]
        lost = [*in_work, *self.requests, *self.outside]
        self.requests.clear()
        self.outside.clear()
        for request in lost:
            Future.__init__(request)  # its lock too; nobody but this thread could wait for it
            request.set_exception(Closed(_FORKED))


class _Worker(threading.Thread):
    """Computes batches until its queue is closed. Holds the queue and `run`, not the Batcher."""

    def __init__(self, queue: _Queue, run: Callable[[NDArray], NDArray[np.float32]], metrics: Metrics, n: int) -> None:
        super().__init__(name=f"rxdeploy-batching-{n}", daemon=True)
        self._queue, self._engine, self._metrics = queue, run, metrics
        self._staging: NDArray | None = None
        self.batch: deque[_Request] = deque()  # started, and not settled

    def run(self) -> None:
        """Until there is nothing more to do."""
        try:
            while batch := self._queue.next_batch():
                self._serve(batch)
            self._queue.wind_up()
        except BaseException as error:
            # Not the engine's, whose errors are its requests'. Without this thread nothing would be computed.
            log.critical("batching stops: %r", error)
            self._queue.why_closed = f"batching stopped: {error!r}; load the bundle again"
            self._queue.closed, self._queue.drain = True, False
            self._queue.wind_up(error)
            while self.batch:
                self.batch.popleft().settle(None, error)
        finally:
            del self._engine, self._staging  # a future, kept, holds its queue, and that its threads

    def _serve(self, batch: Sequence[_Request]) -> None:
        now = self._queue.clock()
        self._queue.fail_expired(request for request in batch if request.expires <= now)
        self.batch.extend(request for request in batch if request.expires > now and request.start())
        try:
            if self.batch:
                self._compute()
        except BaseException as error:  # no memory to gather them, SystemExit; the next batch may do better
            self._fail(error)

    def _compute(self) -> None:
        images = self._gather()
        size = len(images)
        outcome = self._attempt(images)
        if not isinstance(outcome, Exception):
            now = self._queue.clock()
            self._metrics.record_batch(size, [now - request.submitted for request in self.batch])
            self._deliver(outcome)
            return
        self._metrics.record_batch(size)
        if size > 1 and isinstance(outcome, InputError | CheckFailed):
            for i in range(size):
                self._compute_alone(images[i : i + 1])
        else:
            self._fail(outcome)

    def _gather(self) -> NDArray:
        """The images of the batch, (n, ...): of one a view, of more a view of this worker's own memory."""
        first = self.batch[0].image
        if len(self.batch) == 1:
            return first[None]
        if self._staging is None:
            self._staging = np.empty((self._queue.most, *first.shape), first.dtype)
        # NumPy's own assignment lets go of the GIL for each image, and to get it back takes longer than to copy one.
        flat, size = self._staging.data.cast("B"), first.nbytes
        for slot, request in enumerate(self.batch):
            flat[slot * size : (slot + 1) * size] = np.ascontiguousarray(request.image).data.cast("B")
        return self._staging[: len(self.batch)]

    def _attempt(self, images: NDArray) -> NDArray[np.float32] | Exception:
        try:
            result = self._engine(images)
        except Exception as error:
            return error
        if len(result) != len(images):
            return RuntimeError(f"a run of {len(images)} images gave {len(result)} results")
        return result

    def _deliver(self, logits: NDArray[np.float32]) -> None:
        batch = self.batch
        for row in logits:
            batch[0].settle(row.copy())  # no caller can change another's, nor the next run
            batch.popleft()  # only now: see after_fork

    def _compute_alone(self, image: NDArray) -> None:
        """The first request of those in work."""
        request, outcome = self.batch[0], self._attempt(image)
        if isinstance(outcome, Exception):
            self._metrics.count_failed()
            request.settle(None, outcome)
        else:
            self._metrics.record_request(self._queue.clock() - request.submitted)
            request.settle(outcome[0].copy())
        self.batch.popleft()

    def _fail(self, error: BaseException) -> None:
        self._metrics.count_failed(len(self.batch))
        while self.batch:
            self.batch[0].settle(None, _own(error))
            self.batch.popleft()


def _own(error: BaseException) -> BaseException:
    """A copy for one caller: raising it, each adds its own frames to the traceback, and keeps them alive."""
    try:
        own = copy.copy(error)
    except Exception:  # of a class whose constructor takes something else than `args`
        return error
    own.__cause__ = error.__cause__
    return own.with_traceback(error.__traceback__)


class _Keeper(threading.Thread):
    """Fails requests at their deadline, also while every worker is busy or hangs."""

    batch: Sequence[_Request] = ()

    def __init__(self, queue: _Queue) -> None:
        super().__init__(name="rxdeploy-deadlines", daemon=True)
        self._queue = queue

    def run(self) -> None:
        """Until there is nothing more to do."""
        while self._queue.expire():
            pass


_QUEUES: weakref.WeakSet[_Queue] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A daemon thread inside an engine while the process unloads its library crashes.
    for queue in list(_QUEUES):
        queue.close(drain=False, timeout=_EXIT_SECONDS)


def _after_fork() -> None:
    for queue in list(_QUEUES):
        queue.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
