"""Arrays on the GPU and streams of others, in every combination, and what is refused before anything is enqueued."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cuda
from standin.driver import check
from standin.gate import close_to, on_device

import rxdeploy
from rxdeploy.errors import InputError
from rxdeploy.runtime.arrays import device_view
from rxdeploy.runtime.cuda import LEGACY_STREAM, DeviceArray, Gpu, capture
from rxdeploy.runtime.lanes import Lane

pytestmark = pytest.mark.usefixtures("steady_garbage")
SIZE, CLASSES, LARGEST = 48, 7, 8
SHAPE = (SIZE, SIZE, 3)
Bundles = Callable[..., Path]
Counters = Callable[[str], int]
Reference = Callable[[np.ndarray], np.ndarray]
WORK = ("copies", "host_funcs", "graph_launches", "allocations", "live_device_bytes", "live_events", "live_streams")


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


class Guest:
    """Someone else's array: the CUDA array interface, and nothing more of ours."""

    def __init__(self, array: DeviceArray, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.pointer, False),
            "version": 3,
            **changes,
        }


@pytest.fixture
def bundle(bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch) -> Path:
    """None of its batches is padded, whatever else this machine is doing while they are measured."""
    real = Lane.time

    def time(lane: Lane, profile: int, size: int) -> float:
        real(lane, profile, size)
        return float(size)

    monkeypatch.setattr(Lane, "time", time)
    return bundle_with_plan(profiles=((1, 4, LARGEST),), us_per_image=100)


@pytest.fixture
def expected(bundle: Path, run_onnx: Callable) -> Reference:
    """What ONNX Runtime on the CPU says."""
    model = (bundle / "model.onnx").read_bytes()
    return lambda batch: run_onnx(model, batch)


@pytest.fixture
def session(bundle: Path) -> Iterator[rxdeploy.Session]:
    with rxdeploy.load(bundle, "tensorrt") as opened:
        yield opened


# In and out


