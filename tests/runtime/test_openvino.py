"""Bundles on OpenVINO, against ONNX Runtime on the same model.onnx and PyTorch's own convolutions behind that."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import rxdeploy.runtime as runtime
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import CpuSettings
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.runtime import openvino as module
from rxdeploy.runtime.onnxrt import open_session, run_session
from rxdeploy.runtime.openvino import OpenVinoEngine

try:
    OPENVINO = module.import_openvino()
except EnvironmentLacks:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

SIZE, CLASSES = 64, 10
LONG = 20  # seconds that no test should take
# float32: sums in another order. float16: OpenVINO computes in float32, ONNX Runtime rounds after each of 14 layers.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3}
Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """Digits of the data set, as the model takes them: uint8 (40, 64, 64, 3)."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    from PIL import Image

    from rxdeploy.cards.digits_images import split

    digits = split()[1].images[:40]
    return np.stack(
        [np.asarray(Image.fromarray(digit).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for digit in digits]
    )


@pytest.fixture
def engine(digits_bundle: Bundles) -> Callable[..., OpenVinoEngine]:
    def open_(
        precision: str = "fp32", sizes: tuple[int, ...] = (), callers: int = 1, **settings: Any
    ) -> OpenVinoEngine:
        bundle = bundles.open_bundle(digits_bundle(precision))
        return OpenVinoEngine(bundle, CpuSettings(engine="openvino", **settings), sizes, callers)

    return open_


def onnx_logits(bundle: Path, images: NDArray, integers: bool = True) -> NDArray[np.float32]:
    model = bundles.open_bundle(bundle).file(bundles.MODEL)
    return run_session(open_session(model, integers=integers), ["logits"], {"image": images})[0]


def relative_l2(actual: NDArray, expected: NDArray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# What it computes


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_floats_are_those_of_onnx_runtime(
    digits_bundle: Bundles, images: NDArray, precision: str, prepared: bool
) -> None:
    bundle = digits_bundle(precision)
    with runtime.load(bundle, "openvino") as session:
        if prepared:
            session.prepare([len(images)])
        logits = session.run(images)
    assert logits.dtype == np.float32 and logits.shape == (len(images), CLASSES)
    assert relative_l2(logits, onnx_logits(bundle, images)) < TOLERANCE[precision]


def test_float32_is_not_computed_in_bfloat16(engine: Callable[..., OpenVinoEngine], images: NDArray) -> None:
    """Which OpenVINO does by itself where a CPU has it: bfloat16's 8 bits would show, whatever CPU this is."""
    found = engine().run(images, None, None)
    assert found is not None
    session = open_session(engine()._bundle.file(bundles.MODEL))
    assert relative_l2(found, run_session(session, ["logits"], {"image": images})[0]) < 2.0**-9 / 10
    model = module.read_model(engine()._bundle.file(bundles.MODEL))
    compiled = module.compile_model(model)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == OPENVINO.Type.f32
    assert compiled.get_property("EXECUTION_DEVICES") == ["CPU"]


@pytest.mark.parametrize("prepared", [False, True])
def test_integers_are_no_further_from_float32_than_onnx_runtimes(
    digits_bundle: Bundles, images: NDArray, prepared: bool
) -> None:
    """OpenVINO leaves the rounding of one addend of each block's sum out, so the two differ, but not in their error.

    Two such errors that knew nothing of each other would be the square root of 2 times one of them apart.
    """
    exact = onnx_logits(digits_bundle("fp32"), images)
    onnx = onnx_logits(digits_bundle("int8"), images)
    with runtime.load(digits_bundle("int8"), "openvino") as session:
        if prepared:
            session.prepare([len(images)])
        found = session.run(images)
    error = relative_l2(onnx, exact)
    assert error > 0.001  # it is quantised
    assert relative_l2(found, exact) < 1.1 * error
    assert relative_l2(found, onnx) < 1.5 * error
    np.testing.assert_array_equal(found.argmax(1), onnx.argmax(1))


def test_integers_are_computed_as_integers(digits_bundle: Bundles) -> None:
    model = module.read_model(bundles.open_bundle(digits_bundle("int8")).file(bundles.MODEL))
    compiled = module.compile_model(module.of_size(model, 2))
    types = [
        node.get_rt_info()["runtimePrecision"].value
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].value in ("Convolution", "FullyConnected")
    ]
    assert len(types) == 18 and set(types) == {"u8"}


def test_what_was_quantised_for_tensorrt_is_refused(digits_bundle: Bundles) -> None:
    bundle = digits_bundle("int8", placement="tensorrt")
    with pytest.raises(EnvironmentLacks, match=r"device openvino .*placed for TensorRT.*rxdeploy\[cpu\].*--target"):
        runtime.load(bundle, "openvino")
    with runtime.load(bundle, "cpu") as session:  # although OpenVINO is here
        assert session.description.startswith("ONNX Runtime")


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_the_declared_float_input(digits_bundle: Bundles, images: NDArray, device: str) -> None:
    with runtime.load(digits_bundle("fp32", "float32"), device) as session:
        expected = onnx_logits(digits_bundle("fp32"), images)
        np.testing.assert_allclose(session.run(images), expected, rtol=1e-4, atol=1e-4)


# Batches


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threads": 1},
        {"threads": 1, "sessions": 2},
        {"sessions": 3},
        {"threads": 1, "sessions": 2, "split_from": 5},
    ],
)
@pytest.mark.parametrize("sizes", [(), (1, 5)])
def test_every_batch_size_gives_the_same_logits(
    engine: Callable[..., OpenVinoEngine], images: NDArray, settings: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    opened = engine(sizes=sizes, **settings)
    expected = onnx_logits(opened._bundle.path, images)
    for count in (1, 2, 3, 5, 40, 64, 65, 150, 5, 1):
        batch = images[np.arange(count) % len(images)]
        found = opened.run(batch, None, None)
        assert found is not None
        np.testing.assert_allclose(found, expected[np.arange(count) % len(images)], rtol=1e-4, atol=1e-4)
    opened.close()


def test_large_batches_are_computed_in_parts(
    engine: Callable[..., OpenVinoEngine], images: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, real = [], module.Requests.run

    def run(self: module.Requests, part: NDArray) -> Any:
        sizes.append(len(part))
        return real(self, part)

    monkeypatch.setattr(module.Requests, "run", run)
    opened = engine()
    opened.run(images[np.arange(150) % len(images)], None, None)
    assert sizes == [64, 64, 22]


def test_results_go_into_out(digits_bundle: Bundles, images: NDArray) -> None:
    with runtime.load(digits_bundle("fp32"), "openvino") as session:
        whole = np.full((2 * len(images), CLASSES), np.nan, np.float32)
        out = whole[::2]  # not contiguous
        assert session.run(images, out=out) is out
        np.testing.assert_array_equal(out, session.run(images))
        assert np.isnan(whole[1::2]).all()


def test_earlier_results_stay_as_they_are(engine: Callable[..., OpenVinoEngine], images: NDArray) -> None:
    """Every request computes its next batch into the memory of its last."""
    opened = engine()
    first = opened.run(images[:4], None, None)
    assert first is not None
    kept = first.copy()
    for _ in range(4):
        opened.run(images[4:8], None, None)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1][::-1],
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
        lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape).copy(),
        lambda a: np.concatenate([a[:1], a])[1:],
    ],
    ids=["reversed twice", "fortran", "strided", "read-only", "copied", "a part"],
)
def test_arrays_of_all_kinds_give_the_same(digits_bundle: Bundles, images: NDArray, change: Callable) -> None:
    with runtime.load(digits_bundle("fp32"), "openvino") as session:
        np.testing.assert_array_equal(session.run(change(images)), session.run(images))


