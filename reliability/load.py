"""Load: 64 threads of mixed work on a session whose engine fails now and then. Is anything lost, doubled or swapped?

On the digits model, ONNX Runtime and OpenVINO, each with a queue that rejects and with one that blocks. The threads use
`submit`, `submit_async`, `run`, `map` and `classify` with mixed batch sizes, random deadlines and cancellations; an
engine that raises, stalls or gives too few results stands before the real one. Every result is compared with that of
its image alone, and every request's end is counted. Each session is closed while the threads go on. Then overload:
while the engine computes nothing, how soon is a request refused? Writes reliability/results/load.json; exit code 1
when a promise is broken.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import machine

import rxdeploy
from rxdeploy.cache import open_cache
from rxdeploy.cards import find_card
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.pipeline import Pipeline, Request
from rxdeploy.runtime import Batching
from rxdeploy.runtime.batching import Closed, DeadlineExceeded, Rejected
from rxdeploy.runtime.metrics import Histogram

MODEL = "digits_resnext14_8x8d"
IMAGES = 64  # different ones
FILES = 24  # and one more that is no image
MAX_BATCH, MAX_DELAY_MS, QUEUE = 8, 2.0, 128
BURST = 16  # requests that one thread has under way at most
TOLERANCE = 1e-4  # relative L2 between a batched and an unbatched result: sums in another order
APART = 100 * TOLERANCE  # at least, between the results of any two images: one for another cannot pass
PAUSE = 1.0  # seconds without a sample: this process was stopped, and latencies then say nothing
FLAT = 0.05  # by how much of itself the memory may grow from the second to the last quarter
WARM = 60.0  # seconds that a session must be under load before its memory is judged
REJECTED_WITHIN = 0.1  # seconds, the 99th percentile, of 64 threads at once
MEBI = 1 << 20


class Injected(CheckFailed):
    """A failure that this script made. Of a batch, after it every image is tried alone."""


class InjectedForAll(EnvironmentLacks):
    """The same, of the whole batch."""


SHORT = "results"  # what the error of a run that gave too few says, and no other
ENDS = {
    Injected: "injected failure",
    InjectedForAll: "injected failure",
    DeadlineExceeded: "deadline",
    Rejected: "rejected",
    Closed: "closed",
    CancelledError: "cancelled",
}


@dataclass(frozen=True)
class Chances:
    """Of each call of the engine."""

    fail: float = 0.01
    fail_all: float = 0.005
    short: float = 0.003
    stall: float = 0.003
    stall_seconds: float = 0.05


class Latencies:
    """A histogram; what took longer than a pause of this process is kept until it is known whether there was one."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self._long: list[tuple[float, float]] = []
        self.explained = 0

    def add(self, begin: float, end: float) -> None:
        if end - begin < PAUSE:
            self.histogram.record(end - begin)
        else:
            self._long.append((begin, end))

    def settle(self, pauses: list[tuple[float, float]]) -> Histogram:
        """With the long ones that no pause explains; `explained` counts the others."""
        for begin, end in self._long:
            if any(begin < until and since < end for since, until in pauses):
                self.explained += 1
            else:
                self.histogram.record(end - begin)
        self._long.clear()
        return self.histogram


class Faulty:
    """An engine that fails, stalls or gives too few results by chance, once `chances` are set, and waits at a gate."""

    def __init__(self, engine: Any, seed: int, for_requests: bool = False) -> None:
        self._engine, self._random, self._for_requests = engine, random.Random(seed), for_requests
        self.chances: Chances | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls = Latencies()  # for batches of single requests: who calls `run` may have to wait for others
        self.injected: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.workers = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, images: Any, out: Any, stream: Any) -> Any:
        begin = time.monotonic()
        self.gate.wait()
        try:
            self._before()
            logits = self._engine.run(images, out, stream)
            return logits[:-1] if self._for_requests and self._happens("short") else logits
        finally:
            if self._for_requests:
                self.calls.add(begin, time.monotonic())

    def map(self, batches: Any) -> Iterator[Any]:
        for result in self._engine.map(batches):
            self._before()
            yield result

    def for_requests(self) -> tuple[Faulty, int]:
        engine, self.workers = self._engine.for_requests()
        own = Faulty(engine, self._random.randrange(1 << 30), for_requests=True)
        own.chances, own.gate, own.injected = self.chances, self.gate, self.injected
        own._lock, self.calls = self._lock, own.calls
        return own, self.workers

    def _before(self) -> None:
        if self._happens("stall"):
            assert self.chances
            time.sleep(self.chances.stall_seconds)
        if self._happens("fail"):
            raise Injected("made to fail")
        if self._happens("fail_all"):
            raise InjectedForAll("made to fail")

    def _happens(self, what: str) -> bool:
        if self.chances is None:
            return False
        with self._lock:
            happens = self._random.random() < getattr(self.chances, what)
            self.injected[what] += happens
        return happens


