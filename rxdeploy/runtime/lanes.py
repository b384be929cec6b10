"""Running a plan. A lane is a stream with all that one execution at a time needs: staging, scratch, captured graphs.

With two lanes the copies of one batch overlap the computation of another, and two callers need not wait for each
other. All memory is allocated when a lane is made; a batch size seen before is one graph launch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines.bundle import Bundle
from rxdeploy.engines.options import Profile
from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.runtime.arrays import Array, DeviceView
from rxdeploy.runtime.batching import Closed
from rxdeploy.runtime.cuda import LEGACY_STREAM, PER_THREAD_STREAM, DeviceArray, Gpu, Graph, capture
from rxdeploy.runtime.plan import Plan

log = logging.getLogger("rxdeploy.runtime")

_ALIGNMENT = 256  # bytes, of every tensor's address and of the scratch memory: NvInferRuntime.h
_GRAPHS = 64  # a lane keeps; each holds an execution context of TensorRT, with memory of its own on host and device
_SEEN = 256  # batch sizes and addresses a lane remembers having met once
_MOST_PADDING = 2  # times as many images as asked for, when that is faster
_TRIALS = 5


@dataclass(frozen=True)
class Call:
    """What one execution computes; None stands for the lane's own pinned staging."""

    images: int
    source: int | None  # device address of (images, ...) input
    target: int | None  # device address of (images, classes) output