@pytest.mark.parametrize("count", [1, 3, 4, 8])
@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_device_arrays_in_and_out(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, streamed: bool, count: int
) -> None:
    """Several times, at the same addresses and at others, with other contents each time."""
    dawdle(200)
    gpu, stream = session.gpu, session.gpu.stream() if streamed else None
    inputs = [gpu.empty((count, *SHAPE), np.uint8) for _ in range(2)]
    outputs = [gpu.empty((count, CLASSES), np.float32) for _ in range(2)]
    for seed in range(8):
        batch, array, out = images(count, seed), inputs[seed % 2], outputs[seed // 2 % 2]
        array.fill(batch)
        out.fill(np.full(out.shape, np.nan, np.float32))
        assert session.run(array, out=out, stream=stream) is out
        if stream:
            stream.synchronize()
        close_to(out.numpy(), expected(batch))


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_device_arrays_in_give_device_arrays(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, streamed: bool
) -> None:
    dawdle(200)
    stream = session.gpu.stream() if streamed else None
    results = []
    for seed in range(4):
        batch = images(3, seed)
        results.append((session.run(on_device(session.gpu, batch), stream=stream), batch))
    for result, batch in results:
        assert isinstance(result, DeviceArray)
        assert (result.shape, result.dtype) == ((3, CLASSES), np.float32)
        assert result.stream == (stream.handle if stream else None)
        close_to(result.numpy(), expected(batch))  # waits for the stream


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
@pytest.mark.parametrize("count", [3, 8, 17])
def test_device_in_and_host_out(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, streamed: bool, count: int
) -> None:
    """Complete on return, also with a stream."""
    dawdle(200)
    stream = session.gpu.stream() if streamed else None
    array = session.gpu.empty((count, *SHAPE), np.uint8)
    for seed in range(4):
        array.fill(images(count, seed))
        out = np.full((count, CLASSES), np.nan, np.float32)
        assert session.run(array, out=out, stream=stream) is out
        close_to(out, expected(images(count, seed)))


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_host_in_and_device_out(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, streamed: bool
) -> None:
    """The caller may overwrite the images at once."""
    dawdle(1000)
    stream = session.gpu.stream() if streamed else None
    outs = [session.gpu.empty((3, CLASSES), np.float32) for _ in range(5)]
    batch = np.empty((3, *SHAPE), np.uint8)
    for _ in range(3):  # the third time from a graph
        for seed, out in enumerate(outs):
            batch[:] = images(3, seed)
            assert session.run(batch, out=out, stream=stream) is out
            batch[:] = 0
        if stream:
            stream.synchronize()
        for seed, out in enumerate(outs):
            close_to(out.numpy(), expected(images(3, seed)))


def test_host_in_and_out_on_a_stream_is_complete_on_return(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable
) -> None:
    dawdle(500)
    stream = session.gpu.stream()
    for count in (3, 3, 3, 8, 11):
        out = np.empty((count, CLASSES), np.float32)
        assert session.run(images(count), out=out, stream=stream) is out
        close_to(out, expected(images(count)))
        close_to(session.run(images(count), stream=stream), expected(images(count)))


def test_host_outs_of_any_layout(session: rxdeploy.Session, expected: Reference) -> None:
    torch = pytest.importorskip("torch")
    for count in (3, 11):
        wide = np.full((CLASSES, 2 * count), np.nan, np.float32)
        session.run(images(count), out=wide[:, ::2].T)
        close_to(wide[:, ::2].T, expected(images(count)))
        assert np.isnan(wide[:, 1::2]).all()
        tensor = torch.empty(count, CLASSES)
        assert session.run(images(count), out=tensor) is tensor
        close_to(tensor.numpy(), expected(images(count)))


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
@pytest.mark.parametrize("count", [16, 20])
def test_large_device_batches_are_split(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, streamed: bool, count: int
) -> None:
    dawdle(200)
    stream = session.gpu.stream() if streamed else None
    array, out = on_device(session.gpu, images(count)), session.gpu.empty((count, CLASSES), np.float32)
    for _ in range(3):
        session.run(array, out=out, stream=stream)
        close_to((session.gpu.synchronize(stream.handle if stream else 1), out.numpy())[1], expected(images(count)))


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_large_host_batches_are_split_into_a_device_array(
    bundle_with_plan: Bundles, run_onnx: Callable, dawdle: Callable, streamed: bool
) -> None:
    """64 classes: the parts of the output begin at multiples of 256 bytes."""
    dawdle(300)
    bundle = bundle_with_plan(profiles=((1, 4, LARGEST),), card={"num_classes": 64})
    expected = run_onnx((bundle / "model.onnx").read_bytes(), images(21))
    with rxdeploy.load(bundle) as session:
        stream = session.gpu.stream() if streamed else None
        for _ in range(3):
            out = session.run(images(21), out=session.gpu.empty((21, 64), np.float32), stream=stream)
            if stream:
                stream.synchronize()
            close_to(out.numpy(), expected)


def test_a_size_met_first_inside_a_split_batch_on_a_stream(
    bundle_with_plan: Bundles, run_onnx: Callable, dawdle: Callable
) -> None:
    """Choosing how to compute the last part runs things while the first part is being computed on the stream."""
    dawdle(500)
    bundle = bundle_with_plan(profiles=((1, 4, LARGEST),), card={"num_classes": 64}, us_per_batch=3000)
    model = (bundle / "model.onnx").read_bytes()
    with rxdeploy.load(bundle) as session:
        stream = session.gpu.stream()
        for count in (11, 10, 19):
            array, out = on_device(session.gpu, images(count)), session.gpu.empty((count, 64), np.float32)
            session.run(array, out=out, stream=stream)
            stream.synchronize()
            close_to(out.numpy(), run_onnx(model, images(count)))


@pytest.mark.parametrize("which", ["in", "out"])
def test_arrays_at_any_address(session: rxdeploy.Session, expected: Reference, which: str) -> None:
    """A slice of a larger tensor begins anywhere; TensorRT wants multiples of 256."""
    gpu = session.gpu
    room = on_device(gpu, np.zeros(4 * SIZE * SIZE * 3 + 1000, np.uint8))
    shifted = room.pointer + 64
    if which == "in":
        batch = images(4)
        with gpu.current():
            check(cuda.cuMemcpyHtoD(shifted, batch.ctypes.data, batch.nbytes))
        array = Guest(room, shape=(4, *SHAPE), data=(shifted, False))
        for _ in range(3):
            close_to(session.run(array).numpy(), expected(images(4)))
    else:
        out = Guest(room, shape=(4, CLASSES), typestr="<f4", data=(shifted, False))
        for _ in range(3):
            session.run(images(4), out=out)
            found = np.empty((4, CLASSES), np.float32)
            with gpu.current():
                check(cuda.cuMemcpyDtoH(found.ctypes.data, shifted, found.nbytes))
            close_to(found, expected(images(4)))


# Guests


@pytest.mark.parametrize("changes", [{}, {"stream": None}, {"stream": 1}, {"stream": 2}, {"strides": None}])
@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_arrays_of_other_libraries(
    session: rxdeploy.Session, expected: Reference, changes: dict[str, Any], streamed: bool
) -> None:
    stream = session.gpu.stream() if streamed else None
    array, out = on_device(session.gpu, images(4)), session.gpu.empty((4, CLASSES), np.float32)
    for _ in range(3):
        session.run(Guest(array, **changes), out=Guest(out, **changes), stream=stream)
        if stream:
            stream.synchronize()
        close_to(out.numpy(), expected(images(4)))


def test_strides_that_say_the_same_are_taken(session: rxdeploy.Session, expected: Reference) -> None:
    array = on_device(session.gpu, images(1))
    guest = Guest(array, strides=(123, SIZE * 3, 3, 1))  # of one image, its stride does not matter
    close_to(session.run(guest).numpy(), expected(images(1)))
    out = session.gpu.empty((1, CLASSES), np.float32)
    session.run(array, out=Guest(out, strides=(4 * CLASSES, 4)))
    close_to(out.numpy(), expected(images(1)))


def test_version_2_of_the_interface(session: rxdeploy.Session, expected: Reference) -> None:
    """PyTorch has it; cuda.core has a way of its own for torch.Tensor since 1.0 only."""
    guest = Guest(on_device(session.gpu, images(4)), version=2, strides=None)
    close_to(session.run(guest).numpy(), expected(images(4)))


@pytest.mark.parametrize("which", [LEGACY_STREAM, 2, None], ids=["default stream", "thread's default", "own"])
@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_the_producers_stream_is_waited_for(
    session: rxdeploy.Session, expected: Reference, gate: Callable, streamed: bool, which: int | None
) -> None:
    """The array is filled by work that its producer has only enqueued."""
    gpu = session.gpu
    own, stream = gpu.stream(), gpu.stream() if streamed else None
    producer = which or own.handle
    source, array = on_device(gpu, images(4)), on_device(gpu, images(4, seed=9))
    session.prepare([4])
    shut = gate(gpu, producer)
    with gpu.current():
        gpu.copy(array.pointer, source.pointer, array.nbytes, producer)
    threading.Timer(0.05, shut.open).start()
    result = session.run(Guest(array, stream=producer), stream=stream)
    close_to(result.numpy(), expected(images(4)))


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
def test_what_is_still_being_read_of_an_out_is_waited_for(
    session: rxdeploy.Session, expected: Reference, gate: Callable, streamed: bool
) -> None:
    """The consumer of the results before these has not read them yet."""
    gpu = session.gpu
    consumer, stream = gpu.stream(), gpu.stream() if streamed else None
    out, copy = on_device(gpu, np.full((4, CLASSES), 5, np.float32)), gpu.empty((4, CLASSES), np.float32)
    array = on_device(gpu, images(4))
    session.prepare([4])
    shut = gate(gpu, consumer.handle)
    with gpu.current():
        gpu.copy(copy.pointer, out.pointer, out.nbytes, consumer.handle)
    threading.Timer(0.05, shut.open).start()
    session.run(array, out=Guest(out, stream=consumer.handle), stream=stream)
    if stream:
        stream.synchronize()
    close_to(out.numpy(), expected(images(4)))
    assert (copy.numpy() == 5).all()


def test_a_view_keeps_what_it_shows(session: rxdeploy.Session) -> None:
    guest = Guest(on_device(session.gpu, images(1)))
    gone = weakref.ref(guest)
    with session.gpu.current():
        view = device_view(guest, "images", LEGACY_STREAM, session.gpu)
    del guest
    assert gone() is not None
    del view
    assert gone() is None


def test_a_result_is_an_input_again(bundle_with_plan: Bundles, session: rxdeploy.Session, dawdle: Callable) -> None:
    """On another stream, which has to wait for the one that fills it."""
    dawdle(2000)
    first, second = session.gpu.stream(), session.gpu.stream()
    result = session.run(on_device(session.gpu, images(4)), stream=first)
    copy = session.gpu.empty(result.shape, np.float32)
    with session.gpu.current():
        view = device_view(result, "images", second.handle, session.gpu)
        session.gpu.copy(copy.pointer, view.pointer, copy.nbytes, second.handle)
    second.synchronize()
    np.testing.assert_array_equal(copy.numpy(), result.numpy())


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class DlpackGuest:
    """Someone else's array by DLPack alone, as dlpack.h lays it out; `asked` has the streams it was asked to serve.

    `readonly` is told by DLPack 1.0, without it this is an older one. `deleter` is called when the last who took it
    is done with it.
    """

    def __init__(
        self,
        array: DeviceArray,
        kind: int = 2,
        strides: tuple[int, ...] | None = None,
        readonly: bool | None = None,
        deleter: Callable[[], None] = lambda: None,
    ) -> None:
        self.array, self.kind, self.asked = array, kind, []
        number, code = array.gpu.ordinal, {"u": 1, "f": 2, "i": 0}[array.dtype.kind]
        dimensions = ctypes.c_int64 * len(array.shape)
        self.shape, self.strides = dimensions(*array.shape), strides and dimensions(*strides)
        tensor = _Tensor(
            array.pointer,
            _Device(kind, number),
            len(array.shape),
            _Type(code, 8 * array.dtype.itemsize, 1),
            self.shape,
            self.strides,
            0,
        )
        self.deleter = _Deleter(lambda _: deleter())
        self.managed: _Managed | _Versioned
        if readonly is None:
            self.name, self.managed = b"dltensor", _Managed(tensor, None, self.deleter)
        else:
            version = (ctypes.c_uint32 * 2)(1, 0)
            self.name, self.managed = b"dltensor_versioned", _Versioned(version, None, self.deleter, readonly, tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.array.gpu.ordinal

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        self.asked.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), self.name, None)