@dataclass
class Known:
    """The images, their files, and what is right for each: the logits of the image alone."""

    images: NDArray[np.uint8]
    logits: NDArray[np.float32]
    files: list[Path]
    file_logits: dict[Path, NDArray[np.float32]]

    def is_right(self, logits: Any, expected: NDArray[np.float32]) -> bool:
        return bool(np.linalg.norm(logits - expected) <= TOLERANCE * np.linalg.norm(expected))

    def apart(self) -> float:
        """The least relative L2 distance between two images' logits."""
        return min(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in itertools.permutations(self.logits, 2))


class Sent:
    """A request on its way: which image, when, and how often its future said that it was done."""

    def __init__(self, future: Any, index: int, begin: float) -> None:
        self.future, self.index, self.begin, self.end, self.done = future, index, begin, 0.0, 0
        future.add_done_callback(self._on_done)

    def _on_done(self, _: Any) -> None:
        self.end = time.monotonic()
        self.done += 1


@dataclass
class Phase:
    """One session under load, and what all threads share."""

    session: rxdeploy.Session
    known: Known
    lost_after: float
    latencies: Latencies = field(default_factory=Latencies)


class Caller(threading.Thread):
    """One of the threads. `ends` counts the end of every request by way; `problems` are broken promises."""

    def __init__(self, phase: Phase, seed: int) -> None:
        super().__init__(name=f"caller-{seed}", daemon=True)
        self._phase, self._session, self._known = phase, phase.session, phase.known
        self._random = random.Random(seed)
        self.sent: Counter[str] = Counter()
        self.ends: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.checked = 0
        self._ways: dict[Callable[[], None], int] = {
            self._one: 20,
            self._burst: 40,
            self._asyncio: 15,
            self._run: 12,
            self._map: 6,
            self._classify: 2,
            self._no_image: 5,
        }
        self._closed = False

    def run(self) -> None:
        ways, weights = list(self._ways), list(self._ways.values())
        try:
            while not self._closed:
                self._random.choices(ways, weights)[0]()
        except BaseException as error:
            self.problems.append(f"a thread ended with {error!r}")

    # The ways

    def _one(self) -> None:
        if sent := self._submit("submit"):
            self._maybe_cancel(sent, 0.3)
            self._finish("submit", sent)

    def _burst(self) -> None:
        under_way = [self._submit("submit") for _ in range(self._random.randint(2, BURST))]
        for sent in under_way:
            if sent:
                self._maybe_cancel(sent, 0.1)
        for sent in under_way:
            if sent:
                self._finish("submit", sent)

    def _asyncio(self) -> None:
        async def all_of_them() -> None:
            count = self._random.randint(1, BURST)
            await asyncio.wait_for(asyncio.gather(*(self._async() for _ in range(count))), self._phase.lost_after)

        try:
            asyncio.run(all_of_them())
        except (asyncio.TimeoutError, FutureTimeout):
            self.problems.append("lost: requests of an event loop did not end")

    async def _async(self) -> None:
        index = self._index()
        timeout = self._random.choice([None, None, None, self._random.uniform(0, 0.03)])
        self.sent["submit_async"] += 1
        begin = time.monotonic()
        try:
            request = self._session.submit_async(self._known.images[index], self._deadline())
            logits = await asyncio.wait_for(request, timeout)
        except (asyncio.TimeoutError, FutureTimeout):
            self._ended("submit_async", "cancelled")
        except BaseException as error:
            self._failed("submit_async", error)
        else:
            self._phase.latencies.add(begin, time.monotonic())
            self._right("submit_async", logits, self._known.logits[index])

    def _run(self) -> None:
        indices = [self._index() for _ in range(self._random.randint(1, 9))]
        self.sent["run"] += 1
        try:
            logits = self._session.run(self._known.images[indices])
        except BaseException as error:
            return self._failed("run", error)
        self._rows_right("run", logits, indices)

    def _map(self) -> None:
        batches = [[self._index() for _ in range(self._random.randint(1, 9))] for _ in range(3)]
        self.sent["map"] += 1
        try:
            results = list(self._session.map(self._known.images[indices] for indices in batches))
        except BaseException as error:
            return self._failed("map", error)
        if [len(each) for each in results] != [len(each) for each in batches]:
            self.problems.append(f"map gave batches of {[len(each) for each in results]} for {batches}")
        self._rows_right("map", np.concatenate(results), [*itertools.chain(*batches)])

    def _classify(self) -> None:
        files = self._random.sample(self._known.files, 5)
        self.sent["classify"] += 1
        try:
            found = list(self._session.classify(files, k=10_000))
        except BaseException as error:
            return self._failed("classify", error)
        if [each.path for each in found] != files:
            self.problems.append("classify gave other files than it was given, or in another order")
        for each in found:
            expected = self._known.file_logits.get(each.path)
            if each.predictions is None or expected is None:
                if each.predictions is not None or expected is not None:
                    self.problems.append(f"classify: {each.path.name} was read, or not read, by mistake")
                continue
            logits = np.empty_like(expected)
            for prediction in each.predictions:
                logits[prediction.index] = prediction.logit
            self.checked += 1
            if not self._known.is_right(logits, expected):
                self.problems.append(f"wrong: classify {each.path.name}")
        self._ended("classify", "result")

    def _no_image(self) -> None:
        """What is none fails at once, and disturbs nobody."""
        self.sent["no image"] += 1
        try:
            self._session.submit(np.zeros((3, 3), np.uint8))
        except Closed:
            self._closed = True
            self._ended("no image", "closed")
        except InputError:
            self._ended("no image", "refused")
        else:
            self.problems.append("something that is no image was accepted")

    # What they share

    def _index(self) -> int:
        return self._random.randrange(IMAGES)

    def _deadline(self) -> float | None:
        return self._random.choice([None, None, self._random.uniform(0.001, 0.1)])

    def _submit(self, way: str) -> Sent | None:
        index = self._index()
        self.sent[way] += 1
        begin = time.monotonic()
        timeout = self._random.choice([None, None, self._random.uniform(0, 0.02)])
        try:
            return Sent(self._session.submit(self._known.images[index], self._deadline(), timeout), index, begin)
        except BaseException as error:
            self._failed(way, error, at_once=True)
            return None

    def _maybe_cancel(self, sent: Sent, chance: float) -> None:
        if self._random.random() < chance:
            if self._random.random() < 0.5:
                time.sleep(self._random.uniform(0, 0.005))
            sent.future.cancel()

    def _finish(self, way: str, sent: Sent) -> None:
        try:
            logits = sent.future.result(self._phase.lost_after)
        except (CancelledError, Exception) as error:
            return self._failed(way, error)
        # A future wakes who waits for it before it calls back.
        while not sent.done and time.monotonic() - sent.begin < self._phase.lost_after:
            time.sleep(0.0001)
        if sent.done != 1:
            self.problems.append(f"a future said {sent.done} times that it was done")
        self._phase.latencies.add(sent.begin, sent.end)
        self._right(way, logits, self._known.logits[sent.index])

    def _right(self, way: str, logits: Any, expected: NDArray[np.float32]) -> None:
        self.checked += 1
        if not self._known.is_right(logits, expected):
            others = [n for n, each in enumerate(self._known.logits) if self._known.is_right(logits, each)]
            self.problems.append(f"wrong: {way} gave the result of image {others[0] if others else 'none'}")
        self._ended(way, "result")

    def _rows_right(self, way: str, logits: NDArray[np.float32], indices: list[int]) -> None:
        self.checked += len(indices)
        right = [self._known.is_right(row, self._known.logits[i]) for row, i in zip(logits, indices, strict=True)]
        if not all(right):
            self.problems.append(f"wrong: {way}, {right.count(False)} of {len(right)} rows")
        self._ended(way, "result")

    def _failed(self, way: str, error: BaseException, at_once: bool = False) -> None:
        if isinstance(error, FutureTimeout | TimeoutError):
            self.problems.append(f"lost: {way} did not end in {self._phase.lost_after} s")
            return self._ended(way, "lost")
        end = next((name for kind, name in ENDS.items() if isinstance(error, kind)), None)
        if end is None and isinstance(error, RuntimeError) and SHORT in str(error):
            end = "injected failure"
        if end is None:
            self.problems.append(f"{way} failed with {error!r}")
        if end == "closed":
            self._closed = True
            end = "closed at once" if at_once else end
        self._ended(way, end or "unexpected")

    def _ended(self, way: str, end: str) -> None:
        self.ends[way, end] += 1


