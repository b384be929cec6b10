"""One GPU on its primary context: memory, streams, events and graphs, and that all of it is given back."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cuda
from standin.driver import check, set_option

from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.runtime import cuda as runtime_cuda
from rxdeploy.runtime.cuda import LEGACY_STREAM, DeviceArray, Event, Gpu, Stream, capture

pytestmark = pytest.mark.usefixtures("steady_garbage")
Counters = Callable[[str], int]
LIVE = (
    "live_device_bytes",
    "live_pinned_bytes",
    "live_streams",
    "live_events",
    "live_graphs",
    "live_graph_execs",
)


@pytest.fixture
def nothing_left(counters: Counters) -> Iterator[None]:
    """Fails when anything of the driver's is still alive at the end."""
    before = {name: counters(name) for name in LIVE}
    yield
    gc.collect()
    assert {name: counters(name) for name in LIVE} == before
    assert not counters("abandoned")


@pytest.fixture
def gpu(nothing_left: None) -> Gpu:
    return Gpu()


# The device


def test_the_facts_are_the_drivers(gpu: Gpu) -> None:
    assert (gpu.ordinal, gpu.name, gpu.compute_capability, gpu.memory) == (0, "Simulated GPU", (8, 9), 8 << 30)
    assert Gpu(1).ordinal == 1


