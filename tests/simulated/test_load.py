"""Opening a bundle for the GPU: what is taken, what is refused and why, and that nothing is left behind."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver
from standin.driver import set_option
from standin.gate import close_to
from standin.plan import make_plan

import rxdeploy
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import EnvironmentLacks, InputError, RxDeployError
from rxdeploy.runtime import cuda, lanes
from rxdeploy.runtime.cuda import Gpu

pytestmark = pytest.mark.usefixtures("steady_garbage")
SIZE, CLASSES = 48, 7
PROFILES = ((1, 4, 8),)
Bundles = Callable[..., Path]
Counters = Callable[[str], int]
LIVE = (
    "live_device_bytes",
    "live_pinned_bytes",
    "live_streams",
    "live_events",
    "live_graphs",
    "live_graph_execs",
    "primary_retained",
)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def nothing_left(counters: Counters) -> Callable[[], None]:
    """nothing_left(): fails when more of the driver's is alive than at the test's start."""
    gc.collect()
    before = {name: counters(name) for name in LIVE}

    def check() -> None:
        gc.collect()
        assert {name: counters(name) for name in LIVE} == before
        assert not counters("abandoned")

    return check


def runs(folder: Path, run_onnx: Callable, device: str = "tensorrt") -> rxdeploy.Session:
    """The session on `device`, after it gave the right logits; it is closed."""
    with rxdeploy.load(folder, device) as session:
        for _ in range(3):
            close_to(session.run(images(3)), run_onnx((folder / "model.onnx").read_bytes(), images(3)))
    return session


def why_not(folder: Path, device: str = "tensorrt") -> str:
    """The error of loading; `auto` goes on with ONNX Runtime on the CPU, for that reason."""
    with pytest.raises(EnvironmentLacks) as failure:
        rxdeploy.load(folder, device)
    text = str(failure.value)
    assert text.startswith(f"device {device} is not possible here: ")
    with rxdeploy.load(folder) as session:
        assert session.device == "cpu" and session.gpu is None
        assert session.description.startswith("ONNX Runtime ") and session.description.endswith(" on CPU")
        first, second = session.passed_over
        assert first == f"tensorrt: {text.partition(': ')[2]}"
        assert second.startswith("cuda: ")
        assert session.run(images(2)).shape == (2, CLASSES)
    return text


# What is taken


@pytest.mark.parametrize(
    ("flavour", "description"),
    [
        ("tensorrt_rtx", "plan on Simulated GPU with tensorrt-rtx 1.7.1.116"),
        ("tensorrt", "plan on Simulated GPU with tensorrt 11.4.0.106"),
    ],
)
def test_each_flavour(
    bundle_with_plan: Bundles, run_onnx: Callable, nothing_left: Callable, flavour: str, description: str
) -> None:
    session = runs(bundle_with_plan(flavour, profiles=PROFILES), run_onnx, "auto")
    assert (session.device, session.description, session.passed_over) == ("tensorrt", description, ())
    del session
    nothing_left()


def test_a_version_compatible_plan_on_a_newer_tensorrt(bundle_with_plan: Bundles, run_onnx: Callable) -> None:
    folder = bundle_with_plan("tensorrt", "11.3.0.5", profiles=PROFILES, version_compatible=True)
    assert runs(folder, run_onnx).description == "plan on Simulated GPU with tensorrt 11.4.0.106"


@pytest.mark.parametrize("version", ["11.3.0.5", "11.4.0.106"])
def test_a_version_compatible_plan_on_the_lean_runtime(
    bundle_with_plan: Bundles, run_onnx: Callable, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    folder = bundle_with_plan("tensorrt", version, profiles=PROFILES, version_compatible=True)
    assert runs(folder, run_onnx).description == "plan on Simulated GPU with tensorrt-lean 11.4.0.106"


def test_a_plan_built_on_this_gpu(bundle_with_plan: Bundles, run_onnx: Callable) -> None:
    runs(bundle_with_plan("tensorrt", profiles=PROFILES, gpu="Simulated GPU", compute_capability="8.9"), run_onnx)


def test_a_hardware_compatible_plan_of_another_gpu(bundle_with_plan: Bundles, run_onnx: Callable) -> None:
    claims = {"hardware_compatible": True}
    runs(bundle_with_plan("tensorrt", profiles=PROFILES, gpu="NVIDIA A100", claims=claims), run_onnx)


def test_a_plan_without_scratch_memory(bundle_with_plan: Bundles, run_onnx: Callable) -> None:
    runs(bundle_with_plan(profiles=PROFILES, scratch=0), run_onnx)


def test_a_scratch_of_an_odd_size(bundle_with_plan: Bundles, run_onnx: Callable) -> None:
    runs(bundle_with_plan(profiles=((1, 3, 5),), scratch=12345), run_onnx)


def test_the_second_gpu_by_its_number(bundle_with_plan: Bundles, run_onnx: Callable, nothing_left: Callable) -> None:
    folder = bundle_with_plan(profiles=PROFILES)
    for device in ("tensorrt:1", "auto:1", "tensorrt:0"):
        session = runs(folder, run_onnx, device)
        assert session.gpu is not None and session.gpu.ordinal == int(device[-1])
    del session
    nothing_left()


# What is refused


def test_another_version(bundle_with_plan: Bundles, nothing_left: Callable) -> None:
    text = why_not(bundle_with_plan("tensorrt_rtx", "1.6.0.1", profiles=PROFILES))
    assert "the plan needs tensorrt-rtx 1.6.0.1: tensorrt_rtx 1.7.1.116 is installed; install that version" in text
    assert "rxdeploy build small --fp32 --target tensorrt-rtx" in text
    nothing_left()


def test_a_newer_version_compatible_plan(bundle_with_plan: Bundles) -> None:
    text = why_not(bundle_with_plan("tensorrt", "11.5.0.1", profiles=PROFILES, version_compatible=True))
    assert (
        "tensorrt 11.4.0.106 is installed, which is older; tensorrt_lean 11.4.0.106 is installed, which is older"
        in text
    )


def test_a_module_that_is_not_installed(bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    text = why_not(bundle_with_plan("tensorrt", profiles=PROFILES))
    assert "tensorrt is not installed (pip install 'rxdeploy[tensorrt]' adds it)" in text
    assert "tensorrt_lean runs only plans built with --version-compatible" in text


def test_another_gpu(bundle_with_plan: Bundles, nothing_left: Callable) -> None:
    text = why_not(bundle_with_plan("tensorrt", profiles=PROFILES, gpu="NVIDIA H100"))
    assert "the plan was built for NVIDIA H100, and the GPU here is Simulated GPU; build it again here" in text
    nothing_left()


def test_another_compute_capability(bundle_with_plan: Bundles, run_onnx: Callable, nothing_left: Callable) -> None:
    folder = bundle_with_plan(profiles=PROFILES, compute_capability="8.0")
    text = why_not(folder)
    assert "tensorrt_rtx 1.7.1.116 does not take the plan on this GPU: " in text
    assert "expecting compute 8.9 got compute 8.0" in text and "build it again here: rxdeploy build small" in text
    set_option("compute_capability", 80)
    runs(folder, run_onnx)
    nothing_left()


def test_a_plan_that_is_not_what_the_manifest_says(
    bundle_with_plan: Bundles, make_card: Callable, model: Callable, nothing_left: Callable
) -> None:
    onnx = model(make_card())
    for plan in (
        b"",
        b"garbage",
        make_plan(onnx, flavour="tensorrt", profiles=PROFILES),
        make_plan(onnx, version="1.6.0.1", profiles=PROFILES),
    ):
        text = why_not(bundle_with_plan(profiles=PROFILES, plan=plan))
        assert "tensorrt_rtx 1.7.1.116 does not take the plan on this GPU: IRuntime::deserializeCudaEngine" in text
    nothing_left()


def test_an_altered_plan_is_not_even_tried(bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle_with_plan(profiles=PROFILES)
    plan = folder / bundles.PLAN
    data = bytearray(plan.read_bytes())
    data[-1] ^= 1
    plan.write_bytes(data)
    monkeypatch.setattr(lanes, "Plan", None)
    for device in ("auto", "tensorrt", "cpu"):
        with pytest.raises(InputError, match=r"engine\.plan was altered"):
            rxdeploy.load(folder, device)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_a_plan_may_carry_code_only_where_it_has_to(
    bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    allowed, module = [], importlib.import_module(flavour)
    real = module.Runtime.deserialize_cuda_engine

    def deserialize(runtime: Any, plan: bytes) -> Any:
        allowed.append(runtime.engine_host_code_allowed)
        return real(runtime, plan)

    monkeypatch.setattr(module.Runtime, "deserialize_cuda_engine", deserialize)
    for compatible in (False, True):
        rxdeploy.load(bundle_with_plan(flavour, profiles=PROFILES, version_compatible=compatible), "tensorrt").close()
    assert allowed == [False, True]


def altered(onnx_model: bytes, alter: Callable[[Any], None]) -> bytes:
    """An ONNX model after `alter` had its graph."""
    import onnx

    loaded = onnx.load_from_string(onnx_model)
    alter(loaded.graph)
    return loaded.SerializeToString()


def another_output(graph: Any) -> None:
    """Before the logits."""
    from onnx import TensorProto, helper

    graph.node.append(helper.make_node("Identity", [graph.output[0].name], ["more"]))
    graph.output.insert(0, helper.make_tensor_value_info("more", TensorProto.FLOAT, [None, CLASSES]))


def half_logits(graph: Any) -> None:
    from onnx import TensorProto, helper

    (logits,) = graph.output
    for node in graph.node:
        node.output[:] = ["wide" if name == logits.name else name for name in node.output]
    graph.node.append(helper.make_node("Cast", ["wide"], [logits.name], to=TensorProto.FLOAT16))
    logits.type.tensor_type.elem_type = TensorProto.FLOAT16


def test_more_tensors_than_two(bundle_with_plan: Bundles, make_card: Callable, model: Callable) -> None:
    plan = make_plan(altered(model(make_card()), another_output), profiles=PROFILES)
    text = why_not(bundle_with_plan(profiles=PROFILES, plan=plan))
    assert "the plan's tensors are " in text and "the manifest says ('image', 'logits')" in text


def test_tensors_of_another_type(bundle_with_plan: Bundles, make_card: Callable, model: Callable) -> None:
    plan = make_plan(altered(model(make_card()), half_logits), profiles=PROFILES)
    text = why_not(bundle_with_plan(profiles=PROFILES, plan=plan))
    assert "the plan's logits is float16 (7,), the manifest says float32 (7,); build it again here" in text


def test_what_is_refused_holds_no_memory_while_its_error_is_held(
    bundle_with_plan: Bundles, make_card: Callable, model: Callable, counters: Counters
) -> None:
    """A caller may keep the error, for a log say, and with its traceback all that was being made."""
    folder = bundle_with_plan(profiles=PROFILES, plan=make_plan(model(make_card(), "float32"), profiles=PROFILES))
    before = counters("live_device_bytes")
    with pytest.raises(EnvironmentLacks, match="the plan's tensors are") as failure:
        rxdeploy.load(folder, "tensorrt")
    assert counters("live_device_bytes") == before
    del failure


def test_tensors_of_other_names(bundle_with_plan: Bundles, make_card: Callable, model: Callable) -> None:
    plan = make_plan(model(make_card(), "float32"), profiles=PROFILES)
    text = why_not(bundle_with_plan(profiles=PROFILES, plan=plan))
    assert "the plan's tensors are ['input', 'logits'], the manifest says ('image', 'logits')" in text


@pytest.mark.parametrize("change", [{"num_classes": 5}, {"num_classes": 9}, {"image_size": 64}])
def test_tensors_of_other_shapes(
    bundle_with_plan: Bundles, make_card: Callable, model: Callable, change: dict[str, Any]
) -> None:
    """With more classes than the manifest says, logits would be written behind the end of `out`."""
    plan = make_plan(model(make_card("other", **change)), profiles=PROFILES)
    with pytest.raises(EnvironmentLacks, match="the manifest says"):
        rxdeploy.load(bundle_with_plan(profiles=PROFILES, plan=plan), "tensorrt")


def test_a_bundle_without_a_plan(bundle_with_plan: Bundles, tmp_path: Path) -> None:
    import msgspec

    made = bundles.open_bundle(bundle_with_plan(profiles=PROFILES))
    manifest = msgspec.structs.replace(made.manifest, engine=None)
    bare = bundles.write_bundle(tmp_path / "bare", manifest, {bundles.MODEL: made.file(bundles.MODEL)}, False).path
    assert "the bundle has no plan; `rxdeploy build small --fp32" in why_not(bare)


def test_a_bundle_that_lost_its_plan(bundle_with_plan: Bundles, tmp_path: Path) -> None:
    made = bundles.open_bundle(bundle_with_plan(profiles=PROFILES))
    files: dict[str, Path | bytes] = {bundles.MODEL: made.file(bundles.MODEL)}
    lost = bundles.write_bundle(tmp_path / "lost", made.manifest, files, False).path
    with pytest.raises(RxDeployError):
        rxdeploy.load(lost, "tensorrt")


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("tensorrt:2", r"GPU 2: there is none of that number, only 2 GPU\(s\)"),
        ("tensorrt:99", "GPU 99"),
        ("cuda", "CUDAExecutionProvider"),
    ],
)
def test_devices_that_are_not_here(bundle_with_plan: Bundles, device: str, text: str) -> None:
    with pytest.raises(EnvironmentLacks, match=text):
        rxdeploy.load(bundle_with_plan(profiles=PROFILES), device)


@pytest.mark.parametrize("device", ["gpu", "tensorrt:", "tensorrt:-1", "tensorrt:x", "tensorrt:1:2", "cpu:0", ""])
def test_devices_that_are_none(bundle_with_plan: Bundles, device: str) -> None:
    with pytest.raises(InputError, match="must be auto, tensorrt, cuda, cpu, onnxruntime or openvino"):
        rxdeploy.load(bundle_with_plan(profiles=PROFILES), device)


@pytest.fixture
def without_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def hide(name: str) -> None:
        for loaded in [each for each in sys.modules if each == name or each.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)
        cuda._driver.cache_clear()

    yield hide
    cuda._driver.cache_clear()


def test_without_cuda_bindings(bundle_with_plan: Bundles, without_module: Callable) -> None:
    without_module("cuda.bindings")
    text = why_not(bundle_with_plan(profiles=PROFILES))
    assert "the Python module cuda is not installed here; pip install cuda-bindings cuda-core adds it" in text


class Dlpack:
    """On the GPU, and with no other interface."""

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("nobody can read it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_without_cuda_core_only_device_arrays_are_refused(
    bundle_with_plan: Bundles, run_onnx: Callable, without_module: Callable
) -> None:
    folder = bundle_with_plan(profiles=PROFILES)
    with rxdeploy.load(folder, "tensorrt") as session:
        array = Dlpack()
        without_module("cuda.core")
        with pytest.raises(EnvironmentLacks, match="pip install cuda-bindings cuda-core"):
            session.run(array)
        close_to(session.run(images(3)), run_onnx((folder / "model.onnx").read_bytes(), images(3)))


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
def test_a_tensorrt_that_does_not_load(
    bundle_with_plan: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable, kind: str
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(f"raise {kind}('libnvinfer.so.11: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    text = why_not(bundle_with_plan(profiles=PROFILES))
    assert "tensorrt_rtx is installed but does not load: libnvinfer.so.11: cannot open shared object file" in text
    assert "pip install 'rxdeploy[rtx]'" in text
    nothing_left()


def test_a_driver_without_gpus(bundle_with_plan: Bundles) -> None:
    folder = bundle_with_plan(profiles=PROFILES)
    try:
        set_option("gpus", 0)
        find_driver.cache_clear()
        assert "the NVIDIA driver finds no GPU" in why_not(folder)
    finally:
        set_option("gpus", 2)
        find_driver.cache_clear()


PLAIN = """
import sys
import rxdeploy
from rxdeploy.errors import EnvironmentLacks
for device in ("tensorrt", "tensorrt:1"):
    try:
        rxdeploy.load(sys.argv[1], device)
    except EnvironmentLacks as error:
        assert "no NVIDIA driver (libcuda.so.1 is not installed)" in str(error), error
    else:
        raise SystemExit("loaded")