class Watch(threading.Thread):
    """Samples this process: memory, threads, file descriptors; and notes when it was stopped."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self._process, self._over = psutil.Process(), threading.Event()
        self.samples: list[tuple[float, int, int, int]] = []
        self.pauses: list[tuple[float, float]] = []
        self.running = 0.0  # seconds so far in which it was not

    def run(self) -> None:
        last = time.monotonic()
        for count in itertools.count():
            if self._over.wait(0.1):
                return
            now = time.monotonic()
            if now - last > PAUSE:
                self.pauses.append((last - PAUSE, now + PAUSE))
            else:
                self.running += now - last
            last = now
            if count % 5 == 0:
                self.samples.append((now, *resources(self._process)))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def quarters(self) -> dict[str, list[float]]:
        """The medians of each quarter of the time."""
        begin, end = self.samples[0][0], self.samples[-1][0]
        parts: list[list[tuple[float, int, int, int]]] = [[], [], [], []]
        for sample in self.samples:
            parts[min(3, int(4 * (sample[0] - begin) / max(end - begin, 1e-9)))].append(sample)
        return {
            name: [statistics.median(sample[place] / unit for sample in part) for part in parts if part]
            for name, place, unit in (("rss_mib", 1, MEBI), ("threads", 2, 1), ("file_descriptors", 3, 1))
        }


def resources(process: psutil.Process) -> tuple[int, int, int]:
    """Bytes of memory, threads, file descriptors."""
    return process.memory_info().rss, process.num_threads(), process.num_fds()


class Complaints(logging.Handler):
    """What the runtime and the futures log as errors: a result set twice, a callback that raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"logged: {record.name}: {record.getMessage()}")