def test_the_facts_are_those_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a machine with different GPUs; the simulated ones are all alike."""
    first = find_driver().gpus[0]
    second = dataclasses.replace(first, name="Another GPU", compute_capability=(7, 5), memory=1 << 30)
    driver = dataclasses.replace(find_driver(), gpus=(first, second))
    monkeypatch.setattr(runtime_cuda, "find_driver", lambda: driver)
    found = Gpu(1)
    assert (found.name, found.compute_capability, found.memory) == ("Another GPU", (7, 5), 1 << 30)


@pytest.mark.parametrize("ordinal", [2, 100, -1])
def test_a_gpu_that_is_not_there(ordinal: int, nothing_left: None) -> None:
    with pytest.raises(EnvironmentLacks, match=rf"GPU {ordinal}: there is none of that number, only 2 GPU\(s\)"):
        Gpu(ordinal)


def test_its_context_is_current_only_inside(gpu: Gpu) -> None:
    def current() -> int:
        return int(check(cuda.cuCtxGetCurrent()))

    other = Gpu(1)
    before = current()
    with gpu.current():
        first = current()
        with other.current():
            second = current()
            with gpu.current():
                assert current() == first
            assert current() == second
        assert current() == first
        with pytest.raises(KeyError), other.current():
            raise KeyError
        assert current() == first
    assert current() == before
    assert len({first, second}) == 2


def test_it_is_the_primary_context(gpu: Gpu, nothing_left: None) -> None:
    """The one that PyTorch, CuPy and the CUDA runtime use."""
    primary = int(check(cuda.cuDevicePrimaryCtxRetain(0)))
    check(cuda.cuDevicePrimaryCtxRelease(0))
    with gpu.current():
        assert int(check(cuda.cuCtxGetCurrent())) == primary


def test_what_is_allocated_keeps_the_context(nothing_left: None, counters: Counters) -> None:
    retained = counters("primary_retained")
    memory, array = Gpu().allocate(100), Gpu().empty((3,), np.float32)
    gc.collect()
    assert counters("primary_retained") == retained + 2
    array.fill(np.arange(3, dtype=np.float32))
    assert array.numpy().tolist() == [0, 1, 2]
    memory.close()
    del memory
    gc.collect()
    assert counters("primary_retained") == retained + 1


def test_free_memory(gpu: Gpu) -> None:
    before = gpu.free_memory()
    memory = gpu.allocate(1 << 20)
    assert gpu.free_memory() <= before - (1 << 20)
    memory.close()
    assert gpu.free_memory() == before


# Memory


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1_000_000])
def test_memory_is_aligned_and_given_back(gpu: Gpu, counters: Counters, size: int) -> None:
    device, pinned = counters("live_device_bytes"), counters("live_pinned_bytes")
    memories = [gpu.allocate(size), gpu.pinned(size)]
    assert [memory.size for memory in memories] == [size, size]
    assert memories[0].pointer % 256 == 0
    assert counters("live_device_bytes") - device >= size
    assert counters("live_pinned_bytes") - pinned >= size
    for memory in memories:
        memory.close()
        memory.close()
    assert (counters("live_device_bytes"), counters("live_pinned_bytes")) == (device, pinned)


def test_memory_is_given_back_by_another_thread_and_by_nobody(gpu: Gpu, counters: Counters) -> None:
    before = [counters(name) for name in LIVE]
    held: list[Any] = [gpu.allocate(5), gpu.pinned(5), gpu.stream(), gpu.event(), gpu.empty((2, 2), np.int8)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert [counters(name) for name in LIVE] == before


def test_too_little_memory_says_what_to_do(gpu: Gpu, counters: Counters) -> None:
    set_option("memory", 10_000)
    before = [counters(name) for name in LIVE]
    with pytest.raises(EnvironmentLacks, match="not enough free memory; use smaller batches, or free some"):
        gpu.allocate(20_000)
    assert [counters(name) for name in LIVE] == before
    gpu.allocate(5_000).close()  # what there is can still be had


def test_pinned_memory_goes_there_and_back(gpu: Gpu, dawdle: Callable) -> None:
    dawdle(500)
    here, there, stream = gpu.pinned(1000), gpu.allocate(1000), gpu.stream()
    assert here.array.shape == (1000,) and here.array.dtype == np.uint8
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    here.array[:] = content
    with gpu.current():
        gpu.copy(there.pointer, here.pointer, 1000, stream.handle)
    stream.synchronize()
    here.array[:] = 0
    with gpu.current():
        gpu.copy(here.pointer + 500, there.pointer, 500, stream.handle)
    stream.synchronize()
    np.testing.assert_array_equal(here.array, np.concatenate([np.zeros(500, np.uint8), content[:500]]))
    here.close()
    assert not len(here.array)


# Arrays


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 0, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64])
def test_arrays_go_there_and_back(gpu: Gpu, dawdle: Callable, shape: tuple[int, ...], dtype: type) -> None:
    dawdle(200)
    values = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    array = gpu.empty(shape, dtype)
    assert array.nbytes == values.nbytes
    assert (array.shape, array.dtype) == (values.shape, values.dtype)
    if values.nbytes:
        array.fill(values)
        np.testing.assert_array_equal(array.numpy(), values)
    else:
        assert array.numpy().shape == shape


def test_fill_takes_any_layout_and_is_done_on_return(gpu: Gpu, dawdle: Callable) -> None:
    dawdle(3000)
    values = np.arange(24, dtype=np.float64).reshape(4, 6).T[::-1]
    array, copy = gpu.empty((6, 4), np.float32), values.copy()
    array.fill(values)
    values[:] = -1
    stream = gpu.stream()
    there = gpu.empty((6, 4), np.float32)
    with gpu.current():
        gpu.copy(there.pointer, array.pointer, array.nbytes, stream.handle)
    stream.synchronize()
    np.testing.assert_array_equal(there.numpy(), copy)


def test_an_array_waits_for_the_stream_that_fills_it(gpu: Gpu, gate: Callable) -> None:
    stream, source = gpu.stream(), gpu.empty((5,), np.float32)
    source.fill(np.arange(5, dtype=np.float32))
    array = DeviceArray(gpu, (5,), np.dtype(np.float32), stream.handle)
    shut = gate(gpu, stream.handle)
    with gpu.current():
        gpu.copy(array.pointer, source.pointer, array.nbytes, stream.handle)
    threading.Timer(0.05, shut.open).start()
    assert array.numpy().tolist() == [0, 1, 2, 3, 4]


def test_the_cuda_array_interface(gpu: Gpu) -> None:
    array = gpu.empty((2, 3), np.float32)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (array.pointer, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    assert DeviceArray(gpu, (1,), np.dtype(np.uint8), 77).__cuda_array_interface__["stream"] == 77
    assert len(array) == 2
    assert repr(array) == "DeviceArray(float32 (2, 3) on Simulated GPU)"


# Streams and events


def test_a_stream_waits_for_an_event_of_another(gpu: Gpu, gate: Callable) -> None:
    first, second, event = gpu.stream(), gpu.stream(), gpu.event()
    source, middle, last = (gpu.empty((4,), np.int32) for _ in range(3))
    source.fill(np.arange(4, dtype=np.int32))
    shut = gate(gpu, first.handle)
    with gpu.current():
        gpu.copy(middle.pointer, source.pointer, 16, first.handle)
        first.record(event)
        second.wait(event)
        gpu.copy(last.pointer, middle.pointer, 16, second.handle)
    assert not event.done()
    shut.open()
    second.synchronize()
    assert event.done()
    assert last.numpy().tolist() == [0, 1, 2, 3]


def test_an_event_can_be_waited_for(gpu: Gpu, gate: Callable) -> None:
    stream, event = gpu.stream(), gpu.event()
    assert event.done()  # never recorded
    shut = gate(gpu, stream.handle)
    stream.record(event)
    assert not event.done()
    threading.Timer(0.02, shut.open).start()
    event.synchronize()
    assert event.done()


def test_the_time_between_events(gpu: Gpu, gate: Callable) -> None:
    stream, begin, end = gpu.stream(), gpu.event(timing=True), gpu.event(timing=True)
    stream.record(begin)
    begin.synchronize()
    shut = gate(gpu, stream.handle)
    stream.record(end)
    threading.Timer(0.03, shut.open).start()
    end.synchronize()
    assert 0.025 < end.seconds_since(begin) < 5


@pytest.mark.misuse
def test_events_without_timing_tell_no_time(gpu: Gpu) -> None:
    stream, begin, end = gpu.stream(), gpu.event(), gpu.event()
    stream.record(begin)
    stream.record(end)
    stream.synchronize()
    with pytest.raises(EnvironmentLacks, match="CUDA_ERROR_INVALID_HANDLE"):
        end.seconds_since(begin)


def test_a_stream_of_ours_does_not_wait_for_the_default_stream(gpu: Gpu, gate: Callable) -> None:
    stream, source, target = gpu.stream(), gpu.empty((3,), np.uint8), gpu.empty((3,), np.uint8)
    theirs = gpu.event()
    shut = gate(gpu, LEGACY_STREAM)
    with gpu.current():
        theirs.record(LEGACY_STREAM)
        gpu.copy(target.pointer, source.pointer, 3, stream.handle)
    stream.synchronize()
    assert not theirs.done()
    shut.open()
    gpu.synchronize(LEGACY_STREAM)


def test_streams_follow_the_protocol_of_cuda_python(gpu: Gpu) -> None:
    stream = gpu.stream()
    assert stream.__cuda_stream__() == (0, stream.handle)


@pytest.mark.parametrize("wait", [Stream.synchronize, Event.synchronize], ids=["stream", "event"])
def test_waiting_lets_other_threads_run(gpu: Gpu, gate: Callable, wait: Callable) -> None:
    """What is waited for is opened by a thread that needs the interpreter."""
    stream, event = gpu.stream(), gpu.event()
    shut = gate(gpu, stream.handle)
    stream.record(event)
    threading.Timer(0.02, shut.open).start()
    wait(stream if wait is Stream.synchronize else event)
    assert event.done()


# Streams of others


@pytest.mark.parametrize("handle", [1, 2])
def test_default_streams_belong_to_every_context(gpu: Gpu, handle: int) -> None:
    with gpu.current():
        gpu.check_stream(handle)


def test_a_stream_of_this_context_is_taken_and_of_another_not(gpu: Gpu) -> None:
    mine, others = gpu.stream(), Gpu(1).stream()
    with gpu.current():
        gpu.check_stream(mine.handle)
        with pytest.raises(InputError, match="no stream of GPU 0's primary context"):
            gpu.check_stream(others.handle)


@pytest.mark.misuse
def test_a_stream_that_was_destroyed(gpu: Gpu) -> None:
    stream = gpu.stream()
    stream.close()
    with gpu.current(), pytest.raises(InputError, match="no stream of GPU 0's primary context"):
        gpu.check_stream(stream.handle)


def test_a_stream_that_is_being_captured(gpu: Gpu) -> None:
    stream = gpu.stream()
    with gpu.current(), capture(gpu, stream.handle), pytest.raises(InputError, match="captured into a CUDA graph"):
        gpu.check_stream(stream.handle)


@pytest.mark.parametrize("said", ["INVALID_HANDLE", "INVALID_VALUE", "INVALID_CONTEXT", "CONTEXT_IS_DESTROYED"])
def test_whatever_the_driver_says_of_what_is_no_stream_of_here(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Real drivers differ in it, and by what the number once was."""
    stream = gpu.stream()
    status = getattr(cuda.CUresult, f"CUDA_ERROR_{said}")
    monkeypatch.setattr(cuda, "cuStreamGetCtx", lambda _: (status, None))
    with gpu.current(), pytest.raises(InputError, match="no stream of GPU 0's primary context"):
        gpu.check_stream(stream.handle)