def test_images_are_read_where_they_are(
    engine: Callable[..., OpenVinoEngine], images: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, seen = engine(), []
    real = OPENVINO.Tensor

    def tensor(array: NDArray, shared_memory: bool) -> Any:
        made = real(array, shared_memory=shared_memory)
        seen.append(made.data.ctypes.data)
        return made

    requests = opened._held[1].split._compiled[None]  # type: ignore[index]
    monkeypatch.setattr(requests, "_tensor", tensor)
    own = images.copy()
    opened.run(own, None, None)
    opened.run(own[3:], None, None)
    assert seen == [own.ctypes.data, own[3:].ctypes.data]


def test_a_prepared_size_has_a_model_of_its_own(engine: Callable[..., OpenVinoEngine], images: NDArray) -> None:
    opened = engine(threads=1, sessions=2)
    opened.prepare([8, 5])
    models = opened._held[1].split._compiled  # type: ignore[index]
    assert set(models) == {None, 4, 3, 2}  # what the two sessions get of 8, and of 5
    before = dict(models)
    opened.prepare([8])
    assert models == before
    ran = []
    for size, requests in models.items():
        requests.run = lambda part, size=size: ran.append(size) or np.zeros((len(part), CLASSES), np.float32)
    for count in (8, 5, 1):
        opened.run(images[:count], None, None)
    assert sorted(ran[:2]) == [4, 4] and sorted(ran[2:4]) == [2, 3] and ran[4:] == [None]


def test_small_batches_have_all_threads_where_only_large_ones_are_split(
    engine: Callable[..., OpenVinoEngine], images: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, real = [], module.compile_model

    def compiling(model: Any, settings: CpuSettings, streams: int) -> Any:
        compiled.append((int(model.input().partial_shape[0].max_length), settings.threads, streams))
        return real(model, settings, streams)

    monkeypatch.setattr(module, "compile_model", compiling)
    opened = engine(threads=1, sessions=2, split_from=8, sizes=(1, 8))
    assert compiled == [(1, 2, 1), (4, 1, 2)]
    assert opened.settings_for(7) == CpuSettings(engine="openvino", threads=2)
    assert opened.settings_for(8) == opened.settings
    requests, _ = opened.for_requests()
    assert requests.settings.split_from == 0


def test_of_prepared_sizes_alone_any_other_is_compiled_when_it_comes(
    engine: Callable[..., OpenVinoEngine], images: NDArray
) -> None:
    opened = engine(sizes=(4,))
    models = opened._held[1].split._compiled  # type: ignore[index]
    assert set(models) == {4}
    np.testing.assert_allclose(
        opened.run(images[:5], None, None)[:4], opened.run(images[:4], None, None), rtol=1e-4, atol=1e-4
    )  # type: ignore[index]
    assert set(models) == {4, None}


# Many callers


@pytest.mark.parametrize("settings", [{}, {"threads": 1, "sessions": 2}])
def test_many_threads_share_an_engine(
    engine: Callable[..., OpenVinoEngine], images: NDArray, settings: dict[str, Any]
) -> None:
    """Each its own images and batch sizes, some of them prepared, on fewer requests than there are threads."""
    opened = engine(sizes=(3, 7), **settings)
    expected = onnx_logits(opened._bundle.path, images)

    def one(seed: int) -> float:
        random = np.random.default_rng(seed)
        chosen = random.integers(0, len(images), random.integers(1, 9))
        found = opened.run(images[chosen], None, None)
        assert found is not None
        return float(np.abs(found - expected[chosen]).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(one, range(120))) < 1e-3 * np.abs(expected).max()
    opened.close()


def test_requests_are_neither_lost_nor_made_anew(engine: Callable[..., OpenVinoEngine], images: NDArray) -> None:
    opened = engine()
    requests = opened._held[1].split._compiled[None]  # type: ignore[index]
    count = requests._idle.qsize()
    assert count == 2
    for bad in (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3), np.float32)):
        with pytest.raises(CheckFailed, match="OpenVINO cannot run the model: ") as caught:
            opened.run(bad, None, None)
        assert "Exception from" not in str(caught.value) and ".cpp" not in str(caught.value)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: opened.run(images, None, None), range(30)))
    assert requests._idle.qsize() == count


