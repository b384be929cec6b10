"""What a session did: counts, rates and latencies; as an object, as JSON and in Prometheus' text format."""

from __future__ import annotations

import math
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from rxdeploy.errors import InputError

# Of what Snapshot.as_prometheus gives, for an HTTP header.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WINDOW_SECONDS = 10  # of the recent rate

_PER_OCTAVE = 16
_OCTAVES = 30
# Upper edges, inclusive: 1 µs times 2^(i/16). Whole octaves are exact, which Prometheus' buckets rest on.
_EDGES = [
    math.ldexp(1e-6 * 2 ** (step / _PER_OCTAVE), octave) for octave in range(_OCTAVES) for step in range(_PER_OCTAVE)
]
_EDGES.append(math.ldexp(1e-6, _OCTAVES))
_BATCH_EDGES = [2**i for i in range(11)]
# Prometheus' rule for label names; those with two underscores are its own, "le" is a bucket's.
_LABEL = re.compile(r"(?!__|le$)[a-zA-Z_][a-zA-Z0-9_]*")


class Histogram:
    """Durations in logarithmic buckets, 16 an octave from 1 µs to 1074 s; beyond, one bucket on each side.

    `percentile` is off by half a bucket at most: a factor of 2^(1/32), 2.2 %, within that range. Threads may
    share it: every `record` counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(_EDGES) + 1)
        self._sum = 0.0
        self._min = math.inf
        self._max = 0.0

    def record(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._add(seconds)

    def _add(self, seconds: float) -> None:
        self._counts[bisect_left(_EDGES, seconds)] += 1
        self._sum += seconds
        if seconds > self._max:
            self._max = seconds
        if seconds < self._min:
            self._min = seconds

    def merge(self, other: Histogram) -> None:
        """Add everything that `other` has counted."""
        copy = other.copy()
        with self._lock:
            self._counts = [mine + theirs for mine, theirs in zip(self._counts, copy._counts, strict=True)]
            self._sum += copy._sum
            self._min = min(self._min, copy._min)
            self._max = max(self._max, copy._max)

    def copy(self) -> Histogram:
        """All it has counted by now, as one of its own."""
        with self._lock:
            return self._copy()

    def _copy(self) -> Histogram:
        copy = Histogram()
        copy._counts = self._counts.copy()
        copy._sum, copy._min, copy._max = self._sum, self._min, self._max
        return copy

    @property
    def count(self) -> int:
        """How many durations."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """Their sum, seconds."""
        return self._sum

    @property
    def max(self) -> float:
        """The longest, seconds, exactly; 0 when there is none."""
        return self._max

    def percentile(self, q: float) -> float:
        """The least duration, in seconds, that at least `q` percent do not exceed (nearest rank); 0 of nothing.

        InputError when `q` is not in 0..100.
        """
        if not 0 <= q <= 100:
            raise InputError(f"percentile {q}: must be from 0 to 100")
        copy = self.copy()
        count = copy.count
        rank = max(1, math.ceil(q / 100 * count))
        seen = 0
        for index, here in enumerate(copy._counts):
            seen += here
            if seen >= rank and here:
                return min(max(_middle(index), copy._min), copy._max)
        return 0.0

    def cumulative(self) -> list[tuple[float, int]]:
        """(edge in seconds, how many durations were at most that) for every octave."""
        counts = self.copy()._counts
        total, result = 0, []
        for index, edge in enumerate(_EDGES):
            total += counts[index]
            if index % _PER_OCTAVE == 0:
                result.append((edge, total))
        return result


def _middle(index: int) -> float:
    """The geometric middle of a bucket; beyond the edges infinity or 0, which the extremes seen then bound."""
    if index == 0:
        return 0.0
    return math.sqrt(_EDGES[index - 1] * _EDGES[index]) if index < len(_EDGES) else math.inf


class Latency(msgspec.Struct, frozen=True):
    """A histogram in figures; all in seconds but `count`. `buckets`: (edge, how many were at most that)."""

    count: int
    sum: float
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float
    buckets: list[tuple[float, int]]

    @classmethod
    def of(cls, histogram: Histogram) -> Latency:
        """The figures of a histogram that nobody records into meanwhile."""
        count, total = histogram.count, histogram.sum
        return cls(
            count=count,
            sum=total,
            mean=total / count if count else 0.0,
            p50=histogram.percentile(50),
            p90=histogram.percentile(90),
            p99=histogram.percentile(99),
            p999=histogram.percentile(99.9),
            max=histogram.max,
            buckets=histogram.cumulative(),
        )


class Snapshot(msgspec.Struct, frozen=True):
    """All metrics at one moment. Times in seconds, `started` since 1970.

    `runs`: durations of the engine's runs; `enqueued`: runs on a caller's stream, whose duration nobody here
    knows; `errors`: runs that failed. The rest is of `submit`: `requests`, from there to the result;
    `batches`, {size: how many}; requests that `failed`, or were `rejected`, `expired` or `cancelled`.
    """

    started: float
    uptime: float
    images: int
    images_per_second: float
    images_per_second_recent: float
    runs: Latency
    enqueued: int
    errors: int
    requests: Latency
    batches: dict[int, int]
    queue_depth: int
    queue_depth_max: int
    failed: int
    rejected: int
    expired: int
    cancelled: int

    def as_json(self) -> str:
        """One JSON object, the fields as they are named here."""
        return msgspec.json.encode(self).decode()

    def as_prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """Prometheus' text format 0.0.4, `labels` on every sample; InputError for a label name that it forbids."""
        return exposition([(labels or {}, self)])


