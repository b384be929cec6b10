"""The stand-in for TensorRT: against ONNX Runtime in what it computes, against the real modules in what it offers."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cuda
from numpy.typing import NDArray
from standin import VERSIONS, make_plan
from standin.driver import check, last_misuse, set_option

MODULES = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
SHAPE = (48, 48, 3)
CLASSES = 7
CAPTURE = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Log:
    """A logger of a module, which keeps what it is told."""

    def __init__(self, trt: Any) -> None:
        self.lines: list[str] = []
        lines = self.lines

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                lines.append(f"{severity.name} {text}")

        self.logger = Logger()


@pytest.fixture
def onnx(make_card: Callable, model: Callable) -> bytes:
    return model(make_card())


@pytest.fixture
def image() -> Callable[..., NDArray[np.uint8]]:
    def draw(batch: int, seed: int = 0) -> NDArray[np.uint8]:
        return np.random.default_rng(seed).integers(0, 256, (batch, *SHAPE), np.uint8)

    return draw


@dataclass
class Engine:
    """An engine with one context, memory for `batch` images and a stream."""

    trt: Any
    plan: bytes
    batch: int = 8
    tensor: str = "image"  # or "input", which is four times as large

    def __post_init__(self) -> None:
        self.log = Log(self.trt)
        self.runtime = self.trt.Runtime(self.log.logger)
        self.engine = self.runtime.deserialize_cuda_engine(self.plan)
        assert self.engine is not None, self.log.lines
        self.scratch_size = self.engine.device_memory_size_v2
        item = int(np.prod(SHAPE)) * (4 if self.tensor == "input" else 1)
        sizes = {self.tensor: self.batch * item, "logits": self.batch * CLASSES * 4}
        self.memory = {name: int(check(cuda.cuMemAlloc(size))) for name, size in sizes.items()}
        self.memory["scratch"] = int(check(cuda.cuMemAlloc(self.scratch_size)))
        self.stream = int(check(cuda.cuStreamCreate(1)))
        self.context = self.new_context()

    def new_context(self) -> Any:
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        assert context.set_optimization_profile_async(0, self.stream)
        context.set_device_memory(self.memory["scratch"], self.scratch_size)
        for name in (self.tensor, "logits"):
            assert context.set_tensor_address(name, self.memory[name])
        return context

    def give(self, images: NDArray[np.uint8]) -> None:
        assert self.context.set_input_shape("image", images.shape)
        check(cuda.cuMemcpyHtoDAsync(self.memory["image"], images.ctypes.data, images.nbytes, self.stream))

    def take(self, batch: int) -> NDArray[np.float32]:
        result = np.empty((batch, CLASSES), np.float32)
        check(cuda.cuMemcpyDtoHAsync(result.ctypes.data, self.memory["logits"], result.nbytes, self.stream))
        check(cuda.cuStreamSynchronize(self.stream))
        return result

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.give(images)
        assert self.context.execute_async_v3(self.stream), self.log.lines
        return self.take(len(images))

    def close(self) -> None:
        check(cuda.cuStreamSynchronize(self.stream))
        check(cuda.cuStreamDestroy(self.stream))
        for pointer in self.memory.values():
            check(cuda.cuMemFree(pointer))
        del self.context, self.engine


@pytest.fixture
def engine(context: Any, onnx: bytes) -> Iterator[Callable[..., Engine]]:
    """engine(module, batch, **options of make_plan): an Engine of the small model."""
    made: list[Engine] = []

    def make(module: str = "tensorrt_rtx", batch: int = 8, **options: Any) -> Engine:
        plan = make_plan(onnx, flavour=module, **options)
        made.append(Engine(importlib.import_module(module), plan, batch))
        return made[-1]

    yield make
    for each in made:
        each.close()


# What it computes


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_it_computes_what_onnx_runtime_does(
    engine: Callable, onnx: bytes, image: Callable, run_onnx: Callable, dawdle: Callable, module: str
) -> None:
    dawdle(500)
    here = engine(module)
    for batch in (1, 3, 8):
        np.testing.assert_array_equal(here.run(image(batch, batch)), run_onnx(onnx, image(batch, batch)))


def test_a_captured_execution_keeps_its_addresses_and_reads_new_images(
    engine: Callable, onnx: bytes, image: Callable, run_onnx: Callable, executions: Any
) -> None:
    here = engine()
    here.give(image(4))
    check(cuda.cuStreamBeginCapture(here.stream, CAPTURE))
    assert here.context.execute_async_v3(here.stream)
    graph = check(cuda.cuStreamEndCapture(here.stream))
    executable = check(cuda.cuGraphInstantiate(graph, 0))
    check(cuda.cuGraphDestroy(graph))
    assert not executions
    assert here.context.set_tensor_address("logits", here.memory["image"])
    assert here.context.set_input_shape("image", (1, *SHAPE))
    for seed in (1, 2):
        images = image(4, seed)
        check(cuda.cuMemcpyHtoDAsync(here.memory["image"], images.ctypes.data, images.nbytes, here.stream))
        check(cuda.cuGraphLaunch(executable, here.stream))
        np.testing.assert_array_equal(here.take(4), run_onnx(onnx, images))
    assert [(each.batch, each.captured) for each in executions] == [(4, True)] * 2
    check(cuda.cuGraphExecDestroy(executable))


def test_a_plan_can_take_longer(engine: Callable, image: Callable) -> None:
    here = engine(us_per_batch=20_000, us_per_image=10_000)
    begin, end = (check(cuda.cuEventCreate(0)) for _ in range(2))
    here.give(image(2))
    check(cuda.cuEventRecord(begin, here.stream))
    assert here.context.execute_async_v3(here.stream)
    check(cuda.cuEventRecord(end, here.stream))
    check(cuda.cuEventSynchronize(end))
    assert check(cuda.cuEventElapsedTime(begin, end)) >= 40  # milliseconds
    for event in (begin, end):
        check(cuda.cuEventDestroy(event))


def test_engines_and_contexts_own_device_memory(context: Any, onnx: bytes, counters: Callable) -> None:
    trt = importlib.import_module("tensorrt_rtx")
    before = counters("live_device_bytes")
    runtime = trt.Runtime(trt.Logger())
    engine = runtime.deserialize_cuda_engine(make_plan(onnx, scratch=12345))
    weights = counters("live_device_bytes") - before
    assert weights == len(onnx)
    made = engine.create_execution_context()  # STATIC
    assert counters("live_device_bytes") - before - weights == 12345
    del made
    managed = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert counters("live_device_bytes") - before == weights
    del managed, engine
    assert counters("live_device_bytes") == before


# What it notices


class Pause:
    """Holds executions up in the middle, where they have read their images and not written their logits."""

    def __init__(self) -> None:
        self.reached, self._go_on = threading.Semaphore(0), threading.Event()

    def __call__(self, seconds: float) -> None:
        self.reached.release()
        assert self._go_on.wait(10)

    def end(self, executions: int) -> None:
        """Wait for so many executions, then let them go on."""
        for _ in range(executions):
            assert self.reached.acquire(timeout=10)
        self._go_on.set()


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Pause:
    """Applies to plans with `us_per_batch`."""
    made = Pause()
    monkeypatch.setattr("standin.kernel.pause", made)
    return made


@pytest.mark.misuse
def test_two_executions_with_one_scratch_memory_spoil_each_other(
    engine: Callable, image: Callable, pause: Pause
) -> None:
    here = engine(us_per_batch=1)
    other, second = check(cuda.cuStreamCreate(1)), here.new_context()
    target = int(check(cuda.cuMemAlloc(1000)))
    assert second.set_input_shape("image", (1, *SHAPE)) and second.set_tensor_address("logits", target)
    here.give(image(1))
    check(cuda.cuStreamSynchronize(here.stream))
    assert here.context.execute_async_v3(here.stream) and second.execute_async_v3(int(other))
    pause.end(2)
    check(cuda.cuStreamSynchronize(other))
    result = np.empty((1, CLASSES), np.float32)
    check(cuda.cuMemcpyDtoH(result.ctypes.data, target, result.nbytes))
    assert np.isnan(here.take(1)).all() or np.isnan(result).all()
    assert "scratch memory changed while it ran" in last_misuse()
    check(cuda.cuStreamDestroy(other))
    check(cuda.cuMemFree(target))


@pytest.mark.misuse
def test_one_context_executes_on_one_stream_at_a_time(engine: Callable, image: Callable, pause: Pause) -> None:
    here = engine(us_per_batch=1)
    other = check(cuda.cuStreamCreate(1))
    here.give(image(1))
    check(cuda.cuStreamSynchronize(here.stream))
    assert here.context.execute_async_v3(here.stream)
    assert pause.reached.acquire(timeout=10)
    assert here.context.execute_async_v3(int(other))
    assert pause.reached.acquire(timeout=10)
    assert "one context executes twice" in last_misuse()
    pause.end(0)
    check(cuda.cuStreamSynchronize(other))
    check(cuda.cuStreamDestroy(other))


@pytest.mark.misuse
@pytest.mark.parametrize("victim", ["image", "logits"])
def test_writing_to_its_tensors_meanwhile_spoils_an_execution(
    engine: Callable, image: Callable, pause: Pause, victim: str
) -> None:
    here = engine(us_per_batch=1)
    other = check(cuda.cuStreamCreate(1))
    here.give(image(1))
    assert here.context.execute_async_v3(here.stream)
    assert pause.reached.acquire(timeout=10)
    check(cuda.cuMemsetD8Async(here.memory[victim], 1, 8, other))
    check(cuda.cuStreamSynchronize(other))
    pause.end(0)
    assert np.isnan(here.take(1)).any()
    assert f"{victim} changed while it ran" in last_misuse()
    check(cuda.cuStreamDestroy(other))


def test_nan_may_be_among_the_inputs(context: Any, make_card: Callable, model: Callable) -> None:
    """What lies in the rows that pad a batch may be anything."""
    onnx = model(make_card(), "float32")
    here = Engine(importlib.import_module("tensorrt"), make_plan(onnx, flavour="tensorrt"), tensor="input")
    assert here.context.set_input_shape("input", (2, 3, 48, 48))
    assert here.context.execute_async_v3(here.stream)  # on memory as it was born
    assert here.take(2).shape == (2, CLASSES)
    here.close()


@pytest.mark.misuse
def test_tensors_must_not_lie_in_the_scratch_memory(engine: Callable, image: Callable) -> None:
    here = engine()
    assert here.context.set_tensor_address("logits", here.memory["scratch"])
    here.give(image(1))
    assert here.context.execute_async_v3(here.stream)
    check(cuda.cuStreamSynchronize(here.stream))
    assert "lie upon each other" in last_misuse()


@pytest.mark.misuse
def test_tensors_outside_device_memory_are_a_fault_of_the_device(onnx: bytes, image: Callable) -> None:
    check(cuda.cuInit(0))
    check(cuda.cuCtxPushCurrent(check(cuda.cuDevicePrimaryCtxRetain(1))))
    here = Engine(importlib.import_module("tensorrt_rtx"), make_plan(onnx))
    assert here.context.set_input_shape("image", (8, *SHAPE))
    too_small = int(check(cuda.cuMemAlloc(100)))
    assert here.context.set_tensor_address("logits", too_small)
    assert here.context.execute_async_v3(here.stream)
    assert cuda.cuStreamSynchronize(here.stream)[0].name == "CUDA_ERROR_ILLEGAL_ADDRESS"
    del here
    check(cuda.cuCtxPopCurrent())
    check(cuda.cuDevicePrimaryCtxRelease(1))


@pytest.mark.misuse
def test_one_context_is_for_one_thread_at_a_time(engine: Callable, context: Any, image: Callable) -> None:
    here = engine()
    here.give(image(1))
    with here.context._entered:  # as if another thread were inside
        assert not here.context.execute_async_v3(here.stream)
    assert "another thread" in last_misuse()


@pytest.mark.misuse
def test_a_graph_needs_its_execution_context(engine: Callable, image: Callable) -> None:
    here = engine()
    here.give(image(1))
    check(cuda.cuStreamBeginCapture(here.stream, CAPTURE))
    assert here.context.execute_async_v3(here.stream)
    graph = check(cuda.cuStreamEndCapture(here.stream))
    executable = check(cuda.cuGraphInstantiate(graph, 0))
    check(cuda.cuGraphDestroy(graph))
    here.context = None
    check(cuda.cuGraphLaunch(executable, here.stream))
    check(cuda.cuStreamSynchronize(here.stream))
    assert "its context was destroyed" in last_misuse()
    check(cuda.cuGraphExecDestroy(executable))


@pytest.mark.misuse
def test_an_engine_belongs_to_its_device(engine: Callable, image: Callable) -> None:
    here = engine()
    here.give(image(1))
    check(cuda.cuCtxPushCurrent(check(cuda.cuDevicePrimaryCtxRetain(1))))
    assert not here.context.execute_async_v3(here.stream)
    check(cuda.cuCtxPopCurrent())
    check(cuda.cuDevicePrimaryCtxRelease(1))


@pytest.mark.misuse
def test_an_engine_must_not_outlive_the_cuda_context(onnx: bytes) -> None:
    trt = importlib.import_module("tensorrt_rtx")
    check(cuda.cuInit(0))
    check(cuda.cuCtxPushCurrent(check(cuda.cuDevicePrimaryCtxRetain(1))))
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(make_plan(onnx))
    check(cuda.cuCtxPopCurrent())
    check(cuda.cuDevicePrimaryCtxRelease(1))
    del engine
    assert "destroyed after the CUDA context" in last_misuse()


# What it refuses, as the real one does

REFUSED = {
    "no profile": (lambda c, e: setattr(c, "_profile", None), "Profile index must be set"),
    "no shape": (lambda c, e: c._shapes.clear(), "dimensions are not specified: image"),
    "no input address": (lambda c, e: c._addresses.pop("image"), "Address is not set for input tensor image"),
    "no output address": (lambda c, e: c._addresses.pop("logits"), "Address is not set for output tensor logits"),
    "no scratch": (lambda c, e: setattr(c, "_scratch", None), "setDeviceMemoryV2 should be called before"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_be_set_before_executing(engine: Callable, image: Callable, case: str) -> None:
    here = engine()
    here.give(image(1))
    forget, message = REFUSED[case]
    forget(here.context, here)
    assert not here.context.execute_async_v3(here.stream)
    assert message in here.log.lines[-1]


def test_what_cannot_be_set(engine: Callable) -> None:
    here = engine(profiles=[(1, 1, 1), (2, 4, 8)])
    context = here.context
    for refused in (
        lambda: context.set_input_shape("image", (2, *SHAPE)),
        lambda: context.set_input_shape("image", (1, 48, 48)),
        lambda: context.set_input_shape("image", (1, 3, 48, 48)),
        lambda: context.set_input_shape("nonsense", (1, *SHAPE)),
        lambda: context.set_input_shape("logits", (1, CLASSES)),
        lambda: context.set_optimization_profile_async(2, here.stream),
        lambda: context.set_optimization_profile_async(-1, here.stream),
        lambda: context.set_tensor_address("nonsense", here.memory["image"]),
        lambda: context.set_tensor_address("image", here.memory["image"] + 4),
    ):
        here.log.lines.clear()
        assert refused() is False
        assert [line.split()[0] for line in here.log.lines] == ["ERROR"]
    for memory, size in ((here.memory["scratch"], here.scratch_size - 1), (here.memory["scratch"] + 8, 1 << 30)):
        here.log.lines.clear()
        context.set_device_memory(memory, size)
        assert len(here.log.lines) == 1
    with pytest.raises(TypeError):
        context.set_input_shape("image", np.array([1, *SHAPE]))
    assert context.set_input_shape("image", [1, *SHAPE])
    assert context.set_optimization_profile_async(1, here.stream)
    assert context.infer_shapes() == ["image"]  # a profile begins with no shapes
    assert context.set_input_shape("image", (8, *SHAPE))
    assert context.get_tensor_shape("logits") == (8, CLASSES)


def test_what_the_engine_tells(engine: Callable) -> None:
    here = engine("tensorrt", profiles=[(1, 1, 1), (2, 4, 8)], scratch=4096)
    trt, told = here.trt, here.engine
    names = [told.get_tensor_name(index) for index in range(told.num_io_tensors)]
    assert names == ["image", "logits"]
    assert [told.get_tensor_mode(name) for name in names] == [trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT]
    assert [trt.nptype(told.get_tensor_dtype(name)) for name in names] == [np.uint8, np.float32]
    assert [told.get_tensor_shape(name) for name in names] == [(-1, *SHAPE), (-1, CLASSES)]
    assert told.num_optimization_profiles == 2
    assert told.get_tensor_profile_shape("image", 1) == [(2, *SHAPE), (4, *SHAPE), (8, *SHAPE)]
    assert told.device_memory_size_v2 == told.get_device_memory_size_for_profile_v2(1) == 4096
    assert not isinstance(told.get_tensor_shape("image"), tuple)  # the real Dims is none either


FULL, RTX, OLD = {"flavour": "tensorrt"}, {"flavour": "tensorrt_rtx"}, {"version": "10.1.0.1"}
COMPATIBLE = FULL | {"version_compatible": True}
# A plan's options, the module that is to load it, whether it may run host code; what it says, None when it loads.
LOADS: dict[str, tuple[dict[str, Any], str, bool, str | None]] = {
    "same": (FULL, "tensorrt", False, None),
    "another version": (FULL | OLD, "tensorrt", False, "expecting library version 11.4.0.106 got 10.1.0.1"),
    "of rtx": (RTX, "tensorrt", False, "not of this TensorRT"),
    "of the full one": (FULL, "tensorrt_rtx", False, "not of this TensorRT"),
    "this GPU": (RTX | {"compute_capability": "8.9"}, "tensorrt_rtx", False, None),
    "another GPU": (RTX | {"compute_capability": "12.0"}, "tensorrt_rtx", False, "compute 8.9 got compute 12.0"),
    "lean": (COMPATIBLE | OLD, "tensorrt_lean", True, None),
    "lean, not compatible": (FULL, "tensorrt_lean", True, "not of this TensorRT"),
    "host code forbidden": (COMPATIBLE, "tensorrt_lean", False, "engineHostCodeAllowed"),
    "older lean": (COMPATIBLE | {"version": "12.0.0.1"}, "tensorrt_lean", True, "please rebuild"),
}


@pytest.mark.parametrize("case", LOADS)
def test_which_plans_load_where(context: Any, onnx: bytes, case: str) -> None:
    options, module, allowed, message = LOADS[case]
    trt = importlib.import_module(module)
    log = Log(trt)
    runtime = trt.Runtime(log.logger)
    runtime.engine_host_code_allowed = allowed
    plan = make_plan(onnx, **options)
    engine = runtime.deserialize_cuda_engine(plan)
    assert (engine is None) == (message is not None)
    if message:
        assert message in log.lines[-1] and log.lines[-1].startswith("ERROR")
    if module == "tensorrt_rtx":
        validity, diagnostics = runtime.get_engine_validity(plan)
        assert validity is (trt.EngineValidity.INVALID if message else trt.EngineValidity.VALID)
        assert (diagnostics == 0) == (message is None)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_no_plan_does_not_load(context: Any, onnx: bytes, module: str) -> None:
    trt = importlib.import_module(module)
    log = Log(trt)
    runtime = trt.Runtime(log.logger)
    assert runtime.deserialize_cuda_engine(onnx) is None
    assert len(log.lines) == 1
    with pytest.raises(TypeError):
        runtime.deserialize_cuda_engine("text")


def test_the_gpu_may_be_another_one(context: Any, onnx: bytes) -> None:
    set_option("compute_capability", 120)
    trt = importlib.import_module("tensorrt_rtx")
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    assert runtime.deserialize_cuda_engine(make_plan(onnx, compute_capability="8.9")) is None
    assert runtime.deserialize_cuda_engine(make_plan(onnx, compute_capability="12.0")) is not None


def test_without_the_simulated_driver_it_crashes_as_the_real_one_does() -> None:
    code = "import tensorrt_rtx as t; t.Runtime(t.Logger())"
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "SystemError: real TensorRT would crash here" in done.stderr


# Layers


def test_the_inspector_and_the_profiler_name_the_same_layers(engine: Callable, image: Callable) -> None:
    here = engine()
    trt = here.trt

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = ms

    text = here.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    assert len(layers) == here.engine.num_layers
    here.context.profiler = profiler = Profiler()
    here.run(image(2))
    assert list(profiler.times) == [layer["Name"] for layer in layers]
    assert all(time > 0 for time in profiler.times.values())
    here.context.enqueue_emits_profile = False
    profiler.times.clear()
    here.run(image(2))
    assert not profiler.times
    assert here.context.report_to_profiler() and profiler.times


# Against the real modules

_DESCRIBE = """
import importlib, json, sys
sys.path[:0] = sys.argv[2:]
trt = importlib.import_module(sys.argv[1])
def describe(value):
    if isinstance(value, type):
        if hasattr(value, "__members__"):
            return {name: int(member) for name, member in value.__members__.items()}
        return {name: (getattr(getattr(value, name), "__doc__", "") or "") for name in dir(value)}