@pytest.mark.parametrize(("multiply_adds", "cores"), [(10**7, 4), (10**9, 4), (10**7, 1)])
def test_small_models_compute_requests_on_every_core_by_itself(
    digits_bundle: Bundles, images: NDArray, monkeypatch: pytest.MonkeyPatch, multiply_adds: int, cores: int
) -> None:
    opened = bundles.open_bundle(digits_bundle("fp32"))
    counts = bundles.Counts(parameters=1, multiply_adds=multiply_adds)
    bundle = bundles.Bundle(opened.path, msgspec.structs.replace(opened.manifest, counts=counts))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    asked: list[tuple[int, int]] = []
    real = module.compile_model

    def compile_(model: Any, settings: CpuSettings, streams: int) -> Any:
        asked.append((settings.threads, streams))
        return real(model, settings, streams)

    monkeypatch.setattr(module, "compile_model", compile_)
    engine = OpenVinoEngine(bundle)
    one_by_one, at_once = engine.for_requests()
    if multiply_adds < 10**8 and cores > 1:
        assert (asked, at_once) == ([(0, 1), (1, cores)], cores)
        found, expected = one_by_one.run(images, None, None), engine.run(images, None, None)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    else:
        assert (one_by_one, at_once, asked) == (engine, 1, [(0, 1)])