@contextmanager
def complaints() -> Iterator[Complaints]:
    handler = Complaints()
    names = ("rxdeploy.runtime", "concurrent.futures", "asyncio")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield handler
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="Of load, over all engines and queues.")
@click.option("--threads", default=64, show_default=True)
@click.option("--device", "devices", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--lost-after", default=120.0, show_default=True, help="Seconds after which a request counts as lost.")
@click.option("--note", default="", help="Anything about this run that a reader of the result should know.")
def main(minutes: float, threads: int, devices: tuple[str, ...], seed: int, lost_after: float, note: str) -> None:
    """Prove it, print it, and write results/load.json."""
    problems: list[str] = []
    result: dict[str, Any] = {"note": note, "minutes": minutes, "threads": threads, "seed": seed, "model": MODEL}
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(Path(folder) / "bundle")
        for device in devices:
            known = learn(bundle, device, Path(folder) / device)
            if (apart := known.apart()) < APART:
                raise CheckFailed(f"the images' logits are only {apart:.1e} apart, so a swap could pass")
            phases = [
                load(bundle, device, known, Batching(MAX_BATCH, MAX_DELAY_MS, QUEUE, full), drain, seconds, *rest)
                for full, drain, seconds, rest in (
                    ("reject", True, 60 * minutes / len(devices) / 2, (threads, seed, lost_after)),
                    ("block", False, 60 * minutes / len(devices) / 2, (threads, seed + threads, lost_after)),
                )
            ]
            over = overload(bundle, device, known, threads)
            result[device] = {"images_apart": apart, "load": phases, "overload": over}
            problems += [f"{device}: {problem}" for part in (*phases, over) for problem in part["problems"]]
            for part in phases:
                click.echo(phase_line(device, part))
            click.echo(overload_line(device, over))
    machine.RESULTS = Path(__file__).parent / "results"
    click.echo(machine.save("load", {**result, "broken_promises": len(problems)}))
    for problem in problems[:20]:
        click.echo(f"broken: {problem}", err=True)
    if problems:
        sys.exit(1)


def build(output: Path) -> Path:
    request = Request(find_card(MODEL), "fp32", "uint8", target="onnxruntime")
    with open_cache() as cache:
        Pipeline(request, cache).build(output)
    return output


def learn(bundle: Path, device: str, folder: Path) -> Known:
    """Images and files, and the logits of each alone. (This also starts the threads that an engine keeps for ever.)"""
    folder.mkdir()
    with rxdeploy.load(bundle, device) as session:
        size = session.bundle.manifest.preprocessing.image_size
        generator = np.random.default_rng(0)
        # Of pixels of noise alone the logits would all be much the same.
        coarse = generator.integers(0, 256, (IMAGES, 4, 4, 3), np.uint8)
        images = np.ascontiguousarray(coarse.repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)[:, :size, :size])
        logits = np.concatenate([session.run(image[None]) for image in images])
        files = []
        for number, image in enumerate(images[:FILES]):
            files.append(folder / f"{number}.png")
            Image.fromarray(image).save(files[-1])
        file_logits = {path: session.run(session.preprocess(path)[None])[0] for path in files}
        (folder / "none.png").write_bytes(b"no image")
    return Known(images, logits, [*files, folder / "none.png"], file_logits)


