"""The simulated driver: does it keep the driver's promises, and no more, and does it notice what breaks them?"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cuda
from standin import driver
from standin.driver import check, set_option

from rxdeploy.engines.gpu import find_driver

SIZE = 1000
MODES = {mode.name.removeprefix("CU_STREAM_CAPTURE_MODE_"): mode for mode in cuda.CUstreamCaptureMode}
Counters = Callable[[str], int]

pytestmark = pytest.mark.usefixtures("context")


def error(result: tuple[Any, ...]) -> str:
    """The name of what went wrong, without its prefix; "SUCCESS" when nothing did."""
    return result[0].name.removeprefix("CUDA_ERROR_").removeprefix("CUDA_")


class Pinned:
    """Pinned memory as an array."""

    def __init__(self, size: int = SIZE) -> None:
        self.pointer = int(check(cuda.cuMemHostAlloc(size, 0)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pointer))


@pytest.fixture
def pinned(context: Any) -> Iterator[Callable[[], Pinned]]:
    made: list[Pinned] = []

    def make() -> Pinned:
        made.append(Pinned())
        return made[-1]

    yield make
    for memory in made:
        check(cuda.cuMemFreeHost(memory.pointer))


@pytest.fixture
def memory(context: Any) -> Iterator[Callable[..., int]]:
    """memory(size): device memory."""
    made: list[int] = []

    def make(size: int = SIZE) -> int:
        made.append(int(check(cuda.cuMemAlloc(size))))
        return made[-1]

    yield make
    for pointer in made:
        check(cuda.cuMemFree(pointer))


@pytest.fixture
def stream(context: Any) -> Iterator[Callable[..., Any]]:
    """stream(flags): a stream, non-blocking by default."""
    made: list[Any] = []

    def make(flags: int = 1) -> Any:
        made.append(check(cuda.cuStreamCreate(flags)))
        return made[-1]

    yield make
    for each in made:
        check(cuda.cuStreamDestroy(each))


@pytest.fixture
def event(context: Any) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(flags: int = 0) -> Any:
        made.append(check(cuda.cuEventCreate(flags)))
        return made[-1]

    yield make
    for each in made:
        check(cuda.cuEventDestroy(each))


class Gate:
    """Holds a stream up until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self._opened.wait(10) and None)

    def put(self, stream: Any) -> None:
        assert driver.launch_host_function(int(stream), self._function, 0) == 0

    def open(self) -> None:
        self._opened.set()


def read(pointer: int, size: int = SIZE) -> np.ndarray:
    result = np.empty(size, np.uint8)
    check(cuda.cuMemcpyDtoH(result.ctypes.data, pointer, size))
    return result


# What it says of itself


def test_find_driver_sees_it() -> None:
    found = find_driver()
    assert found.problem is None
    assert found.cuda_version == (13, 0)
    assert [(gpu.name, gpu.compute_capability, gpu.memory) for gpu in found.gpus] == [
        ("Simulated GPU", (8, 9), 8 << 30)
    ] * driver.option("gpus")


def test_what_it_has_not_is_reported_as_not_found() -> None:
    with pytest.raises(RuntimeError, match=r"cuModuleLoad\W.*not found"):
        cuda.cuModuleLoad(b"x")


def test_errors_have_names() -> None:
    assert cuda.cuGetErrorName(cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)[1] == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    assert cuda.cuGetErrorString(cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY)[1] == b"out of memory"
    assert cuda.cuGetErrorName(cuda.CUresult.CUDA_SUCCESS)[1] == b"CUDA_SUCCESS"