def test_a_stream_whose_capture_something_broke(gpu: Gpu) -> None:
    stream = gpu.stream()
    with pytest.raises(EnvironmentLacks, match="INVALIDATED"), gpu.current(), capture(gpu, stream.handle):
        cuda.cuStreamSynchronize(stream.handle)  # not allowed here
        with pytest.raises(InputError, match="captured into a CUDA graph"):
            gpu.check_stream(stream.handle)


def test_the_default_stream_while_one_that_waits_for_it_is_captured(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver does not even tell; the simulated one does."""
    status = cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
    monkeypatch.setattr(cuda, "cuStreamIsCapturing", lambda _: (status, None))
    with gpu.current(), pytest.raises(InputError, match="captured into a CUDA graph"):
        gpu.check_stream(LEGACY_STREAM)


# Graphs


def test_a_graph_does_it_again(gpu: Gpu, counters: Counters, dawdle: Callable) -> None:
    dawdle(300)
    stream, source, target = gpu.stream(), gpu.empty((3,), np.float32), gpu.empty((3,), np.float32)
    target.fill(np.zeros(3, np.float32))
    source.fill(np.ones(3, np.float32))
    with gpu.current(), capture(gpu, stream.handle) as graphs:
        gpu.copy(target.pointer, source.pointer, 12, stream.handle)
    (graph,) = graphs
    stream.synchronize()
    assert target.numpy().tolist() == [0, 0, 0]  # recorded, not done
    for value in (2, 3):
        source.fill(np.full(3, value, np.float32))
        with gpu.current():
            graph.launch(stream.handle)
        stream.synchronize()
        assert target.numpy().tolist() == [value] * 3
    assert counters("graph_launches") == 2
    assert counters("live_graphs") == 0
    graph.close()
    assert counters("live_graph_execs") == 0


def test_an_error_ends_the_capture(gpu: Gpu, counters: Counters) -> None:
    stream = gpu.stream()
    with pytest.raises(KeyError), gpu.current(), capture(gpu, stream.handle):
        raise KeyError
    with gpu.current():
        gpu.check_stream(stream.handle)  # it captures no more
        with capture(gpu, stream.handle) as graphs:
            pass
    assert len(graphs) == 1
    assert counters("live_graphs") == 0


def test_a_capture_that_the_driver_ends(gpu: Gpu, counters: Counters) -> None:
    stream = gpu.stream()
    with (
        pytest.raises(EnvironmentLacks, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
        gpu.current(),
        capture(gpu, stream.handle) as graphs,
    ):
        cuda.cuStreamSynchronize(stream.handle)  # not allowed here
    assert not graphs
    assert counters("live_graphs") == 0
    stream.synchronize()


def test_a_graph_that_cannot_be_made_leaves_nothing(
    gpu: Gpu, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = gpu.stream()
    status = cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    monkeypatch.setattr(cuda, "cuGraphInstantiate", lambda *_: (status, None))
    with pytest.raises(EnvironmentLacks, match="not enough free memory"), gpu.current(), capture(gpu, stream.handle):
        pass
    assert counters("live_graphs") == 0


def test_what_a_graph_could_not_repeat_is_refused(gpu: Gpu) -> None:
    """An allocation would happen once, not at every launch."""
    stream = gpu.stream()
    with gpu.current(), pytest.raises(EnvironmentLacks, match="STREAM_CAPTURE"), capture(gpu, stream.handle):
        gpu.allocate(100)


def test_arrays_go_there_and_back_while_a_blocking_stream_is_captured(gpu: Gpu) -> None:
    """Whose capture anything on the default stream would break."""
    array = gpu.empty((3,), np.uint8)
    with gpu.current():
        blocking = int(check(cuda.cuStreamCreate(0)))
        with capture(gpu, blocking) as graphs:
            thread = threading.Thread(target=lambda: array.fill(np.arange(3, dtype=np.uint8)))
            thread.start()
            thread.join()
        check(cuda.cuStreamDestroy(blocking))
    assert len(graphs) == 1
    assert array.numpy().tolist() == [0, 1, 2]


def test_other_threads_may_allocate_and_copy_while_one_captures(gpu: Gpu) -> None:
    stream, failures = gpu.stream(), []

    def work() -> None:
        try:
            array = gpu.empty((100,), np.float32)
            array.numpy()
            gpu.stream().synchronize()
            gpu.pinned(10).close()
        except EnvironmentLacks as error:
            failures.append(error)

    with gpu.current(), capture(gpu, stream.handle) as graphs:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not failures and len(graphs) == 1


def test_other_threads_may_fill_arrays_while_one_captures(gpu: Gpu) -> None:
    stream, failures = gpu.stream(), []

    def work() -> None:
        try:
            gpu.empty((100,), np.float32).fill(np.zeros(100, np.float32))
        except EnvironmentLacks as error:
            failures.append(error)

    with gpu.current(), capture(gpu, stream.handle) as graphs:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not failures and len(graphs) == 1


# Errors of the driver


def break_device() -> None:
    gpu = Gpu(1)
    owned = [gpu.stream(), gpu.event(), gpu.allocate(100), gpu.pinned(100), gpu.empty((3,), np.float32)]
    dead = gpu.allocate(100)
    dead.close()
    with gpu.current():
        gpu.copy(dead.pointer, dead.pointer, 100, owned[0].handle)
    synchronize, done = owned[0].synchronize, owned[1].done
    for call in (synchronize, done, lambda: gpu.allocate(5), lambda: gpu.pinned(5), gpu.stream, owned[-1].numpy):
        with pytest.raises(EnvironmentLacks, match="the GPU reports CUDA_ERROR_ILLEGAL_ADDRESS"):
            call()
    for each in owned[:-1]:
        each.close()


@pytest.mark.misuse
def test_an_illegal_address_is_said_and_everything_can_still_be_given_back(counters: Counters) -> None:
    gc.collect()
    before = [counters(name) for name in (*LIVE, "primary_retained")]
    break_device()
    gc.collect()
    assert [counters(name) for name in (*LIVE, "primary_retained")] == before
    with Gpu(1).current():  # a new context is whole again
        check(cuda.cuCtxSynchronize())


def test_an_error_that_the_driver_has_no_name_for(gpu: Gpu) -> None:
    """The bindings may be newer than the driver."""
    with pytest.raises(EnvironmentLacks, match=r"the GPU reports error 909$"):
        runtime_cuda._check((cuda.CUresult.CUDA_ERROR_TIMEOUT,))


@pytest.mark.misuse
def test_a_broken_device_is_not_blamed_on_the_stream() -> None:
    gpu = Gpu(1)
    stream, memory = gpu.stream(), gpu.allocate(100)
    memory.close()
    with gpu.current():
        gpu.copy(memory.pointer, memory.pointer, 100, stream.handle)
        cuda.cuStreamSynchronize(stream.handle)
        try:
            with pytest.raises(EnvironmentLacks, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
                gpu.check_stream(stream.handle)
        finally:
            stream.close()
            cuda.cuDevicePrimaryCtxReset(1)