def open_faulty(bundle: Path, device: str, batching: Batching, seed: int) -> tuple[rxdeploy.Session, Faulty]:
    session = rxdeploy.load(bundle, device, batching=batching)
    engine = Faulty(session.engine, seed)
    session.engine = session._compute._engine = engine
    return session, engine


def load(
    bundle: Path,
    device: str,
    known: Known,
    batching: Batching,
    drain: bool,
    seconds: float,
    threads: int,
    seed: int,
    lost_after: float,
) -> dict[str, Any]:
    """One session for `seconds`, closed with requests under way."""
    process = psutil.Process()
    gc.collect()
    before = resources(process)
    session, engine = open_faulty(bundle, device, batching, seed)
    engine.chances = Chances()
    phase = Phase(session, known, lost_after)
    callers = [Caller(phase, seed + number) for number in range(threads)]
    watch = Watch()
    with complaints() as logged:
        watch.start()
        for caller in callers:
            caller.start()
        while watch.running < seconds:
            time.sleep(0.1)
        waiting = session.metrics.snapshot().queue_depth
        begin = time.monotonic()
        session.close(drain)
        closing = time.monotonic() - begin
        for caller in callers:
            caller.join(lost_after)
        watch.stop()
    hung = [caller.name for caller in callers if caller.is_alive()]
    snapshot = session.metrics.snapshot()
    pauses, calls = watch.pauses, engine.calls.settle(watch.pauses)
    latencies, not_timed = phase.latencies.settle(pauses), phase.latencies.explained
    workers, injected = engine.workers, dict(engine.injected)
    sent, ends = (
        sum((caller.sent for caller in callers), Counter()),
        sum((caller.ends for caller in callers), Counter()),
    )
    checked = sum(caller.checked for caller in callers)
    problems = [problem for caller in callers for problem in caller.problems] + logged.lines
    problems += [f"hung after close: {name}" for name in hung]
    del session, engine, phase, callers
    after = settled(process, before)
    quarters = watch.quarters()
    # Who is accepted has a full queue before it, or where that blocks all that the threads can have under way, at half
    # the rate at which batches were computed; then a batch that is being computed, and its own.
    ahead = QUEUE if batching.when_full == "reject" else threads * BURST
    a_batch = seconds / max(1, sum(snapshot.batches.values()))
    bound = MAX_DELAY_MS / 1000 + 2 * ahead / MAX_BATCH * a_batch + 2 * calls.percentile(99.9)
    p99 = latencies.percentile(99)
    problems += [f"{way}: {sent[way]} sent, {total} ended" for way, total in unequal(sent, ends)]
    problems += uncounted(snapshot, ends)
    if p99 > bound:
        problems.append(f"p99 is {p99:.3f} s, more than {bound:.3f} s")
    growth = quarters["rss_mib"][-1] / quarters["rss_mib"][1] - 1 if seconds >= WARM else 0.0
    if growth > FLAT:
        problems.append(f"memory grew by {growth:.1%} from the second to the last quarter")
    for name, now, then in zip(("threads", "file descriptors"), after[1:], before[1:], strict=True):
        if now > then:
            problems.append(f"{now} {name} after close, {then} before load")
    if snapshot.queue_depth_max > QUEUE:
        problems.append(f"{snapshot.queue_depth_max} requests waited")
    return {
        "when_full": batching.when_full,
        "seconds": seconds,
        "sent": sum(sent.values()),
        "sent_by_way": dict(sent),
        "ends": dict(sum((Counter({end: n}) for (_, end), n in ends.items()), Counter())),
        "ends_by_way": {way: {end: n for (w, end), n in ends.items() if w == way} for way in sent},
        "results_checked": checked,
        "injected": injected,
        "batches": {str(size): number for size, number in snapshot.batches.items()},
        "queue_depth_max": snapshot.queue_depth_max,
        "workers": workers,
        "accepted_p50_ms": 1000 * latencies.percentile(50),
        "accepted_p99_ms": 1000 * p99,
        "accepted_max_ms": 1000 * latencies.max,
        "not_timed_as_this_process_was_stopped": not_timed,
        "seconds_a_batch": a_batch,
        "engine_call_p999_ms": 1000 * calls.percentile(99.9),
        "p99_bound_ms": 1000 * bound,
        "stopped_seconds": [until - since - 2 * PAUSE for since, until in pauses],
        "by_quarter": quarters,
        "before_load": dict(zip(("rss_bytes", "threads", "file_descriptors"), before, strict=True)),
        "after_close": dict(zip(("rss_bytes", "threads", "file_descriptors"), after, strict=True)),
        "close": {"drain": drain, "waiting_then": waiting, "seconds": closing, "hung_threads": len(hung)},
        "problems": problems,
    }