def test_cuda_core_wraps_device_memory_of_the_array_interface(memory: Any, stream: Any, event: Any) -> None:
    from cuda.core.utils import StridedMemoryView

    class Array:
        def __init__(self, producer: int | None) -> None:
            facts = {"shape": (10, 10), "typestr": "|u1", "data": (pointer, False), "version": 3}
            self.__cuda_array_interface__ = facts | {"stream": producer}

    pointer, producer, consumer, gate = memory(), stream(), stream(), Gate()
    gate.put(producer)
    view = StridedMemoryView.from_any_interface(Array(int(producer)), stream_ptr=int(consumer))
    assert (view.ptr, view.shape, view.is_device_accessible, view.device_id) == (pointer, (10, 10), True, 0)
    # The consumer was made to wait for the producer.
    check(cuda.cuMemsetD8Async(pointer, 1, 1, consumer))
    assert error(cuda.cuStreamQuery(consumer)) == "NOT_READY"
    gate.open()
    check(cuda.cuStreamSynchronize(consumer))


def test_pointers_tell_what_they_point_to(memory: Any, pinned: Any) -> None:
    kind = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    ordinal = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    pageable = np.empty(10, np.uint8).ctypes.data
    assert check(cuda.cuPointerGetAttributes(2, [kind, ordinal], memory() + 5)) == [2, 0]
    assert check(cuda.cuPointerGetAttributes(2, [kind, ordinal], pinned().pointer)) == [1, 0]
    assert check(cuda.cuPointerGetAttributes(2, [kind, ordinal], pageable)) == [0, 0]
    assert error(cuda.cuPointerGetAttribute(kind, pageable)) == "INVALID_VALUE"


# Streams and events


