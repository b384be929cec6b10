"""Sessions on ONNX Runtime's CUDA provider: ONNX Runtime on the CPU, that takes simulated device memory for CUDA's.

Like the real provider it has streams of its own: what it computes is in a caller's array on the device only after
`synchronize_outputs`, and it waits for nobody's streams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda.bindings import driver as cuda
from standin.driver import check
from standin.gate import close_to, on_device
from standin.kernel import memory

import rxdeploy
from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.runtime import Batching, onnxrt
from rxdeploy.runtime import cuda as runtime_cuda
from rxdeploy.runtime import session as sessions
from rxdeploy.runtime.cuda import DeviceArray, Gpu

SIZE, CLASSES = 48, 7
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
Bundles = Callable[..., Path]
RealSession, RealBinding = onnxruntime.InferenceSession, onnxruntime.IOBinding


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


class Binding(RealBinding):
    """Simulated device memory lies somewhere on the host, and there the real binding finds it."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._number, self._pending = session.number, list[tuple[np.ndarray, np.ndarray]]()

    def _memory(self, number: int, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        what = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        assert number == self._number == check(cuda.cuPointerGetAttribute(what, pointer))
        return memory(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize)

    def bind_cpu_input(self, name: str, arr_on_cpu: np.ndarray) -> None:
        assert arr_on_cpu.flags.c_contiguous  # ONNX Runtime would copy it, and keep only the address of the copy
        super().bind_cpu_input(name, arr_on_cpu)

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: tuple[int, ...], buffer_ptr: int
    ) -> None:
        assert device_type == "cuda"
        here = self._memory(device_id, buffer_ptr, shape, element_type).ctypes.data
        super().bind_input(name, "cpu", 0, element_type, shape, here)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        if device_type == "cpu":
            return super().bind_output(name, device_type, device_id, element_type, shape, buffer_ptr)
        assert device_type == "cuda" and buffer_ptr
        there = self._memory(device_id, buffer_ptr, shape, element_type)
        here = np.empty(there.shape, np.uint8)
        self._pending.append((there, here))
        return super().bind_output(name, "cpu", 0, element_type, shape, here.ctypes.data)

    def synchronize_outputs(self) -> None:
        super().synchronize_outputs()
        for there, here in self._pending:
            there[:] = here


class Session(RealSession):
    """Computes on the CPU, and says that it is on CUDA when that was asked for."""

    made: list[Session]

    def __init__(self, source: Any, options: Any, providers: list[Any]) -> None:
        ((self.provider, self.provider_options),) = providers
        assert options.log_severity_level == 4  # or ONNX Runtime writes to the terminal itself
        self.number = int(self.provider_options.get("device_id", -1))
        super().__init__(source, options, providers=[CPU])
        Session.made.append(self)

    def get_providers(self) -> list[str]:
        return [self.provider, CPU] if self.provider == CUDA else [CPU]

    def io_binding(self) -> Binding:
        return Binding(self)


def open_session(source: Any, options: Any, providers: list[Any], enable_fallback: int = 1) -> RealSession:
    """The stand-in of TensorRT also runs on ONNX Runtime, and that is left as it is."""
    if providers == [CPU]:
        return RealSession(source, options, providers=providers)
    assert enable_fallback == 0  # or it goes on elsewhere, and says so on stdout
    return Session(source, options, providers=providers)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An ONNX Runtime with CUDA from here on; the list has an entry for each time its CUDA libraries were loaded."""
    calls: list[str] = []
    monkeypatch.setattr(Session, "made", [], raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: calls.append("preloaded"), raising=False)
    return calls


@pytest.fixture
def bundle(bundle_with_plan: Bundles, loaded: list[str]) -> Path:
    return bundle_with_plan(profiles=((1, 4, 8),))


@pytest.fixture
def expected(bundle: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What ONNX Runtime says without any of this."""
    plain = RealSession((bundle / "model.onnx").read_bytes(), providers=[CPU])
    return lambda batch: plain.run(["logits"], {"image": np.ascontiguousarray(batch)})[0]


@pytest.fixture
def session(bundle: Path) -> Iterator[rxdeploy.Session]:
    with rxdeploy.load(bundle, "cuda") as opened:
        yield opened


# How it is opened


def test_it_is_opened_on_the_gpu_with_full_precision(session: rxdeploy.Session, loaded: list[str]) -> None:
    (made,) = Session.made
    assert made.provider_options == {"use_tf32": "0", "device_id": "0"}  # TF32 would not be float32
    assert loaded == ["preloaded"]
    assert session.device == "cuda" and session.gpu is not None and session.gpu.ordinal == 0
    assert session.description == f"ONNX Runtime {onnxruntime.__version__} on Simulated GPU"
    assert session.passed_over == ()


def test_an_older_onnx_runtime_loads_its_libraries_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime, "preload_dlls")
    with rxdeploy.load(bundle, "cuda") as session:
        assert session.run(images(2)).shape == (2, CLASSES)