print(json.dumps({name: describe(getattr(trt, name)) for name in dir(trt)}))
"""


def _real(module: str) -> dict[str, Any]:
    """What the installed module has; the test is skipped where there is none."""
    ours = str(Path(__file__).parent / "modules")
    paths = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path != ours]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("LD_LIBRARY_PATH")
    done = subprocess.run([sys.executable, "-c", _DESCRIBE, module], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the real {module} is not installed")
    return json.loads(done.stdout)


def _parameters(docstring: str) -> set[str]:
    return set(re.findall(r"[(,] ?(\w+):", docstring)) - {"self"}


@pytest.mark.parametrize("module", MODULES)
def test_it_has_nothing_that_the_real_one_has_not(module: str) -> None:
    real, ours = _real(module), importlib.import_module(module)
    for name, value in vars(ours).items():
        if name.startswith("_") or name == "members":
            continue
        assert name in real
        if hasattr(value, "__members__"):
            assert {k: int(v) for k, v in value.__members__.items()}.items() <= real[name].items()
        elif isinstance(value, type) and name != "Dims":
            _same_methods(value, real[name])


def _same_methods(ours: type, real: dict[str, str]) -> None:
    for name in dir(ours):
        method = getattr(ours, name)
        if name.startswith("_") or name == "Severity":
            continue
        assert name in real, f"{ours.__name__}.{name}"
        if callable(method) and not isinstance(method, type) and real[name]:
            code = getattr(method, "__wrapped__", method).__code__
            parameters = set(code.co_varnames[1 : code.co_argcount])
            assert parameters <= _parameters(real[name]), f"{ours.__name__}.{name}"


def test_versions_are_those_of_the_packages_beside_it() -> None:
    from importlib.metadata import version

    for module in MODULES:
        assert importlib.import_module(module).__version__ == version(module.replace("_", "-")) == VERSIONS[module]
