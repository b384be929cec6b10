"""Which NVIDIA driver and GPUs are here, asked of the driver library itself: no CUDA toolkit, no package.

It must be asked before TensorRT is touched: creating TensorRT's Runtime without a driver crashes the process.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

# From cuda.h: CUdevice_attribute.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    compute_capability: tuple[int, int]
    memory: int  # bytes


@dataclass(frozen=True)
class Driver:
    """The CUDA driver; `gpus` is empty and `problem` says why when it cannot be used."""

    cuda_version: tuple[int, int] | None  # the newest CUDA it supports
    gpus: tuple[Gpu, ...]
    problem: str | None


@functools.cache
def find_driver() -> Driver:
    """Ask libcuda for its version and devices. Never raises: a machine without a driver is a normal case."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver(None, (), "no NVIDIA driver (libcuda.so.1 is not installed)")
    return query(cuda)


def query(cuda: ctypes.CDLL) -> Driver:
    """Version and devices from a loaded driver library."""
    number = ctypes.c_int()
    version = None
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        version = (number.value // 1000, number.value % 1000 // 10)
    if status := cuda.cuInit(0):
        return Driver(version, (), f"the NVIDIA driver does not start (cuInit gives error {status})")
    try:
        _check(cuda.cuDeviceGetCount(ctypes.byref(number)))
        gpus = tuple(_query_gpu(cuda, ordinal) for ordinal in range(number.value))
    except RuntimeError as error:
        return Driver(version, (), f"the NVIDIA driver does not tell of its GPUs ({error})")
    return Driver(version, gpus, None if gpus else "the NVIDIA driver finds no GPU")


def _query_gpu(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _check(cuda.cuDeviceGet(ctypes.byref(device), ordinal))
    _check(cuda.cuDeviceGetName(name, len(name), device))
    _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    _check(cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device))
    _check(cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device))
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), memory.value)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"error {status}")