def test_the_cpu_takes_no_options_of_cudas(bundle: Path, loaded: list[str]) -> None:
    with rxdeploy.load(bundle, "cpu") as session:
        assert session.gpu is None
    assert [(each.provider, each.provider_options) for each in Session.made] == [(CPU, {})]
    assert not loaded


def test_the_second_gpu(bundle: Path, expected: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_driver()
    gpus = (found.gpus[0], SimpleNamespace(**{**vars(found.gpus[1]), "name": "Another GPU"}))
    monkeypatch.setattr(onnxrt, "find_driver", lambda: SimpleNamespace(gpus=gpus, problem=None))
    with rxdeploy.load(bundle, "cuda:1") as session:
        assert Session.made[-1].provider_options["device_id"] == "1"
        assert session.gpu is not None and session.gpu.ordinal == 1
        assert session.description.endswith(" on Another GPU")
        array, out = on_device(session.gpu, images(3)), session.gpu.empty((3, CLASSES), np.float32)
        session.run(array, out=out)
        close_to(out.numpy(), expected(images(3)))
        with pytest.raises(InputError, match="images: the array lies on GPU 0, the session runs on GPU 1"):
            session.run(on_device(Gpu(0), images(3)))


def test_auto_prefers_the_plan_then_cuda_then_the_cpu(
    bundle: Path, bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rxdeploy.load(bundle) as session:
        assert (session.device, session.passed_over) == ("tensorrt", ())
    old = bundle_with_plan("tensorrt_rtx", "1.6.0.1", profiles=((1, 4, 8),))
    for device in ("auto", "auto:1"):
        with rxdeploy.load(old, device) as session:
            assert session.device == "cuda" and session.gpu is not None
            assert session.gpu.ordinal == (device == "auto:1")
            (why,) = session.passed_over
            assert why.startswith("tensorrt: the plan needs tensorrt-rtx 1.6.0.1")
    monkeypatch.setattr(Session, "get_providers", lambda _: [CPU])
    with rxdeploy.load(old) as session:
        assert session.device == "cpu"
        first, second = session.passed_over
        assert first == why and second.startswith("cuda: ONNX Runtime's CUDAExecutionProvider does not start here")


def test_where_nothing_is_possible_every_reason_is_said(
    bundle_with_plan: Bundles, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bundle_with_plan("tensorrt_rtx", "1.6.0.1", profiles=((1, 4, 8),))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [])
    with pytest.raises(
        EnvironmentLacks, match=r"cannot run here: tensorrt: .*; cuda: .*CUDAE.*; cpu: .*CPUE"
    ) as failure:
        rxdeploy.load(old)
    assert str(old) in str(failure.value)


def test_what_is_wrong_with_the_bundle_is_not_passed_over(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what this machine lacks is: ONNX Runtime on the CPU would not take this model either."""

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(sessions, "PlanEngine", lambda *_: (_ for _ in ()).throw(EnvironmentLacks("not today")))
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuses)
    with pytest.raises(CheckFailed, match=r"ONNX Runtime cannot load .*no such operator"):
        rxdeploy.load(bundle)


def test_the_log_says_what_runs_and_why(bundle_with_plan: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rxdeploy.runtime")
    rxdeploy.load(bundle_with_plan("tensorrt_rtx", "1.6.0.1", profiles=((1, 4, 8),))).close()
    assert "running on ONNX Runtime" in caplog.text and "; tensorrt: the plan needs" in caplog.text


# Without cuda-python


@pytest.fixture
def without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    runtime_cuda._driver.cache_clear()
    yield
    runtime_cuda._driver.cache_clear()


def test_without_cuda_python_host_arrays_run(bundle: Path, expected: Callable, without_cuda_python: None) -> None:
    array = SimpleNamespace(__cuda_array_interface__={"shape": (1,), "typestr": "|u1", "data": (256, False)})
    with rxdeploy.load(bundle, "cuda") as session:
        assert session.device == "cuda" and session.gpu is None
        close_to(session.run(images(3)), expected(images(3)))
        close_to(session.submit(images(1)[0]).result(), expected(images(1))[0])
        with pytest.raises(InputError, match=r"images: .*on a GPU.*; pip install cuda-bindings cuda-core adds"):
            session.run(array)
        with pytest.raises(InputError, match=r"stream: .*; pip install cuda-bindings cuda-core adds what that needs"):
            session.run(images(3), stream=5)


# Arrays


@pytest.mark.parametrize("streamed", [False, True], ids=["no stream", "stream"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_arrays_in_and_out(
    session: rxdeploy.Session, expected: Callable, dawdle: Callable, streamed: bool, count: int
) -> None:
    """Device or host in, device, host or nothing out; complete on return, also with a stream."""
    dawdle(200)
    gpu = session.gpu
    stream = gpu.stream() if streamed else None
    for seed in range(2):
        batch = images(count, seed)
        array = on_device(gpu, batch)
        made = session.run(array, stream=stream)
        assert isinstance(made, DeviceArray) and (made.shape, made.dtype) == ((count, CLASSES), np.float32)
        close_to(made.numpy(), expected(batch))
        for source in (array, batch):
            out = gpu.empty((count, CLASSES), np.float32)
            assert session.run(source, out=out, stream=stream) is out
            close_to(out.numpy(), expected(batch))
            wide = np.full((count, 2 * CLASSES), np.nan, np.float32)
            assert session.run(source, out=wide[:, ::2], stream=stream) is not None  # not contiguous
            close_to(wide[:, ::2], expected(batch))
            assert np.isnan(wide[:, 1::2]).all()
        close_to(session.run(batch, stream=stream), expected(batch))


def test_host_images_of_any_layout_into_device_memory(session: rxdeploy.Session, expected: Callable) -> None:
    batch, out = images(6)[::-2], session.gpu.empty((3, CLASSES), np.float32)
    assert not batch.flags.c_contiguous
    session.run(batch, out=out)
    close_to(out.numpy(), expected(batch))


def test_the_declared_float32_input(bundle_with_plan: Bundles, loaded: list[str]) -> None:
    folder = bundle_with_plan(profiles=((1, 4, 8),), input_kind="float32")
    batch = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    plain = RealSession((folder / "model.onnx").read_bytes(), providers=[CPU])
    with rxdeploy.load(folder, "cuda") as session:
        close_to(session.run(on_device(session.gpu, batch)).numpy(), plain.run(["logits"], {"input": batch})[0])


def test_it_waits_for_the_stream_first(session: rxdeploy.Session, expected: Callable, dawdle: Callable) -> None:
    """Work on it that fills the images; ONNX Runtime has a stream of its own."""
    gpu, stream = session.gpu, session.gpu.stream()
    source, array = on_device(gpu, images(3)), on_device(gpu, images(3, seed=9))
    dawdle(20_000)
    with gpu.current():
        for _ in range(5):
            gpu.copy(array.pointer, source.pointer, array.nbytes, stream.handle)
    result = session.run(array, stream=stream)
    close_to(result.numpy(), expected(images(3)))


def test_plain_arrays_are_not_bound(session: rxdeploy.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "io_binding", lambda _: pytest.fail("nothing lies on the device"))
    session.run(images(2))
    session.run(images(2), out=np.empty((2, CLASSES), np.float32))


def test_errors_are_said_and_counted(session: rxdeploy.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA failure 700\nand more")

    monkeypatch.setattr(Session, "run", fails)
    monkeypatch.setattr(Session, "run_with_iobinding", fails)
    array = on_device(session.gpu, images(2))
    for number, call in enumerate(
        (
            lambda: session.run(array),
            lambda: session.run(images(2)),
            lambda: list(session.map([images(2)])),
            lambda: session.submit(images(1)[0]).result(),
        ),
        1,
    ):
        with pytest.raises(CheckFailed, match=r"^ONNX Runtime cannot run the model: CUDA failure 700$"):
            call()
        assert session.metrics.snapshot().errors == number


# The rest of a session


def test_map_classify_and_submit(session: rxdeploy.Session, expected: Callable, tmp_path: Path) -> None:
    from PIL import Image

    results = list(session.map([images(3), images(40)]))
    close_to(results[0], expected(images(3)))
    close_to(results[1], expected(images(40)))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(images(1, number)[0]).save(path)
    for path, found in zip(paths, session.classify(paths, k=1), strict=True):
        logits = expected(session.preprocess(path)[None])[0]
        assert found.predictions is not None and found.predictions[0].index == logits.argmax()
    close_to(session.submit(images(1)[0]).result(), expected(images(1))[0])
    assert session.prepare([3]) is None


@pytest.mark.parametrize(("device", "at_once"), [("tensorrt", 2), ("cuda", 1)])
def test_how_many_batches_of_requests_are_under_way(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, device: str, at_once: int
) -> None:
    """Two for a plan, of which one is copied while the other is computed."""
    go_on, running, most = threading.Event(), 0, 0
    lock, reached = threading.Lock(), threading.Semaphore(0)

    def run(images: np.ndarray, *_: Any) -> np.ndarray:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        reached.release()
        go_on.wait(0.1 if at_once == 1 else 20)
        with lock:
            running -= 1
        return np.zeros((len(images), CLASSES), np.float32)

    with rxdeploy.load(bundle, device, batching=Batching(max_batch=1, max_delay_ms=0)) as session:
        monkeypatch.setattr(session.engine, "run", run)
        futures = [session.submit(image) for image in images(3)]
        for _ in range(at_once):
            assert reached.acquire(timeout=20)
        if at_once == 2:
            go_on.set()
        for future in futures:
            future.result()
    assert most == at_once


def test_close_drops_onnx_runtimes_session(bundle: Path) -> None:
    import gc
    import weakref

    session = rxdeploy.load(bundle, "cuda")
    session.run(images(2))
    (gone,) = map(weakref.ref, Session.made)
    Session.made.clear()
    session.close()
    gc.collect()
    assert gone() is None