class Metrics:
    """Counts what happens, from any thread; `snapshot` reads it. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started, self._start = time.time(), clock()
        self._lock = threading.Lock()  # of all that follows: one snapshot is of one moment
        self._runs, self._requests = Histogram(), Histogram()
        self._images = 0
        # One counter of images for every second of the window and the running one, with the second it is of.
        self._recent = [[-1, 0] for _ in range(WINDOW_SECONDS + 1)]
        self._batches: dict[int, int] = {}
        self._enqueued = self._errors = 0
        self._failed = self._rejected = self._expired = self._cancelled = 0
        self._queue: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def record_run(self, images: int, seconds: float | None) -> None:
        """One run of the engine over `images` images; `seconds` is None when it was only enqueued."""
        second = int(self._clock() - self._start)
        slot = self._recent[second % (WINDOW_SECONDS + 1)]
        with self._lock:
            if seconds is None:
                self._enqueued += 1
            else:
                self._runs._add(seconds)
            self._images += images
            if slot[0] < second:
                slot[0], slot[1] = second, images
            else:
                slot[1] += images

    def record_request(self, seconds: float) -> None:
        """One request that got its result, `seconds` after it was submitted."""
        with self._lock:
            self._requests._add(seconds)

    def record_batch(self, size: int, requests: Iterable[float] = ()) -> None:
        """One batch of `size` requests, and what `record_request` is for, at once for those that got a result."""
        with self._lock:
            self._batches[size] = self._batches.get(size, 0) + 1
            for seconds in requests:
                self._requests._add(seconds)

    def count_error(self, number: int = 1) -> None:
        """A run that failed."""
        with self._lock:
            self._errors += number

    def count_failed(self, number: int = 1) -> None:
        """A request that failed, with the error of a run or another."""
        with self._lock:
            self._failed += number

    def count_rejected(self, number: int = 1) -> None:
        """A request for which there was no room."""
        with self._lock:
            self._rejected += number

    def count_expired(self, number: int = 1) -> None:
        """A request that was not started by its deadline."""
        with self._lock:
            self._expired += number

    def count_cancelled(self, number: int = 1) -> None:
        """A request that its caller cancelled before it was started."""
        with self._lock:
            self._cancelled += number

    def watch_queue(self, depth: Callable[[], tuple[int, int]]) -> None:
        """Let `depth` say how many requests wait now, and how many at most did."""
        self._queue = depth

    def snapshot(self) -> Snapshot:
        """All of it, of one moment."""
        depth, deepest = self._queue()
        with self._lock:
            uptime = self._clock() - self._start
            runs, requests = self._runs._copy(), self._requests._copy()
            images, recent = self._images, self._images_in_window(uptime)
            batches = dict(sorted(self._batches.items()))
            enqueued, errors = self._enqueued, self._errors
            failed, rejected, expired, cancelled = self._failed, self._rejected, self._expired, self._cancelled
        return Snapshot(
            started=self._started,
            uptime=uptime,
            images=images,
            images_per_second=images / uptime if uptime > 0 else 0.0,
            images_per_second_recent=recent,
            runs=Latency.of(runs),
            enqueued=enqueued,
            errors=errors,
            requests=Latency.of(requests),
            batches=batches,
            queue_depth=depth,
            queue_depth_max=deepest,
            failed=failed,
            rejected=rejected,
            expired=expired,
            cancelled=cancelled,
        )

    def _images_in_window(self, uptime: float) -> float:
        """Images a second over the window's whole seconds and the running one, or since the start if that is less."""
        first = int(uptime) - WINDOW_SECONDS
        images = sum(count for second, count in self._recent if second >= first)
        seconds = uptime - max(first, 0)
        return images / seconds if seconds > 0 else 0.0

    def json(self) -> str:
        """`snapshot` as JSON."""
        return self.snapshot().as_json()

    def prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """`snapshot` in Prometheus' text format; its content type is `CONTENT_TYPE`."""
        return self.snapshot().as_prometheus(labels)