@pytest.mark.parametrize("kind", [2, 13], ids=["kDLCUDA", "kDLCUDAManaged"])
def test_dlpack_on_the_device(session: rxdeploy.Session, expected: Reference, kind: int) -> None:
    array, out = on_device(session.gpu, images(4)), session.gpu.empty((4, CLASSES), np.float32)
    stream = session.gpu.stream()
    for given, asked in ((None, LEGACY_STREAM), (stream, stream.handle), (0, LEGACY_STREAM)):
        guest, target = DlpackGuest(array, kind), DlpackGuest(out, kind)
        session.run(guest, out=target, stream=given)
        session.gpu.synchronize(asked)
        assert guest.asked == target.asked == [asked]
        close_to(out.numpy(), expected(images(4)))


def test_dlpack_of_version_1(session: rxdeploy.Session, expected: Reference) -> None:
    array, out = on_device(session.gpu, images(4)), session.gpu.empty((4, CLASSES), np.float32)
    session.run(DlpackGuest(array, readonly=True), out=DlpackGuest(out, readonly=False))
    close_to(out.numpy(), expected(images(4)))


def test_what_came_by_dlpack_is_held_until_the_work_is_done(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, executions: Any
) -> None:
    """The deleter is how its library learns that the memory may be used for something else."""
    dawdle(500)
    done: list[int] = []
    array = on_device(session.gpu, images(4))
    session.prepare([4])
    executions.clear()
    guest = DlpackGuest(array, deleter=lambda: done.append(len(executions)))
    close_to(session.run(guest).numpy(), expected(images(4)))
    assert done == [1]