session = rxdeploy.load(sys.argv[1])
assert session.device == "cpu", session.device
assert "no NVIDIA driver" in session.passed_over[0], session.passed_over
import numpy
assert session.run(numpy.zeros((2, 48, 48, 3), numpy.uint8)).shape == (2, 7)
touched = [name for name in sys.modules if name.partition(".")[0] in ("tensorrt_rtx", "tensorrt", "cuda", "standin")]
assert not touched, touched
"""

EXIT = """
import atexit
import sys
import weakref
from standin import driver

LIVE = ("live_device_bytes", "live_pinned_bytes", "live_streams", "live_events", "live_graph_execs", "abandoned")

@atexit.register  # the first that is registered is the last that is called
def look():
    assert not driver.count("misuse"), driver.last_misuse()
    print([driver.count(name) for name in LIVE])

import numpy
import rxdeploy

batch = numpy.zeros((3, 48, 48, 3), numpy.uint8)
session, other = rxdeploy.load(sys.argv[1], "tensorrt"), rxdeploy.load(sys.argv[1], "tensorrt:1")
stream = session.gpu.stream()
array = session.gpu.empty(batch.shape, "uint8")
array.fill(batch)
for _ in range(3):
    session.run(batch)
    result = session.run(array, stream=stream)
    other.run(batch)