def test_submit_gives_what_run_gives(digits_bundle: Bundles, images: NDArray) -> None:
    batching = runtime.Batching(max_batch=4, max_delay_ms=1)
    with runtime.load(digits_bundle("fp32"), "openvino", batching=batching) as session:
        futures = [session.submit(image) for image in images]
        found = [future.result(LONG) for future in futures]
        np.testing.assert_allclose(found, session.run(images), rtol=1e-4, atol=1e-4)


def test_map_gives_what_run_gives(digits_bundle: Bundles, images: NDArray) -> None:
    with runtime.load(digits_bundle("fp32"), "openvino") as session:
        batches = [images[:1], images, images[2:5]]
        for found, batch in zip(session.map(iter(batches)), batches, strict=True):
            np.testing.assert_array_equal(found, session.run(batch))
        assert session.metrics.snapshot().runs.count == 6


# The end


def test_a_closed_session_says_so(digits_bundle: Bundles, images: NDArray) -> None:
    session = runtime.load(digits_bundle("fp32"), "openvino")
    future = session.submit(images[0])
    session.close()
    session.close()
    assert future.result(LONG).shape == (CLASSES,)
    for call in (session.run, session.submit, lambda x: list(session.map([x])), lambda x: session.prepare([2])):
        with pytest.raises(runtime.Closed, match="closed"):
            call(images)
    for call in (lambda: session.engine.run(images, None, None), lambda: session.engine.prepare([1])):
        with pytest.raises(runtime.Closed, match="closed"):
            call()