class BothWays(DlpackGuest):
    """As PyTorch's tensors: both interfaces, of which the other does not tell the stream (and may raise)."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise AssertionError("nobody asks")


def test_dlpack_is_preferred(session: rxdeploy.Session, expected: Reference) -> None:
    array, stream = BothWays(on_device(session.gpu, images(4))), session.gpu.stream()
    close_to(session.run(array, stream=stream).numpy(), expected(images(4)))
    assert array.asked == [stream.handle]


def test_dlpack_that_is_not_contiguous(session: rxdeploy.Session) -> None:
    guest = DlpackGuest(on_device(session.gpu, images(4)), strides=(SIZE * SIZE * 3, 3, SIZE * 3, 1))
    with pytest.raises(InputError, match="images: the device array is not C-contiguous"):
        session.run(guest)


def test_an_array_is_kept_while_it_is_used(session: rxdeploy.Session, expected: Reference, dawdle: Callable) -> None:
    """A call without a stream holds on to what it was given until it is done with it."""
    dawdle(1000)
    for seed in range(3):
        close_to(session.run(Guest(on_device(session.gpu, images(2, seed)))).numpy(), expected(images(2, seed)))


# Streams


def streams(stream: Any) -> dict[str, Any]:
    handle = stream.handle
    return {
        "ours": stream,
        "int": handle,
        "CUstream": cuda.CUstream(handle),
        "__cuda_stream__": SimpleNamespace(__cuda_stream__=lambda: (0, handle)),
        "torch": SimpleNamespace(cuda_stream=handle),
        "cupy": SimpleNamespace(ptr=handle),
        "pycuda": SimpleNamespace(handle=handle),
        "numba": SimpleNamespace(handle=ctypes.c_void_p(handle)),
    }


def test_streams_of_every_library(session: rxdeploy.Session, expected: Reference, gate: Callable) -> None:
    """The work is on that very stream: it is not done before what was there before."""
    stream, array = session.gpu.stream(), on_device(session.gpu, images(4))
    session.prepare([4])
    for name, given in streams(stream).items():
        out = on_device(session.gpu, np.full((4, CLASSES), 5, np.float32))
        shut = gate(session.gpu, stream.handle)
        session.run(array, out=out, stream=given)
        assert (out.numpy() == 5).all(), name
        shut.open()
        stream.synchronize()
        close_to(out.numpy(), expected(images(4)))


def test_a_stream_of_cuda_core(session: rxdeploy.Session, expected: Reference) -> None:
    from cuda.core import Device

    with session.gpu.current():
        device = Device(0)
        device.set_current()
        stream = device.create_stream()
        result = session.run(on_device(session.gpu, images(3)), stream=stream)
        stream.sync()
        close_to(result.numpy(), expected(images(3)))
        stream.close()


def test_a_result_outlives_the_callers_stream(session: rxdeploy.Session, expected: Reference) -> None:
    result = session.run(on_device(session.gpu, images(3)), stream=session.gpu.stream())
    close_to(result.numpy(), expected(images(3)))


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_default_streams(session: rxdeploy.Session, expected: Reference, dawdle: Callable, stream: int) -> None:
    dawdle(300)
    array, out = on_device(session.gpu, images(3)), session.gpu.empty((3, CLASSES), np.float32)
    for seed in range(4):
        array.fill(images(3, seed))
        session.run(array, out=out, stream=stream)
        session.gpu.synchronize(stream)
        close_to(out.numpy(), expected(images(3, seed)))


def test_without_a_stream_the_default_streams_order_holds(
    session: rxdeploy.Session, expected: Reference, gate: Callable
) -> None:
    """As PyTorch, CuPy and PyCUDA work where nobody speaks of streams."""
    gpu = session.gpu
    source, array = on_device(gpu, images(4)), on_device(gpu, images(4, seed=9))
    session.prepare([4])
    shut = gate(gpu, LEGACY_STREAM)
    with gpu.current():
        gpu.copy(array.pointer, source.pointer, array.nbytes, LEGACY_STREAM)
    threading.Timer(0.05, shut.open).start()
    close_to(session.run(Guest(array)).numpy(), expected(images(4)))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_run_is_in_the_streams_order_and_returns_at_once(
    session: rxdeploy.Session, expected: Reference, gate: Callable, times: int
) -> None:
    """A copy to the input before it, a copy of the output after it, and nothing of that is done on return."""
    gpu, stream = session.gpu, session.gpu.stream()
    array, out = gpu.empty((4, *SHAPE), np.uint8), gpu.empty((4, CLASSES), np.float32)
    here, there = gpu.pinned(array.nbytes), gpu.pinned(out.nbytes)
    session.prepare([4])
    for _ in range(times - 1):  # the third time is from a graph
        session.run(array, out=out, stream=stream)
    stream.synchronize()
    here.array[:] = images(4, seed=times).ravel()
    there.array[:] = 0
    shut = gate(gpu, stream.handle)
    with gpu.current():
        gpu.copy(array.pointer, here.pointer, array.nbytes, stream.handle)
    session.run(array, out=out, stream=stream)
    with gpu.current():
        gpu.copy(there.pointer, out.pointer, out.nbytes, stream.handle)
    assert not there.array.any()
    shut.open()
    stream.synchronize()
    close_to(there.array.view(np.float32).reshape(4, CLASSES), expected(images(4, seed=times)))


def test_calls_on_many_streams_share_a_lane_without_harm(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable
) -> None:
    """Enqueued one after the other by one thread; sizes that are padded use the lane's own memory."""
    dawdle(500)
    gpu, rng = session.gpu, np.random.default_rng(3)
    session.prepare(range(1, 9))
    for _ in range(6):
        calls = []
        for stream in [gpu.stream() for _ in range(4)]:
            batch = images(int(rng.integers(1, 9)), int(rng.integers(100)))
            array, out = on_device(gpu, batch), gpu.empty((len(batch), CLASSES), np.float32)
            kind = rng.integers(4)
            if kind == 0:
                session.run(array, out=out, stream=stream)
            elif kind == 1:
                session.run(batch, out=out, stream=stream)
            elif kind == 2:
                out = session.run(array, stream=stream)
            else:
                close_to(session.run(batch), expected(batch))
                session.run(array, out=out, stream=stream)
            calls.append((stream, array, out, batch))
        for stream, _, out, batch in reversed(calls):
            stream.synchronize()
            close_to(out.numpy(), expected(batch))


