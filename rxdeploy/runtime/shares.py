"""A host batch in shares: as large as an engine computes well, and several at once where it has several sessions."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines.bundle import Manifest
from rxdeploy.runtime.batching import Closed

# Images that a CPU computes at once; of more, the activations take memory and time: they leave its caches.
LARGEST = 64
_SMALL = 200_000_000  # multiply-adds an image; the digits model has 18 million, ResNeXt-50 4230 million
_MOST_CALLERS = 8

Held = TypeVar("Held")
Compute = Callable[[NDArray], NDArray[np.float32]]  # images, a share at most -> logits


class Shares:
    """Runs host batches on `computes`, one for each session; each may be called by several threads at once.

    A share has at most `largest` images. With one session the caller computes them all; with several, a share goes to
    whoever is free: the caller or the threads kept for it, which are one fewer than the sessions. Thread-safe.

    With `whole`, batches of fewer than `split_from` images are not for the sessions: it computes them.
    """

    def __init__(
        self,
        computes: Sequence[Compute],
        largest: int,
        classes: int,
        whole: Compute | None = None,
        split_from: int = 0,
    ) -> None:
        self._computes, self._largest, self._classes = tuple(computes), largest, classes
        self._whole = (whole,) if whole else self._computes
        self._split_from = split_from
        self._first = itertools.count()  # whose turn it is: small batches of several callers are not all the first's
        helpers = len(self._computes) - 1
        self._pool = ThreadPoolExecutor(helpers, "rxdeploy-share") if helpers else None

    def run(self, images: NDArray, out: NDArray | None = None) -> NDArray[np.float32] | None:
        """Logits of `images`; into `out` when given, and then that is not returned."""
        computes, size = self._computes_for(len(images)), self._size(len(images))
        sessions = len(computes)
        first = next(self._first) % sessions
        if out is None and len(images) <= size:
            return computes[first](images)
        result = np.empty((len(images), self._classes), np.float32) if out is None else out
        waiting = deque(slice(begin, begin + size) for begin in range(0, len(images), size))

        def work(compute: Compute) -> None:
            while (share := _taken(waiting)) is not None:
                try:
                    np.copyto(result[share], compute(images[share]))
                except BaseException:
                    waiting.clear()
                    raise

        others = [computes[(first + n) % sessions] for n in range(1, min(sessions, len(waiting)))]
        helping = self._helping(work, others)
        try:
            work(computes[first])
        finally:
            waiting.clear()
            # Who has not begun is not needed any more; who has, still reads the images and writes the result.
            helping = [future for future in helping if not future.cancel()]
            wait(helping)
        for future in helping:
            future.result()
        return result if out is None else None

    def timed(self, images: NDArray) -> tuple[NDArray[np.float32], float]:
        """Logits of `images`, and the seconds that it took."""
        begin = time.perf_counter()
        logits = self.run(images)
        assert logits is not None  # no `out`
        return logits, time.perf_counter() - begin

    def sizes(self, images: int) -> set[int]:
        """How many images the shares of a batch of `images` have."""
        size = self._size(images)
        return {size, images % size} - {0}

    def close(self) -> None:
        """End the threads, after what they compute."""
        if self._pool is not None:
            self._pool.shutdown()

    def _computes_for(self, images: int) -> tuple[Compute, ...]:
        return self._whole if images < self._split_from else self._computes

    def _size(self, images: int) -> int:
        return min(self._largest, max(1, -(-images // len(self._computes_for(images)))))

    def _helping(self, work: Callable[[Compute], None], computes: Sequence[Compute]) -> list[Future[None]]:
        futures: list[Future[None]] = []
        if self._pool is not None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile: the caller goes on by itself
                futures += (self._pool.submit(work, compute) for compute in computes)
        return futures


class SharedOut(Generic[Held]):
    """An engine that computes host batches by `Shares`, of which it holds what it needs besides until it is closed."""

    _held: tuple[Shares, Held] | None

    def map(self, batches: Iterable[NDArray]) -> Iterator[tuple[NDArray[np.float32], float | None]]:
        """Logits of each of many host batches, in order, and the seconds that each took."""
        for images in batches:
            yield self._open()[0].timed(images)

    def close(self) -> None:
        """Drop what is held; calls that are running end first, as they hold it too."""
        held, self._held = self._held, None
        if held is not None:
            held[0].close()

    def _open(self) -> tuple[Shares, Held]:
        if (held := self._held) is None:
            raise Closed("the session is closed; load the bundle again")
        return held


def callers_at_once(manifest: Manifest) -> int:
    """How many batches of single requests a CPU is best given at once: one a core of a small model, else one in all."""
    small = manifest.counts.multiply_adds < _SMALL
    return min(len(os.sched_getaffinity(0)), _MOST_CALLERS) if small else 1


def _taken(waiting: deque[slice]) -> slice | None:
    """The next share, or None when other threads have taken them all."""
    try:
        return waiting.popleft()
    except IndexError:
        return None