class PlanEngine:
    """A plan on a GPU: `run` and `map` for arrays that were checked already. Thread-safe."""

    device = "tensorrt"

    def __init__(self, bundle: Bundle, gpu: Gpu, lanes: int = 2) -> None:
        self.gpu = gpu
        self.plan = Plan(bundle, gpu)
        self.profiles = self.plan.profiles
        self.largest = max(profile.max for profile in self.profiles)
        module, version = self.plan.runner.module, self.plan.version
        self.description = f"plan on {gpu.name} with {module.replace('_', '-')} {version}"
        self._choices: dict[int, tuple[int, int]] = {}
        self._choosing = threading.Lock()
        self._preparing = threading.Lock()  # it alone holds several lanes at once
        self._lanes: list[Lane] = []
        try:
            for _ in range(lanes):
                self._lanes.append(Lane(self, self.largest))
        except BaseException:  # not left to the garbage collector: memory is short
            self._free()
            raise
        self._pool = _Pool(self._lanes)

    def run(self, images: Array, out: Array | None, stream: int | None) -> NDArray[np.float32] | DeviceArray | None:
        """Logits of `images`; into `out` when given, and then that is not returned.

        Host arrays: complete on return. Only device arrays and a `stream`: enqueued there, returns at once.
        """
        with self._pool.call():
            if isinstance(images, DeviceView) or isinstance(out, DeviceView):
                return self._run_on_device(images, out, stream)
            return self._run_on_host(images, out)

    def _run_on_host(self, images: NDArray, out: NDArray | None) -> NDArray[np.float32] | None:
        result = np.empty((len(images), *self.plan.output_shape), self.plan.output_dtype) if out is None else out
        if len(images) <= self.largest:
            with self._pool.lane() as lane:
                lane.start(images)
                lane.finish(result)
        else:
            _finished(result, self._start(images, result))
        return result if out is None else None

    def map(self, batches: Iterable[NDArray]) -> Iterator[tuple[NDArray[np.float32], float | None]]:
        """Logits of each of many host batches, in order; the next is copied while one is computed.

        With None where others give seconds: how long one of several that overlap took, nobody knows. What was computed
        before `batches` raised an error comes before the error.
        """
        waiting: deque[tuple[NDArray, list[_Job]]] = deque()
        error: Exception | None = None
        batches = iter(batches)
        while True:
            try:
                images = next(batches)
            except StopIteration:
                break
            except Exception as caught:
                error = caught
                break
            result = np.empty((len(images), *self.plan.output_shape), self.plan.output_dtype)
            with self._pool.call():
                waiting.append((result, self._start(images, result)))
            if len(waiting) == len(self._lanes):
                yield _finished(*waiting.popleft()), None
        while waiting:
            yield _finished(*waiting.popleft()), None
        if error is not None:
            raise error

    def prepare(self, sizes: Iterable[int]) -> None:
        """Meet these batch sizes on every lane, so that no later call compiles or captures anything."""
        parts = sorted({part for size in sizes for part in self._parts(size)})
        with self._pool.call(), self._preparing, contextlib.ExitStack() as held:
            for lane in [held.enter_context(self._pool.lane()) for _ in self._lanes]:
                for part in [*parts, *parts]:  # run once, capture once
                    lane.start(None, part)
                    lane.finish(None)

    def _parts(self, size: int) -> set[int]:
        """The batch sizes that a batch of `size` is computed in."""
        if size < 1:
            raise InputError(f"batch size {size}: it must be at least 1")
        return {min(size, self.largest), size % self.largest} - {0}

    def for_requests(self) -> tuple[PlanEngine, int]:
        """The engine for batches of single requests, and how many threads are to give it batches at once."""
        return self, len(self._lanes)

    def choose(self, images: int, lane: Lane) -> tuple[int, int]:
        """The profile's index and the batch size to compute `images` images with.

        That is the tightest profile that holds them; where another that was tuned for a size a little larger is
        faster even with padding, as measured when the size is first met, it is that.
        """
        if images not in self._choices:
            with self._choosing:
                if images not in self._choices:
                    candidates = candidate_shapes(images, self.profiles)
                    times = [lane.time(*shape) for shape in candidates] if len(candidates) > 1 else [0.0]
                    self._choices[images] = candidates[times.index(min(times))]
        return self._choices[images]

    def layer_times(self, images: int, runs: int) -> list[dict[str, float]]:
        """TensorRT's time for each of its layers, in seconds, one dict for each run of `images` images."""
        if not 1 <= images <= self.largest:
            raise InputError(f"batch size {images}: the plan takes 1 to {self.largest} at once")
        with self._pool.call(), self._pool.lane() as lane:
            return lane.layer_times(images, runs)

    def close(self) -> None:
        """Wait for what is running and free everything."""
        if self._pool.close():
            self._free()

    def _free(self) -> None:
        for lane in self._lanes:
            lane.close()
        self.plan.close()

    def _start(self, images: NDArray, result: NDArray) -> list[_Job]:
        jobs: list[_Job] = []
        try:
            for begin in range(0, len(images), self.largest):
                part = slice(begin, begin + self.largest)
                jobs.append(self._pool.start(images[part], result[part]))
        except BaseException:
            for job in jobs:
                job.end()  # nothing is written to the caller's array after the error
            raise
        return jobs

    def _run_on_device(
        self, images: Array, out: Array | None, stream: int | None
    ) -> NDArray[np.float32] | DeviceArray | None:
        shape = (len(images) if isinstance(images, np.ndarray) else images.shape[0], *self.plan.output_shape)
        made = DeviceArray(self.gpu, shape, self.plan.output_dtype, stream) if out is None else None
        # TensorRT waits for the whole device when it is enqueued on a default stream: then on the lane's, in between.
        default = stream if stream in (LEGACY_STREAM, PER_THREAD_STREAM) else None
        with self._pool.lane(None if default else stream) as lane:
            where = lane.stream.handle if stream is None or default else stream
            if default:
                self._order(default, where)
            for begin in range(0, shape[0], self.largest):
                end = min(begin + self.largest, shape[0])
                source = lane.stage(images, begin, end, where, self.plan.input_bytes)
                target = _address(made or out, begin, self.plan.output_bytes)
                lane.enqueue(Call(end - begin, source, target), where, waits=stream is None)
                if isinstance(out, np.ndarray):
                    self.gpu.synchronize(where)
                    out[begin:end] = lane.host_out[: end - begin]
            if default:
                self._order(where, default)
            if stream is None or isinstance(images, np.ndarray):
                self.gpu.synchronize(where)
        return made

    def _order(self, before: int, after: int) -> None:
        with self.gpu.current():
            self.gpu.order(before, after)


def _address(array: Any, begin: int, item: int) -> int | None:
    return None if isinstance(array, np.ndarray) else array.pointer + begin * item


def _finished(result: NDArray, jobs: list[_Job]) -> NDArray:
    for job in jobs:
        job.end()
    for job in jobs:
        job.result()
    return result