def test_a_padded_call_waits_for_another_streams(
    bundle_with_plan: Bundles, run_onnx: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both go through the lane's own input and output, and the first one cannot go on yet."""
    monkeypatch.setattr(Lane, "busy", lambda *_: False)  # or the other lane would be taken
    bundle = bundle_with_plan(profiles=((4, 4, 4),))
    model = (bundle / "model.onnx").read_bytes()
    with rxdeploy.load(bundle) as session:
        gpu, first, second = session.gpu, session.gpu.stream(), session.gpu.stream()
        session.prepare([3])
        arrays = [on_device(gpu, images(3, seed)) for seed in range(3)]
        outs = [gpu.empty((3, CLASSES), np.float32) for _ in range(3)]
        for _ in range(3):
            shut = gate(gpu, first.handle)
            session.run(arrays[0], out=outs[0], stream=first)
            session.run(arrays[1], out=outs[1], stream=second)
            with gpu.current():
                assert int(cuda.cuStreamQuery(second.handle)[0]) == 600  # CUDA_ERROR_NOT_READY
            threading.Timer(0.02, shut.open).start()
            session.run(arrays[2], out=outs[2])  # on the lane's own stream
            second.synchronize()
            for seed, out in enumerate(outs):
                close_to(out.numpy(), run_onnx(model, images(3, seed)))


@pytest.mark.parametrize("way", ["run", "run into the device", "map"])
def test_a_host_call_waits_for_a_stream_that_uses_the_lane(
    bundle_with_plan: Bundles, run_onnx: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(Lane, "busy", lambda *_: False)  # or the other lane would be taken
    bundle = bundle_with_plan(profiles=((4, 4, 4),), us_per_batch=5000)
    model = (bundle / "model.onnx").read_bytes()
    with rxdeploy.load(bundle) as session:
        gpu, stream = session.gpu, session.gpu.stream()
        array, out, other = on_device(gpu, images(3, 1)), *(gpu.empty((3, CLASSES), np.float32) for _ in range(2))
        session.prepare([3])
        for _ in range(3):
            shut = gate(gpu, stream.handle)
            session.run(array, out=out, stream=stream)
            threading.Timer(0.02, shut.open).start()
            if way == "run":
                close_to(session.run(images(3, 2)), run_onnx(model, images(3, 2)))
            elif way == "map":
                close_to(next(session.map([images(3, 2)])), run_onnx(model, images(3, 2)))
            else:
                close_to(session.run(images(3, 2), out=other).numpy(), run_onnx(model, images(3, 2)))
            stream.synchronize()
            close_to(out.numpy(), run_onnx(model, images(3, 1)))


def test_host_images_are_complete_on_return_also_on_a_stream(
    session: rxdeploy.Session, expected: Reference, gate: Callable
) -> None:
    gpu, stream = session.gpu, session.gpu.stream()
    session.prepare([3])
    for which in (stream.handle, 0, 2):
        out = on_device(gpu, np.full((3, CLASSES), np.nan, np.float32))
        shut = gate(gpu, which or LEGACY_STREAM)
        threading.Timer(0.02, shut.open).start()
        session.run(images(3), out=out, stream=which)
        assert shut.is_open()
        close_to(out.numpy(), expected(images(3)))


@pytest.mark.parametrize("which", [None, 1, 2])
def test_close_waits_for_streams_of_others(
    bundle: Path, expected: Reference, gate: Callable, which: int | None
) -> None:
    session = rxdeploy.load(bundle)
    gpu, own = session.gpu, session.gpu.stream()
    stream = which or own.handle
    array, out = on_device(gpu, images(3)), gpu.empty((3, CLASSES), np.float32)
    for _ in range(3):
        session.run(array, out=out, stream=stream)
    gpu.synchronize(stream)
    out.fill(np.full((3, CLASSES), np.nan, np.float32))
    shut = gate(gpu, stream)
    session.run(array, out=out, stream=stream)
    threading.Timer(0.05, shut.open).start()
    session.close()
    close_to(out.numpy(), expected(images(3)))


@pytest.mark.parametrize("default", [0, 2])
def test_a_call_on_a_stream_after_one_on_a_default_stream(
    bundle_with_plan: Bundles, run_onnx: Callable, default: int
) -> None:
    """The lane's scratch memory is still in use."""
    bundle = bundle_with_plan(profiles=((1, 8, 8),), us_per_batch=20_000)
    model = (bundle / "model.onnx").read_bytes()
    with rxdeploy.load(bundle) as session:
        gpu, stream = session.gpu, session.gpu.stream()
        arrays = [on_device(gpu, images(3, seed)) for seed in range(3)]
        outs = [gpu.empty((3, CLASSES), np.float32) for _ in arrays]
        session.prepare([3])
        for _ in range(3):
            session.run(arrays[0], out=outs[0], stream=default)
            session.run(arrays[1], out=outs[1], stream=stream)
            session.run(arrays[2], out=outs[2], stream=default)
            for each in (default, stream.handle):
                gpu.synchronize(each)
            for seed, out in enumerate(outs):
                close_to(out.numpy(), run_onnx(model, images(3, seed)))


# What is refused


def refused(session: rxdeploy.Session) -> dict[str, tuple[str, tuple, dict]]:
    """{what: (its error, arguments of run)}"""
    gpu, other = session.gpu, Gpu(1)
    here, there = gpu.stream(), other.stream()
    good, out = on_device(gpu, images(4)), gpu.empty((4, CLASSES), np.float32)
    elsewhere, floats = on_device(other, images(4)), gpu.empty((4, *SHAPE), np.float32)
    readonly = np.zeros((4, CLASSES), np.float32)
    readonly.flags.writeable = False
    strides = (SIZE * SIZE * 3, 3, SIZE * 3, 1)
    device_outs = {
        "on the other GPU": (other.empty((4, CLASSES), np.float32), "out: the array lies on GPU 1"),
        "half": (gpu.empty((4, CLASSES), np.float16), "out: got float16 (4, 7), expected float32 (4, 7)"),
        "too few": (gpu.empty((3, CLASSES), np.float32), "out: got float32 (3, 7), expected float32 (4, 7)"),
        "too many": (gpu.empty((5, CLASSES), np.float32), "out: got float32 (5, 7)"),
        "other classes": (gpu.empty((4, CLASSES + 1), np.float32), "out: got float32 (4, 8)"),
        "flat": (gpu.empty((4 * CLASSES,), np.float32), "out: got float32 (28,)"),
        "read-only": (Guest(out, data=(out.pointer, True)), "out: the array is read-only"),
        "big-endian": (Guest(out, typestr=">f4"), "out: "),
        "strided": (Guest(out, strides=(4, 16)), "out: the device array is not C-contiguous"),
        "of odd strides": (Guest(out, strides=(4 * CLASSES + 2, 4)), "out: the device array is not C-contiguous"),
        "on the other GPU by DLPack": (
            DlpackGuest(other.empty((4, CLASSES), np.float32)),
            "out: the array lies on GPU 1, the session runs on GPU 0",
        ),
        "read-only by DLPack": (DlpackGuest(out, readonly=True), "out: the array is read-only"),
    }
    host_outs = {
        "read-only here": (readonly, "out: the array is read-only"),
        "double here": (np.zeros((4, CLASSES)), "out: got float64 (4, 7), expected float32 (4, 7)"),
        "too few here": (np.zeros((3, CLASSES), np.float32), "out: got float32 (3, 7)"),
        "no array": ([0.0], "out: got a list, expected an array"),
    }
    inputs = {
        "floats": (floats, "images: got float32 (4, 48, 48, 3) on the GPU, expected uint8 (n, 48, 48, 3)"),
        "no batch": (on_device(gpu, images(1)[0]), "images: got uint8 (48, 48, 3) on the GPU"),
        "NCHW": (on_device(gpu, images(2).transpose(0, 3, 1, 2).copy()), "images: got uint8 (2, 3, 48, 48) on the GPU"),
        "another size": (gpu.empty((2, 47, 48, 3), np.uint8), "images: got uint8 (2, 47, 48, 3) on the GPU"),
        "transposed": (Guest(good, strides=strides), "images: the device array is not C-contiguous"),
        "every other": (Guest(good, shape=(2, *SHAPE), strides=(2 * SIZE * SIZE * 3, SIZE * 3, 3, 1)), "C-contiguous"),
        "on the other GPU": (elsewhere, "images: the array lies on GPU 1, the session runs on GPU 0"),
        "masked": (Guest(good, mask=object()), "images: the Guest cannot be read as a device array"),
        "no interface": (SimpleNamespace(__cuda_array_interface__={}), "cannot be read as a device array"),
        "a list": ([[1, 2]], "images: got a list, expected an array"),
        "floats here": (images(4).astype(np.float32), "images: got float32 (4, 48, 48, 3), expected uint8"),
        "one here": (images(1)[0], r"One image needs a batch"),
    }
    stream_cases = {
        "of the other GPU": (there, "no stream of GPU 0's primary context"),
        "negative": (-3, "stream: -3 is no stream's handle"),
        "no stream": (object(), "stream: got a object"),
        "text": ("x", "stream: got a str"),
    }
    cases: dict[str, tuple[str, tuple, dict]] = {}
    for name, (target, text) in (device_outs | host_outs).items():
        cases[f"out {name}"] = text, (good,), {"out": target}
        cases[f"out {name}, images here"] = text, (images(4),), {"out": target}
        cases[f"out {name}, on a stream"] = text, (good,), {"out": target, "stream": here}
    for name, (array, text) in inputs.items():
        cases[f"images {name}"] = text, (array,), {}
        cases[f"images {name}, with out"] = text, (array,), {"out": out}
        cases[f"images {name}, on a stream"] = text, (array,), {"stream": here}
    for name, (stream, text) in stream_cases.items():
        cases[f"stream {name}"] = text, (good,), {"stream": stream}
        cases[f"stream {name}, images here"] = text, (images(4),), {"stream": stream}
    return cases


def test_what_does_not_fit_is_refused_before_anything_is_enqueued(
    session: rxdeploy.Session, expected: Reference, counters: Counters
) -> None:
    cases = refused(session)
    before = {name: counters(name) for name in WORK}
    for what, (text, arguments, options) in cases.items():
        with pytest.raises(InputError) as failure:
            session.run(*arguments, **options)
        assert text in str(failure.value), what
        assert {name: counters(name) for name in WORK} == before, what
    del cases
    close_to(session.run(images(4)), expected(images(4)))
    assert session.metrics.snapshot().errors == 0
    assert session.metrics.snapshot().images == 4


@pytest.mark.parametrize("wrong", [{}, {"out": True}])
def test_a_stream_that_is_being_captured_is_refused(
    session: rxdeploy.Session, expected: Reference, wrong: dict[str, Any]
) -> None:
    stream, array = session.gpu.stream(), on_device(session.gpu, images(3))
    with (
        session.gpu.current(),
        capture(session.gpu, stream.handle),
        pytest.raises(InputError, match="is being captured into a CUDA graph"),
    ):
        session.run(array, stream=stream)
    result = session.run(array, stream=stream)
    close_to(result.numpy(), expected(images(3)))


@pytest.mark.misuse
@pytest.mark.parametrize("handle", [12345, 1 << 60])
def test_a_number_that_is_no_stream(session: rxdeploy.Session, handle: int) -> None:
    with pytest.raises(InputError, match="no stream of GPU 0's primary context"):
        session.run(on_device(session.gpu, images(3)), stream=handle)


def test_a_number_that_is_too_large_for_a_stream(session: rxdeploy.Session) -> None:
    with pytest.raises(InputError, match="stream"):
        session.run(images(3), stream=1 << 70)


class NeedsGradient:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad. Use var.detach()")


def test_an_address_that_is_none(session: rxdeploy.Session, counters: Counters) -> None:
    array = on_device(session.gpu, images(3))
    before = counters("copies")
    with pytest.raises(InputError, match="0x1000 is no address in the memory of a GPU"):
        session.run(Guest(array, data=(0x1000, False)))
    assert counters("copies") == before


def test_an_array_that_refuses_says_why(session: rxdeploy.Session) -> None:
    with pytest.raises(InputError, match=r"images: .*detach"):
        session.run(NeedsGradient())


def test_map_and_submit_are_for_the_host(session: rxdeploy.Session) -> None:
    array = on_device(session.gpu, images(3))
    with pytest.raises(InputError, match="map is for arrays on the host"):
        list(session.map([array]))
    with pytest.raises(InputError, match="image"):
        session.submit(on_device(session.gpu, images(1)[0]))


def test_a_session_on_the_cpu_cannot_reach_arrays_on_the_gpu(bundle: Path) -> None:
    with rxdeploy.load(bundle, "cpu") as session:
        gpu = Gpu()
        with pytest.raises(InputError, match="images: the array lies on a GPU, and the session cannot reach it"):
            session.run(on_device(gpu, images(2)))
        with pytest.raises(InputError, match="out: the array lies on a GPU, and the session cannot reach it"):
            session.run(images(2), out=gpu.empty((2, CLASSES), np.float32))
        with pytest.raises(InputError, match="stream: the session"):
            session.run(images(2), stream=gpu.stream())


# The second GPU


def test_the_second_gpu(bundle: Path, expected: Reference, dawdle: Callable) -> None:
    dawdle(200)
    with rxdeploy.load(bundle, "tensorrt:1") as session:
        assert session.gpu.ordinal == 1
        stream, array = session.gpu.stream(), session.gpu.empty((3, *SHAPE), np.uint8)
        for seed in range(4):
            array.fill(images(3, seed))
            close_to(session.run(array, stream=stream).numpy(), expected(images(3, seed)))
            close_to(session.run(images(3, seed)), expected(images(3, seed)))
        with pytest.raises(InputError, match="images: the array lies on GPU 0, the session runs on GPU 1"):
            session.run(on_device(Gpu(0), images(3)))
        with pytest.raises(InputError, match="no stream of GPU 1's primary context"):
            session.run(array, stream=Gpu(0).stream())


def test_the_callers_context_stays_current(bundle: Path, expected: Reference) -> None:
    """A caller who works on the second GPU runs a session on the first, and the other way round."""
    for mine, others in ((0, 1), (1, 0)):
        with Gpu(others).current():
            before = int(check(cuda.cuCtxGetCurrent()))
            with rxdeploy.load(bundle, f"tensorrt:{mine}") as session:
                for seed in range(3):
                    close_to(session.run(images(3, seed)), expected(images(3, seed)))
                result = session.run(on_device(session.gpu, images(5)))
                close_to(result.numpy(), expected(images(5)))
                assert list(map(len, session.map([images(2), images(8), images(9)]))) == [2, 8, 9]
            assert int(check(cuda.cuCtxGetCurrent())) == before


# Bundles with normalised float32 input


def test_the_declared_float32_input(bundle_with_plan: Bundles, run_onnx: Callable, dawdle: Callable) -> None:
    dawdle(200)
    bundle = bundle_with_plan(profiles=((1, LARGEST, LARGEST),), input_kind="float32")
    model = (bundle / "model.onnx").read_bytes()
    mean, std = (np.array(each, np.float32) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def normalised(batch: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(((batch / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)

    with rxdeploy.load(bundle) as session:
        stream = session.gpu.stream()
        for seed, count in enumerate((3, 3, 3, 8, 11)):
            batch = images(count, seed)
            expected = run_onnx(model, normalised(batch))
            close_to(session.run(batch), expected)
            close_to(session.run(normalised(batch)), expected)
            if count <= LARGEST:
                close_to(session.run(on_device(session.gpu, normalised(batch))).numpy(), expected)
                close_to(session.run(on_device(session.gpu, normalised(batch)), stream=stream).numpy(), expected)
        with pytest.raises(InputError, match=r"got uint8 \(2, 48, 48, 3\) on the GPU, expected float32 \(n, 3, 48, 48"):
            session.run(on_device(session.gpu, images(2)))
        out = session.gpu.empty((2, CLASSES), np.float32)
        session.run(images(2), out=out)  # normalised here
        close_to(out.numpy(), run_onnx(model, normalised(images(2))))


def test_padded_float32_input(bundle_with_plan: Bundles, run_onnx: Callable) -> None:
    bundle = bundle_with_plan(profiles=((4, 4, 4),), input_kind="float32")
    batch = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    with rxdeploy.load(bundle) as session:
        for _ in range(3):
            close_to(session.run(batch), run_onnx((bundle / "model.onnx").read_bytes(), batch))


# Empty batches


def test_empty_batches(session: rxdeploy.Session, counters: Counters) -> None:
    copies = counters("copies")
    assert session.run(images(0)).shape == (0, CLASSES)
    out = np.empty((0, CLASSES), np.float32)
    assert session.run(images(0), out=out) is out
    array = session.gpu.empty((0, *SHAPE), np.uint8)
    target = session.gpu.empty((0, CLASSES), np.float32)
    assert session.run(array, out=target) is target
    assert session.run(array).shape == (0, CLASSES)
    nowhere = Guest(array, data=(0, False))  # what PyTorch and CuPy say of empty arrays
    assert session.run(nowhere).shape == (0, CLASSES)
    assert session.run(nowhere, out=target) is target
    assert counters("copies") == copies


def test_an_empty_batch_on_the_gpu_stays_there(session: rxdeploy.Session) -> None:
    assert isinstance(session.run(session.gpu.empty((0, *SHAPE), np.uint8)), DeviceArray)


# Memory


def test_with_out_no_call_allocates(session: rxdeploy.Session, counters: Counters) -> None:
    gpu, stream = session.gpu, session.gpu.stream()
    array, out = on_device(gpu, images(5)), gpu.empty((5, CLASSES), np.float32)
    session.prepare([5])
    for _ in range(3):
        session.run(array, out=out, stream=stream)
        stream.synchronize()  # both write to the same array
        session.run(array, out=out)
    live = ("live_device_bytes", "live_pinned_bytes", "live_streams", "live_graphs", "live_graph_execs")
    before = [counters(name) for name in ("allocations", *live)]
    launches = counters("graph_launches")
    for _ in range(20):
        session.run(array, out=out, stream=stream)
        stream.synchronize()
        session.run(array, out=out)
    assert [counters(name) for name in ("allocations", *live)] == before
    assert counters("graph_launches") - launches == 40


def test_results_nobody_holds_are_freed(session: rxdeploy.Session, counters: Counters) -> None:
    array, stream = on_device(session.gpu, images(5)), session.gpu.stream()
    for _ in range(3):
        session.run(array, stream=stream)
    stream.synchronize()
    gc.collect()
    before = counters("live_device_bytes")
    for _ in range(10):
        session.run(array, stream=stream)
    stream.synchronize()
    assert counters("live_device_bytes") == before