def test_a_call_that_runs_while_it_is_closed_ends(
    engine: Callable[..., OpenVinoEngine], images: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = engine(threads=1, sessions=2)
    expected = opened.run(images, None, None)
    real = module.Requests.run

    def run(self: module.Requests, part: NDArray) -> Any:
        opened._held = None  # as `close` begins
        return real(self, part)

    monkeypatch.setattr(module.Requests, "run", run)
    np.testing.assert_array_equal(opened.run(images, None, None), expected)  # type: ignore[arg-type]


def test_it_leaves_no_threads_of_python(engine: Callable[..., OpenVinoEngine], images: NDArray) -> None:
    before = set(threading.enumerate())  # of an earlier test's, some may be ending
    opened = engine(threads=1, sessions=2, denormals_as_zero=True)
    opened.run(images, None, None)
    opened.close()
    assert not set(threading.enumerate()) - before


# What it leaves alone


def test_denormals_as_zero_is_not_the_callers_arithmetic(
    engine: Callable[..., OpenVinoEngine], images: NDArray
) -> None:
    opened = engine(denormals_as_zero=True)
    opened.run(images, None, None)
    opened.prepare([3])
    opened.run(images[:3], None, None)
    halved: list[float] = []
    thread = threading.Thread(target=lambda: halved.append(float(np.float32(1e-39) * np.float32(0.5))))
    thread.start()
    thread.join(LONG)
    assert np.float32(1e-39) * np.float32(0.5) > 0 and halved[0] > 0


def process(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with an empty home; no variable that says this is CI, where telemetry is off by itself."""
    (tmp_path / "home").mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=kept | {"HOME": str(tmp_path / "home")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("device", ["openvino", "onnxruntime"])
def test_no_telemetry(digits_bundle: Bundles, tmp_path: Path, device: str) -> None:
    """Neither a file in the home directory, nor a socket or a process, from either engine."""
    code = f"""
import sys
def watch(event, arguments):
    if event.startswith("socket.") or event in ("os.fork", "os.posix_spawn", "subprocess.Popen"):
        print(event, arguments, file=sys.stderr)
sys.addaudithook(watch)
import numpy, rxdeploy
with rxdeploy.load({str(digits_bundle("fp32"))!r}, {device!r}) as session:
    session.run(numpy.zeros((1, {SIZE}, {SIZE}, 3), numpy.uint8))
assert "openvino_telemetry" not in sys.modules
"""
    done = process(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "home").iterdir()) == []


def test_the_telemetry_package_can_be_imported_afterwards() -> None:
    assert "openvino_telemetry" not in sys.modules
    assert module.import_openvino() is OPENVINO
    assert "openvino_telemetry" not in sys.modules


def test_a_child_of_a_process_that_used_it_is_told_so(digits_bundle: Bundles, tmp_path: Path) -> None:
    """Where it would wait for ever for threads that are its parent's."""
    code = f"""
import os, numpy, rxdeploy
image = numpy.zeros((1, {SIZE}, {SIZE}, 3), numpy.uint8)
session = rxdeploy.load({str(digits_bundle("fp32"))!r}, "openvino")
session.run(image)
child = os.fork()
if child == 0:
    try:
        rxdeploy.load({str(digits_bundle("fp32"))!r}, "openvino")
    except rxdeploy.errors.EnvironmentLacks as error:
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert session.run(image).shape == (1, {CLASSES})
"""
    done = process(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_signals_reach_their_handlers(digits_bundle: Bundles, tmp_path: Path) -> None:
    """OpenVINO gives the thread that opens a model a stack for signals, and takes back one that is still in use."""
    code = f"""
import os, signal, numpy, rxdeploy
image = numpy.zeros((1, {SIZE}, {SIZE}, 3), numpy.uint8)
sessions = [rxdeploy.load({str(digits_bundle("fp32"))!r}, "openvino") for _ in range(3)]
for session in sessions:
    session.run(image)
    session.close()
del session, sessions
came = []
signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
os.kill(os.getpid(), signal.SIGINT)
assert came == [signal.SIGINT]
"""
    done = process(code, tmp_path)
    assert done.returncode == 0, done.stderr


# What is missing or broken


def test_without_openvino_the_error_says_what_to_install(
    digits_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = digits_bundle("fp32")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentLacks, match=r"device openvino is not possible.*pip install 'rxdeploy\[openvino\]'"):
        runtime.load(bundle, "openvino")


def test_an_openvino_that_does_not_load_says_so(
    digits_bundle: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = digits_bundle("fp32")
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')\n")
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentLacks, match=r"OpenVINO does not load here: libopenvino\.so.*pip install -U"):
        runtime.load(bundle, "openvino")


def test_a_model_that_openvino_cannot_read(digits_bundle: Bundles, tmp_path: Path) -> None:
    source = digits_bundle("fp32")
    manifest = bundles.open_bundle(source).manifest
    broken = bundles.write_bundle(tmp_path / "broken", manifest, {bundles.MODEL: b"no protobuf"}, overwrite=False)
    with pytest.raises(CheckFailed, match=r"OpenVINO cannot load .*broken/model\.onnx: Unable to read the model"):
        runtime.load(broken.path, "openvino")
    with pytest.raises(CheckFailed, match="OpenVINO cannot load the model: "):
        module.read_model(b"no protobuf")


def test_a_device_has_no_number(digits_bundle: Bundles) -> None:
    for device in ("openvino:0", "onnxruntime:1"):
        with pytest.raises(InputError, match="must be auto, tensorrt, cuda, cpu, onnxruntime or openvino"):
            runtime.load(digits_bundle("fp32"), device)
