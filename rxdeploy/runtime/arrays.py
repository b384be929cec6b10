"""What callers may hand in: arrays on the host or the device, and streams of any library.

Host: NumPy arrays, ``__array_interface__``, DLPack. Device: ``__cuda_array_interface__`` (CuPy, PyTorch, PyCUDA,
Numba), DLPack. Nothing is copied here.
"""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.errors import InputError, RxDeployError, missing_module
from rxdeploy.runtime.cuda import LEGACY_STREAM, Gpu

_ON_DEVICE = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


@dataclass(frozen=True)
class DeviceView:
    """Someone's C-contiguous array on a GPU; `owner` keeps it alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    device: int
    readonly: bool
    owner: Any


Array = NDArray | DeviceView


def part_of(array: Any, begin: int, end: int) -> Array:
    """A part of a host array, or of a `DeviceView` or `DeviceArray`, by its first axis; nothing is copied."""
    if isinstance(array, np.ndarray):
        return array[begin:end]
    row = math.prod(array.shape[1:]) * array.dtype.itemsize
    device = array.device if isinstance(array, DeviceView) else array.gpu.ordinal
    return DeviceView(array.pointer + begin * row, (end - begin, *array.shape[1:]), array.dtype, device, False, array)


def is_on_device(array: Any, name: str) -> bool:
    """Whether `array` lies on a GPU; InputError, with its library's words, when it will not say."""
    if isinstance(array, np.ndarray):
        return False
    try:
        if hasattr(array, "__dlpack_device__"):
            return array.__dlpack_device__()[0] in _ON_DEVICE
        return hasattr(array, "__cuda_array_interface__")
    except Exception as error:  # whatever the other library raises
        raise InputError(f"{name}: the {type(array).__name__} cannot be read as an array: {error}") from None


def host_array(array: Any, name: str) -> NDArray:
    """`array` as a NumPy array on the same memory; InputError for what is no array."""
    if isinstance(array, np.ndarray):
        return array
    try:
        if hasattr(array, "__array_interface__"):
            return np.asarray(array)
        if hasattr(array, "__dlpack__"):
            found = np.from_dlpack(array)
            if found.flags.writeable or not hasattr(array, "__array__"):
                return found
            # NumPy up to 2.2.0 (no longer 2.2.6) marks what comes by DLPack read-only; PyTorch has another way.
            other = np.asarray(array)
            return other if other.ctypes.data == found.ctypes.data else found
    except Exception as error:  # as above
        raise InputError(f"{name}: the {type(array).__name__} cannot be read as an array: {error}") from None
    raise InputError(
        f"{name}: got a {type(array).__name__}, expected an array: NumPy's, or one with DLPack, __array_interface__ or "
        "__cuda_array_interface__"
    )


def device_view(array: Any, name: str, stream: int, gpu: Gpu) -> DeviceView:
    """A device array's memory, ready on `stream`: work its producer still has to do there is waited for.

    InputError when it is not C-contiguous or cannot be read. The GPU's context must be current.
    """
    try:
        # DLPack first: PyTorch's other interface does not tell on which stream the tensor is being made.
        view = _dlpack_view(array, stream) if hasattr(array, "__dlpack__") else _interface_view(array, stream, gpu)
    except RxDeployError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{name}: the {type(array).__name__} cannot be read as a device array: {error}") from None
    if view is None:
        raise InputError(f"{name}: the device array is not C-contiguous; make it so first (.contiguous(), .copy())")
    return view


def _dlpack_view(array: Any, stream: int) -> DeviceView | None:
    try:
        from cuda.core.utils import StridedMemoryView
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    view = StridedMemoryView.from_dlpack(array, stream_ptr=stream)
    shape, dtype = tuple(view.shape), np.dtype(view.dtype)
    if view.strides is not None and not _contiguous(shape, view.strides):
        return None
    return DeviceView(int(view.ptr), shape, dtype, view.device_id, bool(view.readonly), view)


def _interface_view(array: Any, stream: int, gpu: Gpu) -> DeviceView | None:
    """By the CUDA array interface, https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""
    facts = array.__cuda_array_interface__
    if facts.get("mask") is not None:
        raise ValueError("it is masked")
    shape, dtype = tuple(map(int, facts["shape"])), np.dtype(facts["typestr"])
    pointer, readonly = facts["data"]
    strides = facts.get("strides")  # in bytes
    if strides is not None and not _contiguous(shape, tuple(stride / dtype.itemsize for stride in strides)):
        return None
    producer = facts.get("stream")
    if producer is not None and producer != stream:
        gpu.order(before=producer, after=stream)
    return DeviceView(pointer, shape, dtype, gpu.device_of(pointer) if pointer else gpu.ordinal, readonly, array)


def _contiguous(shape: tuple[int, ...], strides: tuple[float, ...]) -> bool:
    """Whether `strides`, in elements, are those of C order."""
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def stream_handle(stream: Any) -> int:
    """The number of a CUDA stream given as an integer or as an object of cuda-python, PyTorch, CuPy or PyCUDA."""
    try:
        handle = _handle(stream)
    except (TypeError, ValueError, IndexError, AttributeError):
        raise InputError(
            f"stream: got a {type(stream).__name__}, expected a stream's integer handle, or a stream of PyTorch, CuPy, "
            "PyCUDA or cuda-python"
        ) from None
    if not 0 <= handle < 1 << 64:
        raise InputError(f"stream: {handle} is no stream's handle")
    return handle or LEGACY_STREAM


def _handle(stream: Any) -> int:
    if isinstance(stream, bool):
        raise TypeError
    if hasattr(stream, "__index__"):
        return operator.index(stream)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__  # a method by the protocol; some versions have a property
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, PyCUDA and Numba
        if (found := getattr(stream, attribute, None)) is not None:
            return int(getattr(found, "value", found) or 0)
    if isinstance(stream, str | bytes | numbers.Number | np.ndarray):
        raise TypeError  # int() would take it
    return int(stream)  # cuda.bindings' CUstream