future = session.submit(batch[0])
batches = session.map([batch] * 10)
next(batches)
"""


def process(script: str, folder: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(
        command,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_driver_tensorrt_is_not_touched(bundle_with_plan: Bundles) -> None:
    """In a process without the simulated driver; there the stand-in's Runtime raises, and the real one crashes."""
    done = process(PLAIN, bundle_with_plan(profiles=PROFILES), LD_LIBRARY_PATH=None)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_ends_well_with_sessions_open(bundle_with_plan: Bundles) -> None:
    """Results on their way on a stream, requests in the queue, a generator half used; all is given back."""
    done = process(EXIT, bundle_with_plan(profiles=PROFILES), SIM_DELAY_US="300")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 0, 0, 0, 0, 0]\n", "")


# How it executes


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_no_batch_size_takes_more_device_memory(
    bundle_with_plan: Bundles, run_onnx: Callable, counters: Counters, flavour: str
) -> None:
    """However many execution contexts there are: they share the lane's scratch memory."""
    folder = bundle_with_plan(flavour, profiles=((1, 4, 8), (2, 2, 2)))
    with rxdeploy.load(folder, "tensorrt") as session:
        loaded = counters("live_device_bytes")
        session.prepare(range(1, 9))
        close_to(session.run(images(5)), run_onnx((folder / "model.onnx").read_bytes(), images(5)))
        session.engine.layer_times(3, 1)
        assert counters("live_device_bytes") == loaded