def settled(process: psutil.Process, before: tuple[int, int, int]) -> tuple[int, int, int]:
    """The resources once what ends by itself has ended, for five seconds at most."""
    for _ in range(50):
        gc.collect()
        now = resources(process)
        if now[1] <= before[1] and now[2] <= before[2]:
            break
        time.sleep(0.1)
    return now


def unequal(sent: Counter[str], ends: Counter[tuple[str, str]]) -> list[tuple[str, int]]:
    """The ways whose requests' ends do not add up."""
    totals = {way: sum(n for (w, _), n in ends.items() if w == way) for way in sent}
    return [(way, total) for way, total in totals.items() if total != sent[way]]


def uncounted(snapshot: Any, ends: Counter[tuple[str, str]]) -> list[str]:
    """Whether the session's own metrics saw the same ends. Of an event loop's requests, a caller that gave one up does
    not know how it ended, nor, at the end, whether one that found the session closed had been accepted."""

    def of(end: str) -> int:
        return ends["submit", end] + ends["submit_async", end]

    found = []
    if snapshot.rejected != of("rejected"):
        found.append(f"metrics count {snapshot.rejected} rejected, callers {of('rejected')}")
    least = sum(of(end) for end in ("result", "cancelled", "deadline", "injected failure"))
    counted = snapshot.requests.count + snapshot.cancelled + snapshot.expired + snapshot.failed
    unknown = ends["submit_async", "closed"] + ends["submit_async", "cancelled"]
    if not least - unknown <= counted <= least + unknown:
        found.append(f"metrics count {counted} ends, callers {least} (and {unknown} that they cannot tell)")
    return found


