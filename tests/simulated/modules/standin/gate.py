"""Work on a simulated stream that ends when a test says so, and arrays on the device."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
from cuda.bindings import driver as cuda

from rxdeploy.runtime.cuda import DeviceArray, Gpu
from standin.driver import check

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Gate:
    """Something on a stream that is not done before `open`."""

    def __init__(self, gpu: Gpu, stream: int) -> None:
        self._open = threading.Event()
        self._callback = _CALLBACK(lambda _: self._open.wait(10))
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        with gpu.current():
            check(cuda.cuLaunchHostFunc(stream, cuda.CUhostFn(address), 0))

    def open(self) -> None:
        self._open.set()

    def is_open(self) -> bool:
        return self._open.is_set()


def on_device(gpu: Gpu, values: np.ndarray) -> DeviceArray:
    """A copy of `values` there."""
    array = gpu.empty(values.shape, values.dtype)
    array.fill(values)
    return array


def close_to(actual: np.ndarray, expected: np.ndarray) -> None:
    """Fails unless the logits are equal but for the order of sums."""
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