def test_rtx_compiles_for_a_shape_when_it_first_meets_it(
    bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the slower kernels that stand in meanwhile would be captured."""
    import tensorrt_rtx

    found, real = [], tensorrt_rtx.ICudaEngine.create_execution_context

    def create(engine: Any, config: Any) -> Any:
        found.append(config.dynamic_shapes_kernel_specialization_strategy)
        return real(engine, config)

    monkeypatch.setattr(tensorrt_rtx.ICudaEngine, "create_execution_context", create)
    with rxdeploy.load(bundle_with_plan(profiles=PROFILES), "tensorrt") as session:
        session.prepare([3])
    assert set(found) == {tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER}


def test_no_context_and_no_profile_are_said(
    bundle_with_plan: Bundles, run_onnx: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    def nothing(engine: Any, _: Any) -> None:
        engine._log("ICudaEngine::createExecutionContext: Error Code 2: OutOfMemory (no reason)")

    folder = bundle_with_plan(profiles=PROFILES)
    with rxdeploy.load(folder, "tensorrt") as session:
        with monkeypatch.context() as patch:
            patch.setattr(tensorrt_rtx.ICudaEngine, "create_execution_context", nothing)
            with pytest.raises(EnvironmentLacks, match=r"makes no execution context: .*OutOfMemory \(no reason\)"):
                session.run(images(3))
        with monkeypatch.context() as patch:
            patch.setattr(tensorrt_rtx.IExecutionContext, "set_optimization_profile_async", lambda *_: False)
            with pytest.raises(EnvironmentLacks, match="the plan does not take its profile 0"):
                session.run(images(3))
        for _ in range(3):
            close_to(session.run(images(3)), run_onnx((folder / "model.onnx").read_bytes(), images(3)))


@pytest.mark.parametrize(
    "captured",
    [
        False,
        True,
    ],
)
def test_tensorrts_objects_go_while_their_cuda_context_is_current(
    bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    """The stand-in frees its memory wherever it is destroyed; TensorRT wants its own context for that."""
    import tensorrt_rtx

    def current() -> int:
        return int(driver.cuCtxGetCurrent()[1])

    gone: list[tuple[str, bool]] = []
    for name in ("ICudaEngine", "IExecutionContext", "Runtime"):
        note = lambda self: gone.append((type(self).__name__, current() == own))  # noqa: E731
        monkeypatch.setattr(getattr(tensorrt_rtx, name), "__del__", note, raising=False)
    session = rxdeploy.load(bundle_with_plan(profiles=PROFILES), "tensorrt:1")
    with session.gpu.current():
        own = current()
    if captured:
        use(session)
    else:
        session.run(images(3))
        session.engine.layer_times(3, 2)
    assert set(gone) == {("RtxExecutionContext", True)}  # of `layer_times`
    session.close()
    assert gone[-2:] == [("RtxCudaEngine", True), ("RtxRuntime", True)]
    assert len(gone) >= 4 and all(right for _, right in gone), gone


def test_the_logger_lives_as_long_as_what_logs_to_it(
    bundle_with_plan: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's objects hold a bare pointer to it, the stand-in's a reference."""
    import tensorrt_rtx

    real = tensorrt_rtx.Runtime.__init__

    def init(runtime: Any, logger: Any) -> None:
        real(runtime, logger)
        runtime.logger = weakref.proxy(logger)

    def refuses(context: Any, *_: Any) -> bool:
        return context._refuse("enqueueV3: Error Code 1: Myelin (no reason)")

    monkeypatch.setattr(tensorrt_rtx.Runtime, "__init__", init)
    monkeypatch.setattr(tensorrt_rtx.IExecutionContext, "execute_async_v3", refuses)
    with (
        rxdeploy.load(bundle_with_plan(profiles=PROFILES), "tensorrt") as session,
        pytest.raises(EnvironmentLacks, match=r"Myelin \(no reason\)"),
    ):
        session.run(images(3))


# What is left behind


def use(session: rxdeploy.Session) -> None:
    """A bit of everything."""
    gpu, stream = session.gpu, session.gpu.stream()
    array = gpu.empty((3, SIZE, SIZE, 3), np.uint8)
    array.fill(images(3))
    out = gpu.empty((3, CLASSES), np.float32)
    for _ in range(3):
        session.run(images(3))
        session.run(array, stream=stream)
        session.run(array, out=out, stream=stream)
        stream.synchronize()  # or it would depend on the time which lane comes next
        session.run(images(19))
    list(session.map([images(2), images(5)]))
    session.submit(images(1)[0]).result()
    session.engine.layer_times(3, 2)
    stream.synchronize()


def test_a_closed_session_leaves_nothing(bundle_with_plan: Bundles, nothing_left: Callable, counters: Counters) -> None:
    session = rxdeploy.load(bundle_with_plan(profiles=PROFILES), "tensorrt")
    use(session)
    retained = counters("primary_retained")
    session.close()
    session.close()
    gc.collect()
    assert [counters(name) for name in LIVE[:-1]] == [0] * 6  # while the session itself is still held
    assert counters("primary_retained") <= retained
    del session
    nothing_left()


def test_a_session_nobody_holds_leaves_nothing(bundle_with_plan: Bundles, nothing_left: Callable) -> None:
    """Without waiting for the garbage collector, but for what the batcher's threads still hold."""
    session = rxdeploy.load(bundle_with_plan(profiles=PROFILES), "tensorrt")
    use(session)
    del session
    nothing_left()


def test_a_session_dropped_without_use_is_freed_at_once(bundle_with_plan: Bundles, counters: Counters) -> None:
    before = [counters(name) for name in LIVE[:-1]]
    folder = bundle_with_plan(profiles=PROFILES)
    rxdeploy.load(folder, "tensorrt").run(images(2))  # gc is off: this is not the collector's work
    assert [counters(name) for name in LIVE[:-1]] == before


def test_loading_again_and_again_takes_no_more(bundle_with_plan: Bundles, counters: Counters) -> None:
    folder = bundle_with_plan(profiles=PROFILES)
    seen = set()
    for _ in range(4):
        with rxdeploy.load(folder, "tensorrt") as session:
            use(session)
            gc.collect()
            seen.add(tuple(counters(name) for name in LIVE[:-1]))
    assert len(seen) == 1


def test_a_load_that_runs_out_of_memory_leaves_nothing(
    bundle_with_plan: Bundles, run_onnx: Callable, nothing_left: Callable, counters: Counters
) -> None:
    """Wherever it does: at the plan's weights, at the first lane, at the second."""
    folder = bundle_with_plan(profiles=PROFILES)
    with rxdeploy.load(folder, "tensorrt"):
        needed = counters("live_device_bytes")
    gc.collect()
    failures = 0
    for share in (0.001, 0.05, 0.2, 0.4, 0.6, 0.8, 0.999):
        set_option("memory", int(needed * share))
        with pytest.raises((EnvironmentLacks, RuntimeError)) as failure:  # RuntimeError: the stand-in's weights
            rxdeploy.load(folder, "tensorrt")
        failures += "not enough free memory; use smaller batches" in str(failure.value)
        del failure
        nothing_left()
    assert failures >= 4
    set_option("memory", needed)
    runs(folder, run_onnx)


@pytest.mark.parametrize("method", ["stream", "event", "allocate", "pinned"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_load_that_fails_half_way_leaves_nothing(
    bundle_with_plan: Bundles, nothing_left: Callable, monkeypatch: pytest.MonkeyPatch, method: str, number: int
) -> None:
    """At any of the first or second lane's parts; "auto" goes on without."""
    folder, real, calls = bundle_with_plan(profiles=PROFILES), getattr(Gpu, method), []

    def fails(self: Gpu, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) % 2 == number % 2 and len(calls) >= number:
            raise EnvironmentLacks("the GPU has not enough free memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Gpu, method, fails)
    with pytest.raises(EnvironmentLacks, match="device tensorrt is not possible here: the GPU has not enough"):
        rxdeploy.load(folder, "tensorrt")
    nothing_left()
    calls.clear()
    with rxdeploy.load(folder) as session:
        assert session.device == "cpu"
        assert session.passed_over[0] == "tensorrt: the GPU has not enough free memory"
    nothing_left()


@pytest.mark.parametrize("method", ["stream", "event", "allocate", "pinned"])
def test_a_load_that_fails_holds_no_memory_while_its_error_is_held(
    bundle_with_plan: Bundles, counters: Counters, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """At a part of the second lane, when the first was made; memory is short then, and the error may be kept."""
    real, calls = getattr(Gpu, method), []

    def fails(self: Gpu, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) == 2:
            raise EnvironmentLacks("the GPU has not enough free memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Gpu, method, fails)
    before = counters("live_device_bytes"), counters("live_pinned_bytes")
    with pytest.raises(EnvironmentLacks, match="the GPU has not enough free memory") as failure:
        rxdeploy.load(bundle_with_plan(profiles=PROFILES), "tensorrt")
    assert (counters("live_device_bytes"), counters("live_pinned_bytes")) == before
    del failure