def candidate_shapes(images: int, profiles: tuple[Profile, ...]) -> list[tuple[int, int]]:
    """(profile index, batch size) worth trying for `images` images, the tightest fit first; see `PlanEngine.choose`."""
    fits = [(p.max, -p.min, i) for i, p in enumerate(profiles) if p.min <= images <= p.max]
    found = [(min(fits)[2], images)] if fits else []
    padded = set()
    for index, profile in enumerate(profiles):
        sizes = {profile.opt, profile.min} if fits else {max(profile.min, images)}
        limit = images * _MOST_PADDING if fits else profile.max
        padded |= {(size, index) for size in sizes if images < size <= limit}
    # Of several profiles with one size, the one that is tuned for it.
    for size in sorted({size for size, _ in padded}):
        best = min((i for s, i in padded if s == size), key=lambda i: (profiles[i].opt != size, profiles[i].max, i))
        found.append((best, size))
    return found if fits else found[:1]


class Lane:
    """Runs one execution at a time."""

    def __init__(self, engine: PlanEngine, most: int) -> None:
        self._engine, self._plan, self._gpu = engine, engine.plan, engine.gpu
        plan, gpu = self._plan, self._gpu
        input_size, output_size = (_aligned(most * item) for item in (plan.input_bytes, plan.output_bytes))
        with contextlib.ExitStack() as made:  # memory is short when one fails, and who holds the error holds the others
            self.stream = made.enter_context(contextlib.closing(gpu.stream()))
            self._idle = made.enter_context(contextlib.closing(gpu.event()))  # what was left running here
            self._device = made.enter_context(contextlib.closing(gpu.allocate(input_size + output_size + plan.scratch)))
            self._pinned = gpu.pinned(input_size + output_size)
            made.pop_all()
        self._lent: int | None = None  # the stream that does
        self._own_input = self._device.pointer
        self._own_output = self._own_input + input_size
        self._scratch = self._own_output + output_size
        self.host_in = _view(self._pinned.array, 0, (most, *plan.input_shape), plan.input_dtype)
        self.host_out = _view(self._pinned.array, input_size, (most, *plan.output_shape), plan.output_dtype)
        self._pinned_in, self._pinned_out = self._pinned.pointer, self._pinned.pointer + input_size
        self._contexts: dict[int, Any] = {}
        self._graphs: OrderedDict[Call, tuple[Graph, Any]] = OrderedDict()
        self._seen: OrderedDict[Call, bool] = OrderedDict()
        self._calls = [Call(size, None, None) for size in range(most + 1)]
        self._size = 0

    def start(self, images: NDArray | None, size: int = 0) -> None:
        """Copy a host batch to the staging (None: leave there what is) and enqueue it."""
        self._take_back()
        self._size = size if images is None else len(images)
        if images is not None:
            np.copyto(self.host_in[: self._size], images)
        with self._gpu.current():
            self._enqueue(self._calls[self._size], self.stream.handle)

    def finish(self, result: NDArray | None) -> None:
        """Wait for what `start` began and copy its logits to `result`."""
        self.stream.synchronize()
        if result is not None:
            np.copyto(result, self.host_out[: self._size])

    def stage(self, images: Array, begin: int, end: int, stream: int, item: int) -> int | None:
        """The address of a part of a device array; None for a host array, of which the part is put into the staging."""
        if isinstance(images, DeviceView):
            return images.pointer + begin * item
        self._take_back()
        self._gpu.synchronize(stream if begin else self.stream.handle)  # the part before may still be copied
        np.copyto(self.host_in[: end - begin], images[begin:end])
        return None

    def enqueue(self, call: Call, stream: int, waits: bool) -> None:
        """Enqueue `call` on any stream, after what is still done with this lane; `waits`: the caller waits for it."""
        with self._gpu.current():
            if self._lent is not None:
                self._idle.hold_back(stream)
            try:
                self._enqueue(call, stream)
            finally:
                if not waits:
                    self._idle.record(stream)
                    self._lent = stream

    def settle(self) -> None:
        """Wait, after an error, for whatever is still running here."""
        with contextlib.suppress(EnvironmentLacks):
            self.stream.synchronize()

    def busy(self, stream: int | None) -> bool:
        """Whether something that was left running on another stream than that still uses this lane's memory."""
        return self._lent not in (None, stream) and not self._idle.done()

    def _take_back(self) -> None:
        """Wait until no stream uses this lane's memory."""
        if self._lent is not None:
            self._idle.synchronize()
            self._lent = None

    def _enqueue(self, call: Call, stream: int) -> None:
        if known := self._graphs.get(call):
            self._graphs.move_to_end(call)
            known[0].launch(stream)
            return
        profile, size = self._engine.choose(call.images, self)
        if self._seen.get(call):
            del self._seen[call]
            self._capture(call, profile, size, stream)
            return
        self._see(call, capturable=True)
        self._issue(self._context(profile), call, size, stream)

    def _see(self, call: Call, capturable: bool) -> None:
        """Remember that `call` was met, and whether it may be captured the next time."""
        self._seen.setdefault(call, capturable)
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)

    def _capture(self, call: Call, profile: int, size: int, stream: int) -> None:
        """Run `call` once more, in a context of its own as its graph needs it, and capture it for the next time."""
        context = self._new_context(profile)
        self._issue(context, call, size, stream)  # TensorRT wants a run at this shape before the capture
        try:
            if not getattr(context, "is_stream_capturable", lambda _: True)(self.stream.handle):
                raise self._plan.error("cannot be captured")
            # What the collector might free meanwhile would break the capture.
            with _no_collection(), capture(self._gpu, self.stream.handle) as graphs:
                self._issue(context, call, size, self.stream.handle)
        except EnvironmentLacks as error:
            log.warning("batches of %d run without a CUDA graph: %s", size, error)
            self._see(call, capturable=False)
            return
        self._graphs[call] = graphs[0], context
        if len(self._graphs) > _GRAPHS:
            self._gpu.synchronize(stream)  # the oldest may be running
            self._take_back()
            graph, _ = self._graphs.popitem(last=False)[1]
            graph.close()

    def _issue(self, context: Any, call: Call, size: int, stream: int) -> None:
        """Copies and computation of `call`, one after the other on `stream`."""
        plan, copy = self._plan, self._gpu.copy
        padded = size > call.images
        source, target = call.source, call.target
        # TensorRT takes multiples of 256 only: a slice of someone's tensor may begin anywhere.
        if source is None or padded or source % _ALIGNMENT:
            copy(self._own_input, self._pinned_in if source is None else source, call.images * plan.input_bytes, stream)
            source = self._own_input
        own_output = target is None or padded or target % _ALIGNMENT != 0
        self._execute(context, size, source, self._own_output if own_output else target, stream)
        if own_output:
            to = self._pinned_out if target is None else target
            copy(to, self._own_output, call.images * plan.output_bytes, stream)

    def _execute(self, context: Any, size: int, source: int, target: int | None, stream: int) -> None:
        plan = self._plan
        if not (
            context.set_input_shape(plan.input, (size, *plan.input_shape))
            and context.set_tensor_address(plan.input, source)
            and context.set_tensor_address(plan.output, target)
            and context.execute_async_v3(stream)
        ):
            raise plan.error(f"does not run a batch of {size}")

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Any:
        with self._gpu.current():
            context = self._plan.create_context(profile, self._scratch, self.stream.handle)
        self.stream.synchronize()
        return context

    def time(self, profile: int, size: int) -> float:
        """Device time of one batch on the lane's own buffers, in seconds: the median of a few."""
        context = self._context(profile)
        begin, end = self._gpu.event(timing=True), self._gpu.event(timing=True)
        stream = self.stream.handle
        times = []
        with self._gpu.current():
            if self._lent is not None:
                self._idle.hold_back(stream)
            for _ in range(_TRIALS + 1):
                begin.record(stream)
                self._execute(context, size, self._own_input, self._own_output, stream)
                end.record(stream)
                end.synchronize()
                times.append(end.seconds_since(begin))
        begin.close()
        end.close()
        return float(np.median(times[1:]))  # the first compiles

    def layer_times(self, images: int, runs: int) -> list[dict[str, float]]:
        """See `PlanEngine.layer_times`."""
        profile, size = self._engine.choose(images, self)
        trt, found = self._plan.trt, []

        class Profiler(trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.seconds: dict[str, float] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.seconds[layer_name] = self.seconds.get(layer_name, 0.0) + ms / 1000

        self._take_back()
        context = self._new_context(profile)
        context.profiler = profiler = Profiler()
        with self._gpu.current():
            for _ in range(runs + 1):
                profiler.seconds = {}
                self._execute(context, size, self._own_input, self._own_output, self.stream.handle)
                self._gpu.synchronize(self.stream.handle)
                found.append(profiler.seconds)
            del context  # while its CUDA context is current
        return found[1:]  # the first compiles

    def close(self) -> None:
        """Free everything; nothing may run any more."""
        with contextlib.suppress(EnvironmentLacks):  # of a device that is broken: nothing runs there either
            self._take_back()
        for graph in [graph for graph, _ in self._graphs.values()]:  # no name that keeps a context beyond the next line
            graph.close()
        with self._gpu.current():
            self._graphs.clear()
            self._contexts.clear()
        self.host_in = self.host_out = np.empty(0)
        for owned in (self._idle, self.stream, self._device, self._pinned):
            owned.close()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _view(memory: NDArray[np.uint8], offset: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    size = int(np.prod(shape)) * dtype.itemsize
    return memory[offset : offset + size].view(dtype).reshape(shape)


class _Job:
    """A batch on its way through a lane. Whoever needs the lane may end it; its owner asks for the result."""

    def __init__(self, pool: _Pool, lane: Lane, result: NDArray) -> None:
        self._pool, self._lane, self._result = pool, lane, result
        self._lock = threading.Lock()
        self._done = False
        self._error: BaseException | None = None

    def end(self) -> None:
        """Wait for it, put its logits where they belong and free the lane; an error is kept for the owner."""
        with self._lock:
            if self._done:
                return
            try:
                self._lane.finish(self._result)
            except BaseException as error:  # the owner's, whoever is waiting here
                self._error = error
            self._done = True
            self._pool.release(self._lane, self)

    def result(self) -> None:
        """End it, and raise what went wrong."""
        self.end()
        if self._error:
            raise self._error


class _Pool:
    """Lends lanes. Nobody has to wait for a lane whose work is only waiting to be collected."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes
        self._free = set(lanes)
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._calls = 0
        self._closed = False

    def lane(self, stream: int | None = None) -> _Lent:
        """A lane for the length of a `with`, to be used on `stream`."""
        return _Lent(self, stream)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call that `close` waits for; Closed when it came too late."""
        with self._changed:
            if self._closed:
                raise Closed("the session is closed; load the bundle again")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                if not self._calls:
                    self._changed.notify_all()  # `close` may be waiting

    def acquire(self, stream: int | None = None) -> Lane:
        while True:
            with self._changed:
                if self._free:
                    # The first: the parts of a batch that is split meet the lanes that know their sizes. But rather
                    # one that no other caller's stream is still using.
                    free = [lane for lane in self._lanes if lane in self._free]
                    lane = next((lane for lane in free if not lane.busy(stream)), free[0])
                    self._free.remove(lane)
                    return lane
                if not self._jobs:
                    self._changed.wait()
                    continue
                job = self._jobs.popleft()
            job.end()

    def release(self, lane: Lane, job: _Job | None = None) -> None:
        with self._changed:
            if job is not None and job in self._jobs:
                self._jobs.remove(job)
            self._free.add(lane)
            self._changed.notify_all()  # `close` may be among those that wait

    def start(self, images: NDArray, result: NDArray) -> _Job:
        lane = self.acquire()
        try:
            lane.start(images)
        except BaseException:
            lane.settle()
            self.release(lane)
            raise
        job = _Job(self, lane, result)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job

    def close(self) -> bool:
        """Let no more calls in, and wait until those inside and every lane are done; False when it was done before."""
        with self._changed:
            if self._closed:
                return False
            self._closed = True
        while True:
            with self._changed:
                if len(self._free) == len(self._lanes) and not self._calls:
                    return True
                if not self._jobs:
                    self._changed.wait()
                    continue
                job = self._jobs.popleft()
            job.end()


class _Lent:
    """A lane for the length of a `with`."""

    def __init__(self, pool: _Pool, stream: int | None) -> None:
        self._pool, self._stream = pool, stream

    def __enter__(self) -> Lane:
        self._lane = self._pool.acquire(self._stream)
        return self._lane

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._lane.settle()
        self._pool.release(self._lane)