def overload(bundle: Path, device: str, known: Known, threads: int, attempts: int = 200) -> dict[str, Any]:
    """The engine computes nothing, and every thread goes on submitting: how soon is it told so?"""
    session, engine = open_faulty(bundle, device, Batching(MAX_BATCH, MAX_DELAY_MS, QUEUE, "reject"), 0)
    engine.gate.clear()
    refusals, accepted, problems, lock = Histogram(), [], [], threading.Lock()

    def submit(count: int, seed: int, into: Histogram) -> None:
        choose = random.Random(seed)
        for _ in range(count):
            index = choose.randrange(IMAGES)
            begin = time.perf_counter()
            try:
                future = session.submit(known.images[index])
            except Rejected:
                into.record(time.perf_counter() - begin)
            else:
                with lock:
                    accepted.append((future, index))

    callers = [threading.Thread(target=submit, args=(attempts, n, refusals)) for n in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    alone = Histogram()
    submit(attempts, threads, alone)
    snapshot = session.metrics.snapshot()
    engine.gate.set()
    session.close(drain=True)
    right = sum(known.is_right(future.result(60), known.logits[index]) for future, index in accepted)
    refused = refusals.count + alone.count
    if right != len(accepted):
        problems.append(f"{len(accepted)} were accepted, {right} of them right")
    if refused + len(accepted) != (threads + 1) * attempts or snapshot.rejected != refused:
        problems.append(f"{refused} refused and {len(accepted)} accepted of {(threads + 1) * attempts}")
    if snapshot.queue_depth_max > QUEUE:
        problems.append(f"{snapshot.queue_depth_max} requests waited")
    if refusals.percentile(99) > REJECTED_WITHIN:
        problems.append(f"a refusal took {refusals.percentile(99):.3f} s (p99)")
    return {
        "sent": (threads + 1) * attempts,
        "accepted_and_right": right,
        "rejected": refused,
        "queue_depth_max": snapshot.queue_depth_max,
        "rejected_p50_us": 1e6 * refusals.percentile(50),
        "rejected_p99_us": 1e6 * refusals.percentile(99),
        "rejected_max_us": 1e6 * refusals.max,
        "rejected_p99_bound_us": 1e6 * REJECTED_WITHIN,
        "one_thread_rejected_p50_us": 1e6 * alone.percentile(50),
        "one_thread_rejected_p99_us": 1e6 * alone.percentile(99),
        "problems": problems,
    }


def phase_line(device: str, part: dict[str, Any]) -> str:
    ends = ", ".join(f"{number} {end}" for end, number in sorted(part["ends"].items(), key=lambda each: -each[1]))
    rss = part["by_quarter"]["rss_mib"]
    return (
        f"{device}, {part['when_full']}: {part['sent']} sent: {ends}; {part['results_checked']} results checked; "
        f"p99 {part['accepted_p99_ms']:.0f} ms (bound {part['p99_bound_ms']:.0f}); memory by quarter "
        f"{', '.join(f'{each:.0f}' for each in rss)} MiB; closed in {part['close']['seconds']:.2f} s with "
        f"{part['close']['waiting_then']} waiting; {len(part['problems'])} promises broken"
    )


def overload_line(device: str, part: dict[str, Any]) -> str:
    return (
        f"{device}, overload: {part['rejected']} of {part['sent']} rejected, p50 {part['rejected_p50_us']:.0f} us, p99 "
        f"{part['rejected_p99_us']:.0f} us, max {part['rejected_max_us']:.0f} us; at most {part['queue_depth_max']} "
        f"waited; {part['accepted_and_right']} accepted, all right; {len(part['problems'])} promises broken"
    )


if __name__ == "__main__":
    main()