def test_a_stream_does_things_in_order(memory: Any, stream: Any, dawdle: Any) -> None:
    dawdle(300)
    pairs = [(memory(), stream()) for _ in range(4)]
    for byte in range(20):
        for pointer, where in pairs:
            check(cuda.cuMemsetD8Async(pointer, byte, SIZE // 2, where))
            check(cuda.cuMemcpyDtoDAsync(pointer + SIZE // 2, pointer, SIZE // 2, where))
    for pointer, where in pairs:
        check(cuda.cuStreamSynchronize(where))
        assert set(read(pointer)) == {19}


def test_memory_is_born_as_nan_and_aligned_to_no_more_than_256_bytes(memory: Any, pinned: Any) -> None:
    assert np.isnan(read(memory()).view(np.float32)).all()
    assert np.isnan(pinned().array.view(np.float32)).all()
    assert {(memory() % 256, memory() % 512), (pinned().pointer % 256, pinned().pointer % 512)} == {(0, 256)}


def test_a_copy_is_not_done_before_its_turn(memory: Any, pinned: Any, stream: Any) -> None:
    host, pointer, where, gate = pinned(), memory(), stream(), Gate()
    host.array[:] = 7
    gate.put(where)
    check(cuda.cuMemcpyHtoDAsync(pointer, host.pointer, SIZE, where))
    host.array[:] = 8  # too early, and that shows
    gate.open()
    check(cuda.cuStreamSynchronize(where))
    assert set(read(pointer)) == {8}


def test_delays_expose_a_missing_synchronisation(memory: Any, pinned: Any, stream: Any, dawdle: Any) -> None:
    dawdle(20_000)
    read_too_early = []
    for _ in range(10):
        host, pointer, where = pinned(), memory(), stream()
        check(cuda.cuMemsetD8Async(pointer, 5, SIZE, where))
        check(cuda.cuMemcpyDtoHAsync(host.pointer, pointer, SIZE, where))
        read_too_early.append(int(host.array[0]))
        check(cuda.cuStreamSynchronize(where))
        assert set(host.array) == {5}
    assert 255 in read_too_early


def test_delays_last_on_the_device(stream: Any, event: Any, dawdle: Any) -> None:
    dawdle(5000)
    where, start, end = stream(), event(), event()
    check(cuda.cuEventRecord(start, where))
    for _ in range(10):
        check(cuda.cuStreamWaitEvent(where, start, 0))
    check(cuda.cuEventRecord(end, where))
    check(cuda.cuEventSynchronize(end))
    assert check(cuda.cuEventElapsedTime(start, end)) > 5  # about 27 milliseconds


def test_events_order_streams(memory: Any, stream: Any, event: Any) -> None:
    pointer, first, second, done, gate = memory(), stream(), stream(), event(), Gate()
    gate.put(first)
    check(cuda.cuMemsetD8Async(pointer, 1, SIZE, first))
    check(cuda.cuEventRecord(done, first))
    check(cuda.cuStreamWaitEvent(second, done, 0))
    check(cuda.cuMemsetD8Async(pointer, 2, SIZE, second))
    time.sleep(0.02)
    assert error(cuda.cuEventQuery(done)) == error(cuda.cuStreamQuery(second)) == "NOT_READY"
    gate.open()
    check(cuda.cuStreamSynchronize(second))
    check(cuda.cuEventQuery(done))
    assert set(read(pointer)) == {2}


def test_waiting_is_for_the_recording_there_was(memory: Any, stream: Any, event: Any) -> None:
    first, second, third, done, gate, begin = stream(), stream(), stream(), event(), Gate(), Gate()
    check(cuda.cuStreamWaitEvent(second, done, 0))  # never recorded: nothing to wait for
    check(cuda.cuEventRecord(done, first))
    begin.put(second)
    check(cuda.cuStreamWaitEvent(second, done, 0))
    gate.put(third)
    check(cuda.cuEventRecord(done, third))  # does not concern who waits already
    begin.open()
    check(cuda.cuStreamSynchronize(second))
    assert error(cuda.cuEventQuery(done)) == "NOT_READY"
    gate.open()
    check(cuda.cuEventSynchronize(done))


def test_events_tell_the_time_between_them_on_the_device(stream: Any, event: Any) -> None:
    where, start, end, gate = stream(), event(), event(), Gate()
    check(cuda.cuEventRecord(start, where))
    gate.put(where)
    check(cuda.cuEventRecord(end, where))
    assert error(cuda.cuEventElapsedTime(start, end)) == "NOT_READY"
    check(cuda.cuEventSynchronize(start))
    timer = threading.Timer(0.03, gate.open)
    timer.start()
    check(cuda.cuEventSynchronize(end))
    timer.join()
    assert check(cuda.cuEventElapsedTime(start, end)) >= 29  # from before the stream was held up to after


@pytest.mark.misuse
def test_events_without_timing_tell_none(stream: Any, event: Any) -> None:
    where, start, end = stream(), event(), event(2)
    check(cuda.cuEventRecord(start, where))
    check(cuda.cuEventRecord(end, where))
    check(cuda.cuEventSynchronize(end))
    assert error(cuda.cuEventElapsedTime(start, end)) == "INVALID_HANDLE"


@pytest.mark.parametrize("legacy", [0, 1])
def test_the_legacy_stream_and_blocking_streams_wait_for_each_other(memory: Any, stream: Any, legacy: int) -> None:
    pointer, blocking, free, gate = memory(), stream(0), stream(1), Gate()
    gate.put(blocking)
    check(cuda.cuMemsetD8Async(pointer, 1, SIZE, legacy))
    check(cuda.cuMemsetD8Async(pointer + SIZE // 2, 2, SIZE // 2, blocking))
    check(cuda.cuStreamSynchronize(free))
    assert error(cuda.cuStreamQuery(legacy)) == "NOT_READY"
    gate.open()
    check(cuda.cuStreamSynchronize(blocking))
    assert list(read(pointer)[:: SIZE // 2]) == [1, 2]


def test_each_thread_has_a_default_stream_of_its_own(context: Any) -> None:
    gate, other = Gate(), []
    gate.put(2)

    def query() -> None:
        check(cuda.cuCtxSetCurrent(context))
        other.append(error(cuda.cuStreamQuery(2)))

    thread = threading.Thread(target=query)
    thread.start()
    thread.join()
    assert (other, error(cuda.cuStreamQuery(2))) == (["SUCCESS"], "NOT_READY")
    gate.open()
    check(cuda.cuStreamSynchronize(2))


def test_many_threads_wait_while_host_functions_need_the_gil(context: Any) -> None:
    def use() -> None:
        check(cuda.cuCtxSetCurrent(context))
        where, gate = check(cuda.cuStreamCreate(1)), Gate()
        gate.open()
        for _ in range(20):
            gate.put(where)
            check(cuda.cuStreamSynchronize(where))
        check(cuda.cuStreamDestroy(where))
        done.append(1)

    done: list[int] = []
    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8


# Memory


def test_only_copies_of_pageable_memory_are_counted_as_such(
    memory: Any, pinned: Any, stream: Any, counters: Counters
) -> None:
    host, pointer, where, pageable = pinned(), memory(), stream(), np.zeros(SIZE, np.uint8)
    before = counters("copies"), counters("pageable_copies")
    check(cuda.cuMemcpyAsync(pointer, host.pointer, SIZE, where))
    check(cuda.cuMemcpyAsync(memory(), pointer, SIZE, where))
    check(cuda.cuStreamSynchronize(where))
    assert (counters("copies") - before[0], counters("pageable_copies") - before[1]) == (2, 0)
    pageable[:] = 3
    check(cuda.cuMemcpyAsync(pointer, pageable.ctypes.data, SIZE, where))
    pageable[:] = 4  # it was taken when the call returned
    result = np.empty(SIZE, np.uint8)
    check(cuda.cuMemcpyAsync(result.ctypes.data, pointer, SIZE, where))  # complete when it returns
    assert set(result) == {3}
    assert counters("pageable_copies") - before[1] == 2


def test_freeing_waits_for_the_device(pinned: Any, stream: Any) -> None:
    host, where, gate = pinned(), stream(), Gate()
    pointer = check(cuda.cuMemAlloc(SIZE))
    gate.put(where)
    check(cuda.cuMemsetD8Async(pointer, 9, SIZE, where))
    check(cuda.cuMemcpyAsync(host.pointer, pointer, SIZE, where))
    timer = threading.Timer(0.02, gate.open)
    timer.start()
    check(cuda.cuMemFree(pointer))
    assert set(host.array) == {9}
    timer.join()


def test_counters_follow_what_lives(context: Any, counters: Counters) -> None:
    living = ("device_bytes", "pinned_bytes", "streams", "events", "graphs", "graph_execs")
    names = [*(f"live_{name}" for name in living), "allocations"]

    def now() -> list[int]:
        return [counters(name) - base for name, base in zip(names, before, strict=True)]

    before = [counters(name) for name in names]
    pointer, host = check(cuda.cuMemAlloc(300)), check(cuda.cuMemHostAlloc(500, 0))
    where, event = check(cuda.cuStreamCreate(0)), check(cuda.cuEventCreate(0))
    check(cuda.cuStreamBeginCapture(where, MODES["GLOBAL"]))
    graph = check(cuda.cuStreamEndCapture(where))
    executable = check(cuda.cuGraphInstantiate(graph, 0))
    assert now() == [300, 500, 1, 1, 1, 1, 2]
    check(cuda.cuMemFree(pointer))
    check(cuda.cuMemFreeHost(host))
    check(cuda.cuStreamDestroy(where))
    check(cuda.cuEventDestroy(event))
    check(cuda.cuGraphDestroy(graph))
    check(cuda.cuGraphExecDestroy(executable))
    assert now() == [0, 0, 0, 0, 0, 0, 2]
    with pytest.raises(KeyError):
        counters("nonsense")


def test_memory_is_limited_on_each_device(context: Any) -> None:
    used = driver.count("live_device_bytes")
    set_option("memory", used + 1000)
    pointer = check(cuda.cuMemAlloc(600))
    assert check(cuda.cuMemGetInfo()) == (400, used + 1000)
    assert error(cuda.cuMemAlloc(401)) == "OUT_OF_MEMORY"
    check(cuda.cuMemFree(pointer))
    check(cuda.cuMemFree(check(cuda.cuMemAlloc(1000))))


@pytest.mark.misuse
@pytest.mark.parametrize("case", ["behind the end", "before the beginning", "freed", "freed pinned"])
def test_copies_outside_living_memory_break_the_context_for_good(case: str, counters: Counters) -> None:
    # Device 1, since its context is of no more use. Of device 0 the fixture's context is current beside it.
    context = check(cuda.cuDevicePrimaryCtxRetain(1))
    check(cuda.cuCtxPushCurrent(context))
    host, pointer, freed = Pinned(), int(check(cuda.cuMemAlloc(SIZE))), int(check(cuda.cuMemAlloc(SIZE)))
    check(cuda.cuMemFree(freed))
    freed_pinned = int(check(cuda.cuMemHostAlloc(SIZE, 0)))
    check(cuda.cuMemFreeHost(freed_pinned))
    sources = {"behind the end": pointer + 1, "before the beginning": pointer - 1}
    source = (sources | {"freed": freed, "freed pinned": freed_pinned})[case]
    where = check(cuda.cuStreamCreate(0))
    check(cuda.cuMemcpyAsync(host.pointer, source, SIZE, where))  # found out only when it is done
    assert error(cuda.cuStreamSynchronize(where)) == "ILLEGAL_ADDRESS"
    assert error(cuda.cuMemAlloc(1)) == error(cuda.cuEventCreate(0)) == "ILLEGAL_ADDRESS"
    before = counters("abandoned")
    check(cuda.cuCtxPopCurrent())
    check(cuda.cuDevicePrimaryCtxRelease(1))
    assert counters("abandoned") - before == 3
    check(cuda.cuCtxPushCurrent(check(cuda.cuDevicePrimaryCtxRetain(1))))  # a new one works
    check(cuda.cuMemFree(check(cuda.cuMemAlloc(1))))
    check(cuda.cuCtxPopCurrent())
    check(cuda.cuDevicePrimaryCtxRelease(1))


@pytest.mark.parametrize("memory", ["cuMemAlloc(100)", "cuMemHostAlloc(100, 0)"])
def test_host_code_that_touches_what_it_must_not_crashes(memory: str) -> None:
    code = f"""
import ctypes
from cuda.bindings import driver as d
d.cuInit(0)
d.cuCtxPushCurrent(d.cuDevicePrimaryCtxRetain(0)[1])
pointer = int(d.{memory}[1])
if "Host" in {memory!r}:
    assert ctypes.string_at(pointer, 100) == bytes([255]) * 100
    d.cuMemFreeHost(pointer)
print("so far", flush=True)
ctypes.string_at(pointer, 100)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("so far\n", -11)


# Misuse


@pytest.mark.misuse
def test_handles_that_are_none_are_refused(memory: Any, stream: Any) -> None:
    where, event, pointer = (check(cuda.cuStreamCreate(0)), check(cuda.cuEventCreate(0)), check(cuda.cuMemAlloc(5)))
    check(cuda.cuStreamDestroy(where))
    check(cuda.cuEventDestroy(event))
    check(cuda.cuMemFree(pointer))
    pageable = np.empty(10, np.uint8).ctypes.data
    refused = {
        "INVALID_HANDLE": [
            cuda.cuStreamDestroy(where),
            cuda.cuStreamSynchronize(where),
            cuda.cuStreamSynchronize(12345),
            cuda.cuEventDestroy(event),
            cuda.cuEventRecord(event, stream()),
            cuda.cuEventSynchronize(12345),
        ],
        "INVALID_VALUE": [
            cuda.cuMemAlloc(0),
            cuda.cuMemFree(pointer),
            cuda.cuMemFree(memory() + 1),
            cuda.cuMemFree(pageable),
            cuda.cuMemFreeHost(memory()),
            cuda.cuMemFreeHost(pageable),
            cuda.cuGraphLaunch(12345, 0),
            cuda.cuGraphDestroy(12345),
        ],
    }
    for name, results in refused.items():
        assert {error(result) for result in results} == {name}


@pytest.mark.misuse
def test_without_a_context_nothing_goes(context: Any, counters: Counters) -> None:
    check(cuda.cuCtxPopCurrent())
    before = counters("misuse")
    for call in (
        lambda: cuda.cuMemAlloc(5),
        lambda: cuda.cuStreamCreate(0),
        cuda.cuCtxGetDevice,
        cuda.cuCtxSynchronize,
    ):
        assert error(call()) == "INVALID_CONTEXT"
    assert counters("misuse") - before == 4
    assert "cuCtxSynchronize" in driver.last_misuse()
    check(cuda.cuCtxPushCurrent(context))


def test_the_driver_must_be_started_first() -> None:
    code = "from cuda.bindings import driver as d; print(d.cuDeviceGetCount()[0].name, d.cuMemAlloc(5)[0].name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["CUDA_ERROR_NOT_INITIALIZED"] * 2


@pytest.mark.misuse
def test_host_functions_must_not_call_the_driver(stream: Any) -> None:
    results, where = [], stream()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(error(cuda.cuMemAlloc(5))))
    check(cuda.cuLaunchHostFunc(where, cuda.CUhostFn(ctypes.cast(function, ctypes.c_void_p).value), 0))  # once: works
    check(cuda.cuStreamSynchronize(where))
    assert results == ["NOT_PERMITTED"]


@pytest.mark.misuse
def test_an_event_is_recorded_on_its_own_device_only(event: Any) -> None:
    mark, context = event(), check(cuda.cuDevicePrimaryCtxRetain(1))
    check(cuda.cuCtxPushCurrent(context))
    where = check(cuda.cuStreamCreate(0))
    assert int(check(cuda.cuStreamGetCtx(where))) == int(context)
    assert error(cuda.cuEventRecord(mark, where)) == "INVALID_HANDLE"
    check(cuda.cuStreamDestroy(where))
    check(cuda.cuCtxPopCurrent())
    check(cuda.cuDevicePrimaryCtxRelease(1))


def test_what_a_released_context_leaves_is_counted(counters: Counters) -> None:
    before = counters("abandoned"), counters("live_device_bytes"), counters("primary_retained")
    check(cuda.cuCtxPushCurrent(check(cuda.cuDevicePrimaryCtxRetain(1))))
    for _ in range(3):
        check(cuda.cuMemAlloc(100))
    check(cuda.cuStreamCreate(0))
    check(cuda.cuCtxPopCurrent())
    assert (counters("live_device_bytes") - before[1], counters("primary_retained") - before[2]) == (300, 1)
    check(cuda.cuDevicePrimaryCtxRelease(1))
    after = counters("abandoned"), counters("live_device_bytes"), counters("primary_retained")
    assert after == (before[0] + 4, before[1], before[2])


# Graphs


class Capture:
    """Begins one; `graph` ends it and gives what can be launched; it is destroyed in the end."""

    def __init__(self, where: Any, mode: str = "THREAD_LOCAL") -> None:
        self.where = where
        check(cuda.cuStreamBeginCapture(where, MODES[mode]))

    def graph(self) -> Any:
        graph = check(cuda.cuStreamEndCapture(self.where))
        executable = check(cuda.cuGraphInstantiate(graph, 0))
        check(cuda.cuGraphDestroy(graph))
        return executable

    def error(self) -> str:
        return error(cuda.cuStreamEndCapture(self.where))


def test_a_graph_replays_what_was_captured(memory: Any, pinned: Any, stream: Any, counters: Counters) -> None:
    given, got, pointer, where = pinned(), pinned(), memory(), stream()
    got.array[:] = 0
    capture = Capture(where)
    check(cuda.cuMemcpyAsync(pointer, given.pointer, SIZE, where))
    check(cuda.cuMemsetD8Async(pointer, 77, 1, where))
    check(cuda.cuMemcpyAsync(got.pointer, pointer, SIZE, where))
    graph, before = capture.graph(), (counters("graph_launches"), counters("copies"))
    check(cuda.cuStreamSynchronize(where))
    assert set(got.array) == {0}  # nothing was executed
    for value in (1, 2):
        given.array[:] = value
        check(cuda.cuGraphLaunch(graph, where))
        check(cuda.cuStreamSynchronize(where))
        assert (got.array[0], set(got.array[1:])) == (77, {value})
    assert (counters("graph_launches") - before[0], counters("copies") - before[1]) == (2, 4)
    check(cuda.cuGraphExecDestroy(graph))


def test_a_graph_may_be_destroyed_while_it_runs_and_waits_for_itself(memory: Any, stream: Any) -> None:
    pointer, first, second, gate = memory(), stream(), stream(), Gate()
    capture = Capture(first)
    gate.put(first)
    check(cuda.cuMemsetD8Async(pointer, 3, SIZE, first))
    graph = capture.graph()
    check(cuda.cuGraphLaunch(graph, first))
    check(cuda.cuGraphLaunch(graph, second))
    check(cuda.cuGraphExecDestroy(graph))
    assert error(cuda.cuStreamQuery(second)) == "NOT_READY"
    gate.open()
    check(cuda.cuStreamSynchronize(second))
    check(cuda.cuStreamQuery(first))  # came before
    assert set(read(pointer)) == {3}


def test_a_capture_takes_in_streams_that_wait_for_it(memory: Any, stream: Any, event: Any) -> None:
    pointer, origin, other, begun, done = memory(), stream(), stream(), event(), event()
    capture = Capture(origin)
    check(cuda.cuMemsetD8Async(pointer, 1, SIZE, origin))
    check(cuda.cuEventRecord(begun, origin))
    check(cuda.cuStreamWaitEvent(other, begun, 0))
    assert int(check(cuda.cuStreamIsCapturing(other))) == 1
    check(cuda.cuMemsetD8Async(pointer, 2, 10, other))
    check(cuda.cuEventRecord(done, other))
    check(cuda.cuStreamWaitEvent(origin, done, 0))
    graph = capture.graph()
    assert int(check(cuda.cuStreamIsCapturing(other))) == 0
    check(cuda.cuGraphLaunch(graph, origin))
    check(cuda.cuStreamSynchronize(origin))
    assert (set(read(pointer)[:10]), set(read(pointer)[10:])) == ({2}, {1})
    check(cuda.cuGraphExecDestroy(graph))


def test_events_can_be_part_of_a_graph(stream: Any, event: Any) -> None:
    where, start, end, gate = stream(), event(), event(), Gate()
    capture = Capture(where)
    check(cuda.cuEventRecordWithFlags(start, where, 1))
    gate.put(where)
    check(cuda.cuEventRecordWithFlags(end, where, 1))
    graph = capture.graph()
    check(cuda.cuGraphLaunch(graph, where))
    assert error(cuda.cuEventQuery(end)) == "NOT_READY"
    gate.open()
    check(cuda.cuEventSynchronize(end))
    assert check(cuda.cuEventElapsedTime(start, end)) >= 0
    check(cuda.cuGraphExecDestroy(graph))


UNSAFE = {
    "alloc": lambda: cuda.cuMemAlloc(10),
    "alloc pinned": lambda: cuda.cuMemHostAlloc(10, 0),
    "copy": lambda: cuda.cuMemcpyDtoH(np.empty(1, np.uint8).ctypes.data, 0, 1),
}


@pytest.mark.parametrize("call", UNSAFE)
@pytest.mark.parametrize("mode", ["GLOBAL", "THREAD_LOCAL"])
def test_unsafe_calls_break_a_capture(stream: Any, mode: str, call: str) -> None:
    where = stream()
    capture = Capture(where, mode)
    assert error(UNSAFE[call]()) == "STREAM_CAPTURE_UNSUPPORTED"
    assert error(cuda.cuMemsetD8Async(0, 0, 1, where)) == "STREAM_CAPTURE_INVALIDATED"
    assert int(check(cuda.cuStreamIsCapturing(where))) == 2
    assert capture.error() == "STREAM_CAPTURE_INVALIDATED"
    check(cuda.cuStreamSynchronize(where))  # usable again


def test_a_relaxed_capture_allows_allocating(stream: Any) -> None:
    capture = Capture(stream(), "RELAXED")
    pointer = check(cuda.cuMemAlloc(10))
    check(cuda.cuGraphExecDestroy(capture.graph()))
    check(cuda.cuMemFree(pointer))


@pytest.mark.parametrize(("mode", "expected"), [("GLOBAL", "STREAM_CAPTURE_UNSUPPORTED"), ("THREAD_LOCAL", "SUCCESS")])
def test_a_global_capture_is_broken_by_other_threads(context: Any, stream: Any, mode: str, expected: str) -> None:
    def allocate() -> None:
        check(cuda.cuCtxSetCurrent(context))
        results.append(cuda.cuMemAlloc(10))

    capture, results = Capture(stream(), mode), []
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert error(results[0]) == expected
    if expected == "SUCCESS":
        check(cuda.cuGraphExecDestroy(capture.graph()))
        check(cuda.cuMemFree(results[0][1]))
    else:
        assert capture.error() == "STREAM_CAPTURE_INVALIDATED"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["cuStreamSynchronize", "cuStreamQuery", "cuCtxSynchronize"])
def test_a_capturing_stream_cannot_be_waited_for(stream: Any, call: str, mode: str) -> None:
    where = stream()
    capture = Capture(where, mode)
    arguments = [] if call == "cuCtxSynchronize" else [where]
    assert error(getattr(cuda, call)(*arguments)) == "STREAM_CAPTURE_UNSUPPORTED"
    assert capture.error() == "STREAM_CAPTURE_INVALIDATED"


def test_a_captured_event_cannot_be_waited_for(stream: Any, event: Any) -> None:
    where, mark = stream(), event()
    capture = Capture(where, "RELAXED")
    check(cuda.cuEventRecord(mark, where))
    assert error(cuda.cuEventQuery(mark)) == "CAPTURED_EVENT"
    assert capture.error() == "STREAM_CAPTURE_INVALIDATED"


def test_the_legacy_stream_cannot_wait_for_a_capture(memory: Any, stream: Any) -> None:
    pointer, blocking, free = memory(), stream(0), stream(1)
    capture = Capture(free, "RELAXED")
    check(cuda.cuMemsetD8Async(pointer, 0, 1, 0))
    check(cuda.cuGraphExecDestroy(capture.graph()))
    capture = Capture(blocking, "RELAXED")
    assert error(cuda.cuMemsetD8Async(pointer, 0, 1, 0)) == "STREAM_CAPTURE_IMPLICIT"
    assert capture.error() == "STREAM_CAPTURE_INVALIDATED"
    assert error(cuda.cuStreamBeginCapture(0, MODES["RELAXED"])) == "STREAM_CAPTURE_UNSUPPORTED"


def test_captures_that_hang_in_the_air_fail(memory: Any, stream: Any, event: Any) -> None:
    pointer, origin, other, before, inside = memory(), stream(), stream(), event(), event()
    check(cuda.cuEventRecord(before, other))
    capture = Capture(origin)
    assert error(cuda.cuStreamWaitEvent(origin, before, 0)) == "STREAM_CAPTURE_ISOLATION"
    assert capture.error() == "STREAM_CAPTURE_INVALIDATED"
    capture = Capture(origin)
    check(cuda.cuEventRecord(inside, origin))
    check(cuda.cuStreamWaitEvent(other, inside, 0))
    check(cuda.cuMemsetD8Async(pointer, 0, 1, other))
    assert error(cuda.cuStreamEndCapture(other)) == "STREAM_CAPTURE_UNMATCHED"
    assert capture.error() == "STREAM_CAPTURE_UNJOINED"
    assert error(cuda.cuStreamEndCapture(origin)) == "ILLEGAL_STATE"


def test_a_capture_is_ended_by_the_thread_that_began_it(context: Any, stream: Any) -> None:
    def end() -> None:
        check(cuda.cuCtxSetCurrent(context))
        results.append(capture.error())

    capture, results = Capture(stream()), []
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert results == ["STREAM_CAPTURE_WRONG_THREAD"]
    check(cuda.cuGraphExecDestroy(capture.graph()))
