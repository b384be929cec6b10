"""What callers hand in, where no driver is needed to judge it: streams of every library, arrays, contiguity."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.runtime.arrays import _contiguous, device_view, host_array, is_on_device, stream_handle

HANDLE = 0x7F00_1234_5678


class WithMethod:
    """As the protocol has it: cuda.core, newer CuPy and PyTorch."""

    def __init__(self, handle: int) -> None:
        self.handle_ = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle_


class WithProperty(WithMethod):
    """As cuda.core 0.1 had it."""

    @property
    def __cuda_stream__(self) -> tuple[int, int]:  # type: ignore[override]
        return 0, self.handle_


class Convertible:
    """As cuda.bindings' CUstream."""

    def __int__(self) -> int:
        return HANDLE


@pytest.mark.parametrize(
    "stream",
    [
        HANDLE,
        np.int64(HANDLE),
        WithMethod(HANDLE),
        WithProperty(HANDLE),
        SimpleNamespace(cuda_stream=HANDLE),  # PyTorch
        SimpleNamespace(ptr=HANDLE),  # CuPy
        SimpleNamespace(handle=HANDLE),  # PyCUDA
        SimpleNamespace(handle=ctypes.c_void_p(HANDLE)),  # Numba
        Convertible(),
    ],
    ids=["int", "int64", "method", "property", "torch", "cupy", "pycuda", "numba", "convertible"],
)
def test_the_handle_of_any_librarys_stream(stream: Any) -> None:
    assert stream_handle(stream) == HANDLE
    assert type(stream_handle(stream)) is int


def test_the_handles_of_cuda_python() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert stream_handle(driver.CUstream(HANDLE)) == HANDLE
    assert stream_handle(pytest.importorskip("cuda.bindings.runtime").cudaStream_t(HANDLE)) == HANDLE


@pytest.mark.parametrize(
    "stream",
    [
        0,
        WithMethod(0),
        SimpleNamespace(cuda_stream=0),
        SimpleNamespace(ptr=0),
        SimpleNamespace(handle=0),
        SimpleNamespace(handle=ctypes.c_void_p(0)),
    ],
)
def test_the_default_stream_goes_by_its_other_number(stream: Any) -> None:
    """0 is not allowed in DLPack and in the CUDA array interface; 1, CU_STREAM_LEGACY, is the same stream."""
    assert stream_handle(stream) == 1


def test_the_threads_own_default_stream_stays_what_it_is() -> None:
    assert stream_handle(2) == 2


@pytest.mark.parametrize("stream", [-1, SimpleNamespace(ptr=-5), object(), [], "stream", np.zeros(3)])
def test_what_is_no_stream(stream: Any) -> None:
    with pytest.raises(InputError, match="stream"):
        stream_handle(stream)


class Dismantled:
    """A stream that was closed, and lost what it had."""

    def __cuda_stream__(self) -> tuple[int, int]:
        raise AttributeError("_handle")


@pytest.mark.parametrize(
    "stream",
    [
        True,
        False,
        "7",
        b"7",
        2.5,
        np.float64(7),
        np.float32(7),
        SimpleNamespace(handle="abc"),
        SimpleNamespace(handle=lambda: 5),
        SimpleNamespace(__cuda_stream__=lambda: None),
        SimpleNamespace(__cuda_stream__=lambda: (0,)),
        Dismantled(),
    ],
    ids=[
        *("True", "False", "text", "bytes", "float", "float64", "float32", "handle is text", "handle is a method"),
        *("no protocol", "half of the protocol", "closed"),
    ],
)
def test_what_is_no_stream_though_int_would_take_it(stream: Any) -> None:
    with pytest.raises(InputError, match="stream"):
        stream_handle(stream)


class Dlpack:
    """Says where it lies, and no more."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("nobody asks")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros(3), False),
        ([1, 2], False),
        (None, False),
        (Dlpack(1), False),  # kDLCPU
        (Dlpack(3), False),  # kDLCUDAHost: pinned
        (Dlpack(2), True),  # kDLCUDA
        (Dlpack(13), True),  # kDLCUDAManaged
        (Dlpack(10), False),  # kDLROCM
        (SimpleNamespace(__cuda_array_interface__={}), True),
        (SimpleNamespace(__array_interface__={}), False),
    ],
)
def test_where_an_array_lies(array: Any, expected: bool) -> None:
    assert is_on_device(array, "images") is expected


class NeedsGradient:
    """A tensor of PyTorch on the GPU that needs its gradient: PyTorch raises RuntimeError there, not AttributeError."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad. Use var.detach()")


def test_an_array_that_will_not_say_where_it_lies() -> None:
    with contextlib.suppress(InputError):  # with its words
        assert is_on_device(NeedsGradient(), "images")


class Exports:
    """An array by its __array_interface__ alone."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


class ExportsDlpack:
    """An array by DLPack alone."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [lambda array: array, Exports, ExportsDlpack])
@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[::2], lambda a: a.transpose(2, 0, 1)])
def test_host_arrays_are_read_where_they_lie(wrap: Any, view: Any) -> None:
    array = view(np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    found = host_array(wrap(array), "images")
    np.testing.assert_array_equal(found, array)
    assert found.ctypes.data == array.ctypes.data


class BothWays(Exports):
    """By both; NumPy reads DLPack of before 1.0 as read-only, which an `out` must not be."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("nobody asks")


def test_numpys_interface_is_preferred() -> None:
    array = np.arange(3)
    found = host_array(BothWays(array), "out")
    assert found.ctypes.data == array.ctypes.data and found.flags.writeable


def test_tensors_of_pytorch_are_read_where_they_lie() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    found = host_array(tensor, "images")
    assert found.ctypes.data == tensor.data_ptr() and found.dtype == np.uint8
    assert found.flags.writeable  # it may be an `out`
    with pytest.raises(InputError, match="images: the Tensor cannot be read as an array"):
        host_array(torch.zeros(3, requires_grad=True), "images")


@pytest.mark.parametrize("thing", [[1, 2], None, 5, "text", object()])
def test_what_is_no_array(thing: Any) -> None:
    with pytest.raises(InputError, match=f"out: got a {type(thing).__name__}, expected an array"):
        host_array(thing, "out")


class Broken:
    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (3,), "typestr": "nonsense", "data": (0, False), "version": 3}


def test_a_broken_array_says_so() -> None:
    with pytest.raises(InputError, match="images: the Broken cannot be read as an array: "):
        host_array(Broken(), "images")


def test_contiguous_is_what_numpy_says() -> None:
    shapes = [(), (0,), (1,), (4,), (2, 3), (1, 3), (3, 1), (2, 0, 3), (2, 3, 4), (1, 1, 1), (2, 1, 4), (1, 4, 1, 3)]
    seen = set()
    for shape in shapes:
        array = np.zeros(shape, np.int16)
        for axes in itertools.permutations(range(len(shape))):
            for step in (1, 2, -1):
                view = array.transpose(axes)[..., ::step] if shape else array
                strides = tuple(stride // 2 for stride in view.strides)
                assert _contiguous(view.shape, strides) == view.flags.c_contiguous, (view.shape, strides)
                seen.add(view.flags.c_contiguous)
    assert seen == {True, False}
    assert not _contiguous((2, 3), (0, 0))  # broadcast


def test_without_cuda_core_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("cuda.core", "cuda.core.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentLacks, match=r"cuda.* is not installed here; pip install cuda-bindings cuda-core"):
        device_view(Dlpack(2), "images", 1, None)