# (name, type, help, value of a snapshot)
_GAUGES_AND_COUNTERS: list[tuple[str, str, str, Callable[[Snapshot], float]]] = [
    ("rxdeploy_start_time_seconds", "gauge", "When the session was opened, seconds since 1970.", lambda s: s.started),
    ("rxdeploy_images_total", "counter", "Images computed.", lambda s: s.images),
    (
        "rxdeploy_images_per_second",
        "gauge",
        f"Images computed a second, over the last {WINDOW_SECONDS} s.",
        lambda s: s.images_per_second_recent,
    ),
    ("rxdeploy_enqueued_total", "counter", "Runs enqueued on a caller's stream, not timed.", lambda s: s.enqueued),
    ("rxdeploy_errors_total", "counter", "Runs that failed.", lambda s: s.errors),
    ("rxdeploy_queue_depth", "gauge", "Requests that wait for a batch.", lambda s: s.queue_depth),
    ("rxdeploy_queue_depth_max", "gauge", "Most requests that ever waited at once.", lambda s: s.queue_depth_max),
    ("rxdeploy_failed_total", "counter", "Requests that failed.", lambda s: s.failed),
    ("rxdeploy_rejected_total", "counter", "Requests for which the queue had no room.", lambda s: s.rejected),
    ("rxdeploy_expired_total", "counter", "Requests not started by their deadline.", lambda s: s.expired),
    ("rxdeploy_cancelled_total", "counter", "Requests cancelled before they were started.", lambda s: s.cancelled),
]
# buckets (upper edge inclusive, cumulative count), sum, count
_Distribution = tuple[Sequence[tuple[float, int]], float, int]
_HISTOGRAMS: list[tuple[str, str, Callable[[Snapshot], _Distribution]]] = [
    ("rxdeploy_run_seconds", "Duration of one run of the engine.", lambda s: _latency(s.runs)),
    ("rxdeploy_request_seconds", "From submitting a request to its result.", lambda s: _latency(s.requests)),
    ("rxdeploy_batch_size", "Requests computed together in one batch.", lambda s: _sizes(s.batches)),
]


def exposition(sessions: Sequence[tuple[Mapping[str, str], Snapshot]]) -> str:
    """Several sessions in one text, which Prometheus wants grouped by metric; labels must tell them apart."""
    parts = [(_labels(labels), snapshot) for labels, snapshot in sessions]
    return "".join(line + "\n" for line in _lines(parts))


def _lines(parts: Sequence[tuple[str, Snapshot]]) -> Iterator[str]:
    for name, kind, text, value in _GAUGES_AND_COUNTERS:
        yield from (f"# HELP {name} {text}", f"# TYPE {name} {kind}")
        for labels, snapshot in parts:
            yield _sample(name, labels, value(snapshot))
    for name, text, distribution in _HISTOGRAMS:
        yield from (f"# HELP {name} {text}", f"# TYPE {name} histogram")
        for labels, snapshot in parts:
            buckets, total, count = distribution(snapshot)
            for edge, below in [*buckets, (math.inf, count)]:
                le = 'le="+Inf"' if edge == math.inf else f'le="{edge!r}"'
                yield _sample(f"{name}_bucket", f"{labels},{le}" if labels else le, below)
            yield _sample(f"{name}_sum", labels, total)
            yield _sample(f"{name}_count", labels, count)


def _sample(name: str, labels: str, value: float) -> str:
    number = repr(value if isinstance(value, int) else float(value))  # a NumPy float has a repr of its own
    return f"{name}{{{labels}}} {number}" if labels else f"{name} {number}"


def _labels(labels: Mapping[str, str]) -> str:
    for name in labels:
        if not _LABEL.fullmatch(name):
            raise InputError(f"label {name!r}: Prometheus wants letters, digits and _, and keeps le and __ for itself")
    return ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _latency(latency: Latency) -> _Distribution:
    return latency.buckets, latency.sum, latency.count


def _sizes(batches: Mapping[int, int]) -> _Distribution:
    buckets = [(edge, sum(n for size, n in batches.items() if size <= edge)) for edge in _BATCH_EDGES]
    return buckets, sum(size * n for size, n in batches.items()), sum(batches.values())
