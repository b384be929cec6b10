"""Executing an engine once, as a host function on one of the simulated driver's streams.

Beside computing, it finds out whether anyone else touches its memory meanwhile: real kernels read inputs and use
scratch memory at any time until they are done, here it is at the beginning and the end that shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from standin.driver import launch_host_function, misuse, simulated

POISON = 0xFF
pause = time.sleep  # what an execution that takes time does; a test may put something else here


@dataclass(frozen=True)
class Execution:
    """What ran: for tests that ask how a batch was cut up."""

    profile: int
    batch: int
    captured: bool  # by a CUDA graph


executions: deque[Execution] = deque(maxlen=10_000)


@dataclass(frozen=True)
class Buffer:
    """A tensor in memory as it was when the execution was enqueued."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    dtype: Any

    def view(self) -> NDArray:
        size = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        return memory(self.pointer, size).view(self.dtype).reshape(self.shape)


class Fault(Exception):
    """The device cannot go on; the driver has been told."""


def memory(pointer: int, size: int) -> NDArray[np.uint8]:
    """The bytes behind a device pointer."""
    address = simulated().sim_access(pointer, size)
    if not address:
        raise Fault
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _differ(array: NDArray, bytes_: NDArray | int) -> bool:
    """Byte by byte: there may be NaN in both."""
    other = bytes_.view(np.uint8) if isinstance(bytes_, np.ndarray) else bytes_
    return bool((array.view(np.uint8) != other).any())


@dataclass
class Kernel:
    """One execution, or all replays of one that was captured."""

    context: weakref.ref  # an IExecutionContext must outlive what it enqueued and what was captured from it
    session: Any
    inputs: list[Buffer]
    outputs: list[Buffer]
    scratch: tuple[int, int]  # pointer, bytes
    profile: int
    seconds: float
    kept: bool  # captured: runs any number of times
    number: int = field(default_factory=itertools.count(1).__next__)

    def __call__(self) -> None:
        context = self.context()
        if context is None:
            misuse("execution", "its context was destroyed before it ran")
            return
        with context._busy:
            context._running += 1
            if context._running > 1:
                misuse("execution", "one context executes twice at the same time")
        started = time.perf_counter()
        executions.append(Execution(self.profile, self.inputs[0].shape[0], self.kept))
        try:
            self._execute(next(_patterns))
        finally:
            with context._busy:
                context._running -= 1
            context._seconds = time.perf_counter() - started

    def _execute(self, pattern: int) -> None:
        scratch = memory(*self.scratch)[: self.scratch[1] // 8 * 8].view(np.uint64) if self.scratch[1] else np.empty(0)
        scratch[:] = pattern
        outputs = [buffer.view() for buffer in self.outputs]
        for output in outputs:
            output.view(np.uint8)[:] = POISON
        inputs = [buffer.view() for buffer in self.inputs]
        given = {buffer.name: view.copy() for buffer, view in zip(self.inputs, inputs, strict=True)}
        if self.seconds:
            pause(self.seconds)
        results = self.session.run([buffer.name for buffer in self.outputs], given)
        changed = ["scratch memory"] if (scratch != pattern).any() else []
        changed += [b.name for b, view in zip(self.inputs, inputs, strict=True) if _differ(view, given[b.name])]
        changed += [b.name for b, view in zip(self.outputs, outputs, strict=True) if _differ(view, POISON)]
        if changed:
            misuse("execution", f"{' and '.join(changed)} changed while it ran, or lie upon each other")
            return  # the outputs stay NaN
        for output, result in zip(outputs, results, strict=True):
            output[...] = result


_patterns = itertools.count(0x5EED_0000_0000)
_kernels: dict[int, Kernel] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps garbage of other threads, which may own driver objects, from being freed in a host function."""
    global _collecting, _inside
    with _lock:
        if not _inside:
            _collecting = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _collecting:
                gc.enable()


_collecting, _inside = True, 0


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _host_function(number: int) -> None:
    with _no_collection():
        with _lock:
            kernel = _kernels[number]
            if not kernel.kept:
                del _kernels[number]
        try:
            kernel()
        except Fault:
            pass
        except BaseException:  # must not go through the driver's frames
            misuse("execution", traceback.format_exc(limit=-1))


def enqueue(kernel: Kernel, stream: int) -> bool:
    """Put it on a stream; False when the driver refuses."""
    with _lock:
        _kernels[kernel.number] = kernel
    return launch_host_function(stream, _host_function, kernel.number) == 0
