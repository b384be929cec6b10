"""One NVIDIA GPU on its primary context, over the driver bindings of cuda-python.

The primary context is the one that PyTorch, CuPy, Numba and the CUDA runtime use, so memory and streams go back
and forth without a copy. PyCUDA makes it current with ``pycuda.autoprimaryctx`` or ``Device.retain_primary_context``.
Nothing here is imported from CUDA before a driver was found.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import EnvironmentLacks, InputError, missing_module

PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD
LEGACY_STREAM = 1  # CU_STREAM_LEGACY; DLPack and the CUDA array interface do not allow its other name, 0


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    return driver


def _check(answer: tuple) -> Any:
    """The value of a driver call; EnvironmentLacks with the driver's own name for what went wrong."""
    if answer[0] == 0:
        return answer[1] if len(answer) == 2 else answer[1:]
    driver = _driver()
    if answer[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise EnvironmentLacks("the GPU has not enough free memory; use smaller batches, or free some")
    raise EnvironmentLacks(f"the GPU reports {_error_name(answer[0])}")


def _error_name(status: Any) -> str:
    driver = _driver()
    (_, name), (_, text) = driver.cuGetErrorName(status), driver.cuGetErrorString(status)
    return f"{name.decode()} ({text.decode()})" if name and text else f"error {int(status)}"


class Gpu:
    """One CUDA device, with its primary context retained while this or anything allocated here lives.

    `ordinal` counts as CUDA does (CUDA_VISIBLE_DEVICES applies); `memory` is in bytes. EnvironmentLacks
    when there is no driver, no such device, or no cuda-python.
    """

    def __init__(self, ordinal: int = 0) -> None:
        found = find_driver()
        if found.problem:
            raise EnvironmentLacks(found.problem)
        if not 0 <= ordinal < len(found.gpus):
            raise EnvironmentLacks(f"GPU {ordinal}: there is none of that number, only {len(found.gpus)} GPU(s)")
        facts = found.gpus[ordinal]
        self.ordinal = ordinal
        self.name, self.compute_capability, self.memory = facts.name, facts.compute_capability, facts.memory
        driver = _driver()
        _check(driver.cuInit(0))
        self._device = _check(driver.cuDeviceGet(ordinal))
        self._context = _check(driver.cuDevicePrimaryCtxRetain(self._device))
        weakref.finalize(self, driver.cuDevicePrimaryCtxRelease, self._device)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the primary context current on this thread, and what was current before when it ends."""
        driver = _driver()
        _check(driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            driver.cuCtxPopCurrent()

    def stream(self) -> Stream:
        """A new stream, which does not wait for the legacy default stream."""
        return Stream(self)

    def event(self, timing: bool = False) -> Event:
        """A new event; only one with `timing` can tell a time."""
        return Event(self, timing)

    def allocate(self, size: int) -> DeviceMemory:
        """`size` bytes on the device, at a multiple of 256."""
        return DeviceMemory(self, size)

    def pinned(self, size: int) -> PinnedMemory:
        """`size` bytes on the host that the device copies from and to by itself."""
        return PinnedMemory(self, size)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """An uninitialised, C-contiguous array on the device."""
        return DeviceArray(self, shape, np.dtype(dtype))

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes between any two addresses. The context must be current."""
        _check(_driver().cuMemcpyAsync(destination, source, size, stream))

    def check_stream(self, handle: int) -> None:
        """InputError unless the stream is of this device's primary context and not being captured.

        The context must be current.
        """
        driver = _driver()
        results = driver.CUresult
        if handle > 2:  # the others are the default streams, of whatever context is current
            answer = driver.cuStreamGetCtx(handle)
            foreign = answer[0] in (
                results.CUDA_ERROR_INVALID_HANDLE,
                results.CUDA_ERROR_INVALID_VALUE,
                results.CUDA_ERROR_INVALID_CONTEXT,
                results.CUDA_ERROR_CONTEXT_IS_DESTROYED,
            )
            if foreign or int(_check(answer)) != int(self._context):
                raise InputError(
                    f"stream {handle:#x}: it is no stream of GPU {self.ordinal}'s primary context; PyCUDA makes such "
                    "streams after `import pycuda.autoprimaryctx`"
                )
        answer = driver.cuStreamIsCapturing(handle)
        if (
            answer[0] == results.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
            or _check(answer) != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        ):
            raise InputError(f"stream {handle:#x}: it is being captured into a CUDA graph; the session has its own")

    def order(self, before: int, after: int) -> None:
        """Let later work on the stream `after` wait for what is on `before` now. The context must be current."""
        event = self.event()
        event.record(before)
        event.hold_back(after)
        event.close()

    def device_of(self, pointer: int) -> int:
        """The number of the GPU that `pointer` lies on; InputError for what is no device memory."""
        driver = _driver()
        what = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        answer = driver.cuPointerGetAttribute(what, pointer)
        if answer[0] == driver.CUresult.CUDA_ERROR_INVALID_VALUE:
            raise InputError(f"{pointer:#x} is no address in the memory of a GPU")
        return int(_check(answer))

    def synchronize(self, stream: int) -> None:
        """Wait, with the GIL released, until everything enqueued on `stream` is done."""
        with self.current():
            _check(_driver().cuStreamSynchronize(stream))

    def free_memory(self) -> int:
        """Bytes that are free on the device now."""
        with self.current():
            return int(_check(_driver().cuMemGetInfo())[0])


def _release(gpu: Gpu, function: str, handle: Any) -> None:
    with gpu.current():
        getattr(_driver(), function)(handle)


class _Owned:
    """Something of the driver's that is given back by `close`, or when nobody holds it any more."""

    def __init__(self, gpu: Gpu, release: str, handle: Any) -> None:
        self.gpu = gpu
        self._finalizer = weakref.finalize(self, _release, gpu, release, handle)

    def close(self) -> None:
        """Give it back; nothing may use it any more. Doing it twice is no error."""
        self._finalizer()


class Stream(_Owned):
    """A CUDA stream; `handle` is the number that other libraries take."""

    def __init__(self, gpu: Gpu) -> None:
        driver = _driver()
        with gpu.current():
            stream = _check(driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        super().__init__(gpu, "cuStreamDestroy", stream)
        self.handle = int(stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def synchronize(self) -> None:
        """Wait, with the GIL released, until everything enqueued here is done."""
        self.gpu.synchronize(self.handle)

    def wait(self, event: Event) -> None:
        """Let what is enqueued from here on wait for `event`; the caller does not wait."""
        with self.gpu.current():
            event.hold_back(self.handle)

    def record(self, event: Event) -> None:
        """Let `event` happen when everything enqueued so far is done."""
        with self.gpu.current():
            event.record(self.handle)


class Event(_Owned):
    """A point in a stream's work."""

    def __init__(self, gpu: Gpu, timing: bool = False) -> None:
        driver = _driver()
        flags = driver.CUevent_flags.CU_EVENT_DEFAULT if timing else driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        with gpu.current():
            self._event = _check(driver.cuEventCreate(int(flags)))
        super().__init__(gpu, "cuEventDestroy", self._event)

    def record(self, stream: int) -> None:
        """Let it happen when everything on `stream` so far is done. The context must be current."""
        _check(_driver().cuEventRecord(self._event, stream))

    def hold_back(self, stream: int) -> None:
        """Let later work on `stream` wait for it. The context must be current."""
        _check(_driver().cuStreamWaitEvent(stream, self._event, 0))

    def synchronize(self) -> None:
        """Wait, with the GIL released, until it has happened."""
        with self.gpu.current():
            _check(_driver().cuEventSynchronize(self._event))

    def done(self) -> bool:
        """Whether it has happened."""
        driver = _driver()
        with self.gpu.current():
            (status,) = driver.cuEventQuery(self._event)
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _check((status,))
        return True

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two events with `timing` that have happened, in seconds."""
        with self.gpu.current():
            return float(_check(_driver().cuEventElapsedTime(earlier._event, self._event))) / 1000


class DeviceMemory(_Owned):
    """Bytes on the device."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        with gpu.current():
            pointer = _check(_driver().cuMemAlloc(max(size, 1)))
        super().__init__(gpu, "cuMemFree", pointer)
        self.pointer, self.size = int(pointer), size


class PinnedMemory(_Owned):
    """Page-locked bytes on the host; `array` shows them as uint8 (size,)."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        with gpu.current():
            self.pointer = int(_check(_driver().cuMemHostAlloc(max(size, 1), 0)))
        super().__init__(gpu, "cuMemFreeHost", self.pointer)
        self.size = size
        self.array: NDArray[np.uint8] = np.asarray(_HostBytes(self.pointer, size))

    def close(self) -> None:
        """Give it back. `array` and views of it must not be used any more."""
        super().close()
        self.array = np.empty(0, np.uint8)


class _HostBytes:
    """An address as NumPy's array interface has it."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__array_interface__ = {"data": (pointer, False), "shape": (size,), "typestr": "|u1", "version": 3}


class DeviceArray:
    """An array on the device, C-contiguous, that CuPy, PyTorch, Numba and PyCUDA take without a copy.

    It has the CUDA array interface; `torch.as_tensor(array, device="cuda")` and `cupy.asarray(array)` share it.
    `stream` is the handle of the stream whose work fills it, None when it is ready; `keeps` is kept alive with it.
    """

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype, stream: int | None = None) -> None:
        self.gpu, self.shape, self.dtype, self.stream = gpu, shape, dtype, stream
        self.keeps: Any = None  # the stream's object, say
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        self._memory = gpu.allocate(self.nbytes)
        self.pointer = self._memory.pointer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "strides": None,
            "stream": self.stream,
        }

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray:
        if copy is False:
            raise ValueError("a DeviceArray lies on the GPU: only a copy of it can be on the host")
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def numpy(self) -> NDArray:
        """A copy on the host, after waiting for what fills it."""
        result = np.empty(self.shape, self.dtype)
        self._copy(result.ctypes.data, self.pointer)
        return result

    def fill(self, values: NDArray) -> None:
        """Copy `values`, of this shape and dtype, from the host; complete on return."""
        values = np.ascontiguousarray(values, self.dtype).reshape(self.shape)
        self._copy(self.pointer, values.ctypes.data)

    def _copy(self, destination: int, source: int) -> None:
        """Copy everything, after what fills the array, and wait for it."""
        # On a stream of its own: what waits for the whole context is refused while a graph is being captured.
        stream = self.gpu.stream()
        with self.gpu.current():
            if self.stream is not None:
                self.gpu.order(before=self.stream, after=stream.handle)
            self.gpu.copy(destination, source, self.nbytes, stream.handle)
        stream.synchronize()
        stream.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {self.shape} on {self.gpu.name})"


class Graph(_Owned):
    """A captured CUDA graph, ready to be launched."""

    def __init__(self, gpu: Gpu, executable: Any) -> None:
        super().__init__(gpu, "cuGraphExecDestroy", executable)
        self._executable = executable

    def launch(self, stream: int) -> None:
        """Enqueue it. The context must be current."""
        _check(_driver().cuGraphLaunch(self._executable, stream))


@contextlib.contextmanager
def capture(gpu: Gpu, stream: int) -> Iterator[list[Graph]]:
    """Records what is enqueued on `stream` instead of doing it; the list holds the graph afterwards.

    The context must be current. Other threads may go on allocating (thread-local capture). An error inside
    ends the capture and is raised on.
    """
    driver = _driver()
    captured: list[Graph] = []
    _check(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    try:
        yield captured
    except BaseException:
        status, *graphs = driver.cuStreamEndCapture(stream)
        if status == 0 and int(graphs[0]):
            driver.cuGraphDestroy(graphs[0])
        raise
    graph = _check(driver.cuStreamEndCapture(stream))
    try:
        captured.append(Graph(gpu, _check(driver.cuGraphInstantiate(graph, 0))))
    finally:
        driver.cuGraphDestroy(graph)
