"""Stand-ins for what this machine may lack: a CUDA driver, and the full TensorRT."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rxdeploy.engines.gpu import Driver, Gpu

# CUdevice_attribute numbers, from cuda.h.
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class FakeGpu:
    """What one device of the fake driver says of itself."""

    name: bytes = b"NVIDIA Test"
    compute_capability: tuple[int, int] = (9, 0)
    memory: int = 80 << 30


class FakeCuda:
    """A libcuda.so.1: C functions that write through references and return a CUresult.

    A function named in `errors` returns that status and writes nothing, as the real ones do.
    """

    def __init__(self, *gpus: FakeGpu, version: int = 13000, errors: dict[str, int] | None = None) -> None:
        self.gpus, self.version, self.errors = gpus, version, errors or {}
        self.called: list[str] = []

    def _call(self, name: str, write: Callable[[], Any]) -> int:
        self.called.append(name)
        if name != "cuDriverGetVersion" and name != "cuInit" and "cuInit" not in self.called:
            return 3  # CUDA_ERROR_NOT_INITIALIZED
        if status := self.errors.get(name, 0):
            return status
        write()
        return 0

    def _gpu(self, device: ctypes.c_int) -> FakeGpu:
        return self.gpus[device.value - 100]  # a CUdevice is a handle, not the ordinal

    def cuDriverGetVersion(self, version: Any) -> int:
        return self._call("cuDriverGetVersion", lambda: _set(version, self.version))

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._call("cuInit", lambda: None)

    def cuDeviceGetCount(self, count: Any) -> int:
        return self._call("cuDeviceGetCount", lambda: _set(count, len(self.gpus)))

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return self._call("cuDeviceGet", lambda: _set(device, 100 + ordinal))

    def cuDeviceGetName(self, name: Any, length: int, device: ctypes.c_int) -> int:
        def write() -> None:
            name.value = self._gpu(device).name[: length - 1]

        return self._call("cuDeviceGetName", write)

    def cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> int:
        return self._call("cuDeviceTotalMem_v2", lambda: _set(memory, self._gpu(device).memory))

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        index = {COMPUTE_CAPABILITY_MAJOR: 0, COMPUTE_CAPABILITY_MINOR: 1}[attribute]
        return self._call("cuDeviceGetAttribute", lambda: _set(value, self._gpu(device).compute_capability[index]))


def _set(reference: Any, value: int) -> None:
    reference._obj.value = value  # what ctypes.byref points to


@pytest.fixture
def fake_cuda() -> Callable[..., Any]:
    """Makes a driver library: fake_cuda(gpu, ..., version=..., errors={function: status})."""

    def make(*gpus: FakeGpu, **options: Any) -> FakeCuda:
        return FakeCuda(*gpus, **options)

    return make


@pytest.fixture
def fake_gpu() -> type[FakeGpu]:
    return FakeGpu


@pytest.fixture
def driver_with_gpu() -> Driver:
    return Driver((13, 0), (Gpu("NVIDIA Test", (9, 0), 80 << 30),), None)


@pytest.fixture
def driver_without() -> Driver:
    return Driver(None, (), "no NVIDIA driver (libcuda.so.1 is not installed)")
