"""What the device can do at best, measured on this machine: a large matrix product, and copying memory.

The product runs on the very engine that runs the model, in the model's precision, so that a model's share of it says
what the model's shapes and the engine's kernels cost, and not what another library would have made of them. (Integers
for OpenVINO are multiplied by ONNX Runtime: OpenVINO's matrix product of them is slower than its convolutions.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from rxdeploy import atomic
from rxdeploy.bench.datasheet import DATASHEETS, Arithmetic, Datasheet
from rxdeploy.bench.measure import fastest, timer
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.builder import build_plan
from rxdeploy.engines.bundle import Bundle, Precision, Tensor
from rxdeploy.engines.flavours import FLAVOURS
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions, Profile
from rxdeploy.errors import EnvironmentLacks, RxDeployError, missing_module
from rxdeploy.runtime import openvino
from rxdeploy.runtime.arrays import device_view
from rxdeploy.runtime.cuda import Gpu
from rxdeploy.runtime.lanes import PlanEngine
from rxdeploy.runtime.onnxrt import CPU, CUDA, open_session
from rxdeploy.runtime.openvino import OpenVinoEngine
from rxdeploy.runtime.session import Session

# Of what goes into the product and comes out; an int8 plan's is float16 between its layers.
_DTYPES: dict[Precision, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16, "int8": np.float16}
_SIDE_CPU, _SIDE_GPU = 2048, 8192  # of the square matrices
_COPY_GPU = 1 << 30  # bytes
_COPY_CPU = 128 << 20  # bytes at least, and 4 times the caches


@dataclass(frozen=True)
class Figure:
    """A measured figure and how it was measured; None, and why not."""

    value: float | None
    how: str


@dataclass(frozen=True)
class Peaks:
    """The device's limits: `compute` in floating-point operations a second, `bandwidth` in bytes a second.

    `arithmetic` is what the engine computes the model in, which decides the datasheet's figure; `datasheet` is None
    for a CPU and for a GPU that is not listed.
    """

    arithmetic: Arithmetic
    compute: Figure
    bandwidth: Figure
    datasheet: Datasheet | None

    @property
    def datasheet_compute(self) -> float | None:
        """The datasheet's operations a second in this arithmetic."""
        return self.datasheet.peak(self.arithmetic) if self.datasheet else None


class Prober:
    """Measures the limits of the device that `session` runs on, as often as asked, and keeps the best.

    Once would not do: clocks and neighbours change while a benchmark runs, and a model faster than its device's peak
    says nothing. What cannot be measured is None with the reason, which is no error. `ordinal` is the GPU's number.
    """

    def __init__(self, session: Session, ordinal: int) -> None:
        precision = arithmetic(session)
        self._held = ExitStack()
        self._openers = (partial(_product, session, ordinal, precision, self._held), partial(_copying, session))
        self._probes: tuple[_Probe, ...] = ()
        self._best: list[float | None] = [None, None]
        self._arithmetic: Arithmetic = precision
        self._datasheet = DATASHEETS.get(device_name(session, ordinal))

    def measure(self) -> Peaks:
        """The best so far, this time included; it takes a second or so, the first time on a GPU longer."""
        self._probes = self._probes or tuple(map(_opened, self._openers))
        figures = [self._measure(index, probe) for index, probe in enumerate(self._probes)]
        return Peaks(self._arithmetic, figures[0], figures[1], self._datasheet)

    def _measure(self, index: int, probe: _Probe) -> Figure:
        if probe.rate is None:
            return Figure(None, probe.how)
        try:
            self._best[index] = max(probe.rate(), self._best[index] or 0.0)
        except (RxDeployError, MemoryError) as error:
            return Figure(self._best[index], probe.how if self._best[index] else _why_not(error))
        return Figure(self._best[index], probe.how)

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


@dataclass(frozen=True)
class _Probe:
    """Measures something a second; None, and `how` says why not."""

    rate: Callable[[], float] | None
    how: str


def _opened(probe: Callable[[], _Probe]) -> _Probe:
    try:
        return probe()
    except (RxDeployError, MemoryError) as error:
        return _Probe(None, _why_not(error))


def _why_not(error: Exception) -> str:
    return f"not measured: {str(error) or 'there is not enough memory'}"


def device_name(session: Session, ordinal: int) -> str:
    """The GPU's name as the driver gives it; "CPU"."""
    return "CPU" if session.device == "cpu" else find_driver().gpus[ordinal].name


# The matrix product


def arithmetic(session: Session) -> Precision:
    """What the session computes its model in: of an int8 model, ONNX Runtime may compute in float between Q/DQ."""
    manifest = session.bundle.manifest
    if manifest.precision != "int8" or session.device == "tensorrt":
        return manifest.precision
    if session.device == "cuda":
        return "fp32" if manifest.for_integers else "fp16"
    return "int8" if manifest.for_integers else "fp32"


def product_model(precision: Precision, side: int, on_cpu: bool = False) -> bytes:
    """An ONNX model ``c = a @ b`` of square matrices; `b` is a constant, as a model's weights are.

    In int8, `on_cpu` multiplies uint8 `a` by int8 `b` to int32; otherwise Q/DQ nodes stand around a float16 product,
    as TensorRT takes them.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    make, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    dtypes = [np.dtype(_DTYPES[precision])] * 2
    nodes = [make("MatMul", ["a", "b"], ["c"], name="product")]
    constants = [array(_matrix(side, np.dtype(np.int8) if precision == "int8" else dtypes[0]), "b")]
    if precision == "int8" and on_cpu:
        dtypes = [np.dtype(np.uint8), np.dtype(np.int32)]
        nodes = [make("MatMulInteger", ["a", "b"], ["c"], name="product")]
    elif precision == "int8":
        constants += [array(np.asarray(1 / 127, np.float16), "scale"), array(np.asarray(0, np.int8), "zero")]
        nodes = [
            make("QuantizeLinear", ["a", "scale", "zero"], ["a8"]),
            make("DequantizeLinear", ["a8", "scale", "zero"], ["a16"]),
            make("DequantizeLinear", ["b", "scale", "zero"], ["b16"]),
            make("MatMul", ["a16", "b16"], ["c"], name="product"),
        ]
    elements = map(onnx.helper.np_dtype_to_tensor_dtype, dtypes)
    tensors = [
        onnx.helper.make_tensor_value_info(name, element, [side, side])
        for name, element in zip("ac", elements, strict=True)
    ]
    graph = onnx.helper.make_graph(nodes, "product", tensors[:1], tensors[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def _matrix(side: int, dtype: np.dtype) -> NDArray:
    random = np.random.default_rng(0)
    if np.issubdtype(dtype, np.integer):
        return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (side, side), dtype, endpoint=True)
    return random.uniform(-1, 1, (side, side)).astype(dtype)


def _product(session: Session, ordinal: int, precision: Precision, held: ExitStack) -> _Probe:
    """Operations a second of the product; what it needs is put into `held`."""
    side = _SIDE_CPU if session.device == "cpu" else _SIDE_GPU
    if session.device == "tensorrt":
        timed, where = _plan_product(session, precision, side, held)
    elif isinstance(session.engine, OpenVinoEngine) and precision != "int8":
        timed, where = _openvino_product(precision, side)
    else:
        timed, where = _onnx_product(session.device, ordinal, precision, side)
    how = f"best of several {side} x {side} x {side} products in {precision} {where}"
    return _Probe(lambda: 2 * side**3 / fastest(timed), how)


def _onnx_product(device: str, ordinal: int, precision: Precision, side: int) -> tuple[Callable[[], float], str]:
    on_cpu = device == "cpu"
    opened = open_session(product_model(precision, side, on_cpu), CPU if on_cpu else CUDA, ordinal)
    matrix = _matrix(side, np.dtype(np.uint8 if precision == "int8" else _DTYPES[precision]))
    if on_cpu:
        aside = ", which computes float16 in float32 on most CPUs" if precision == "fp16" else ""
        return timer(lambda: opened.run(["c"], {"a": matrix})), f"on ONNX Runtime{aside}"
    import onnxruntime

    binding = opened.io_binding()
    binding.bind_ortvalue_input("a", onnxruntime.OrtValue.ortvalue_from_numpy(matrix, "cuda", ordinal))
    binding.bind_output("c", "cuda", ordinal)

    def product() -> None:
        opened.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return timer(product), "on ONNX Runtime"


def _openvino_product(precision: Precision, side: int) -> tuple[Callable[[], float], str]:
    compiled = openvino.compile_model(openvino.read_model(product_model(precision, side)))
    run, matrix = openvino.Requests(compiled, 1).run, _matrix(side, np.dtype(_DTYPES[precision]))
    aside = ", which computes float16 in float32 here" if precision == "fp16" else ""
    return timer(lambda: run(matrix)), f"on OpenVINO{aside}"


def _plan_product(
    session: Session, precision: Precision, side: int, held: ExitStack
) -> tuple[Callable[[], float], str]:
    """The product as a plan; by PyTorch where this TensorRT runs plans but builds none."""
    manifest, gpu = session.bundle.manifest, session.gpu
    assert gpu is not None
    flavour = next(flavour for flavour in FLAVOURS if flavour.name == manifest.target.name)
    if flavour.version() is None:
        return _torch_product(gpu, precision, side), f"by PyTorch, as {flavour.name}'s builder is not installed"
    with gpu.current():
        plan = build_plan(product_model(precision, side), flavour, EngineOptions((Profile(side, side, side),)))
    with atomic.scratch_folder("bench") as folder:
        (folder / bundles.PLAN).write_bytes(plan.data)
        engine = PlanEngine(_product_bundle(session.bundle, gpu, folder, side, plan.facts), gpu, lanes=1)
    held.callback(engine.close)
    return _timed_plan(engine, gpu, _matrix(side, np.dtype(_DTYPES[precision]))), "as a plan"


def _product_bundle(bundle: Bundle, gpu: Gpu, folder: Path, side: int, facts: dict[str, object]) -> Bundle:
    """The bundle with the product for its model, as far as running a plan needs one."""
    dtype = np.dtype(_DTYPES[bundle.manifest.precision]).name
    inputs, outputs = ((Tensor(name=name, dtype=dtype, layout="", shape=(None, side)),) for name in ("a", "c"))
    target = msgspec.structs.replace(bundle.manifest.target, gpu=gpu.name)
    manifest = msgspec.structs.replace(bundle.manifest, target=target, inputs=inputs, outputs=outputs, engine=facts)
    return Bundle(
        folder, msgspec.structs.replace(manifest, files={bundles.PLAN: bundles.file_digest(folder / bundles.PLAN)})
    )


def _timed_plan(engine: PlanEngine, gpu: Gpu, matrix: NDArray) -> Callable[[], float]:
    """Seconds on the device of one run with arrays there."""
    stream, begin, end = gpu.stream(), gpu.event(timing=True), gpu.event(timing=True)
    a, c = gpu.empty(matrix.shape, matrix.dtype), gpu.empty(matrix.shape, matrix.dtype)
    a.fill(matrix)
    with gpu.current():
        source, target = (device_view(array, "matrix", stream.handle, gpu) for array in (a, c))

    def timed() -> float:
        stream.record(begin)
        engine.run(source, target, stream.handle)
        stream.record(end)
        stream.synchronize()
        return end.seconds_since(begin)

    return timed


def _torch_product(gpu: Gpu, precision: Precision, side: int) -> Callable[[], float]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    if precision == "int8":
        raise EnvironmentLacks("PyTorch has no public int8 product")
    torch.backends.cuda.matmul.allow_tf32 = False  # nothing here rounds float32 to it
    a = torch.rand((side, side), device=f"cuda:{gpu.ordinal}", dtype=getattr(torch, np.dtype(_DTYPES[precision]).name))

    def product() -> None:
        torch.matmul(a, a)
        torch.cuda.synchronize(gpu.ordinal)

    return timer(product)


# Memory


def _copying(session: Session) -> _Probe:
    """Bytes a second, read and written, of copying memory."""
    if session.device == "cpu":
        return _copying_on_host()
    if session.gpu is None:
        return _Probe(None, "not measured: that needs cuda-python; pip install 'rxdeploy[gpu]' adds it")
    gpu = session.gpu
    size = min(_COPY_GPU, gpu.free_memory() // 4)
    how = f"best of several copies of {size >> 20} MiB on the device, read and written"
    return _Probe(lambda: 2 * size / _fastest_device_copy(gpu, size), how)


def _copying_on_host() -> _Probe:
    """Every core copies its own part of an array far larger than the caches."""
    threads = len(os.sched_getaffinity(0))
    part = min(max(_COPY_CPU, 4 * _cache_bytes()), _memory_bytes() // 8) // threads

    def rate() -> float:
        parts = [(np.ones(part, np.uint8), np.zeros(part, np.uint8)) for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            # NumPy copies without holding the GIL.
            copy = timer(lambda: list(pool.map(lambda arrays: np.copyto(arrays[1], arrays[0]), parts)))
            return 2 * part * threads / fastest(copy)

    size = part * threads >> 20
    return _Probe(rate, f"best of several copies of {size} MiB by {threads} thread(s), read and written")


def _fastest_device_copy(gpu: Gpu, size: int) -> float:
    """Seconds. The memory is held only meanwhile."""
    source, target, stream = gpu.allocate(size), gpu.allocate(size), gpu.stream()
    begin, end = gpu.event(timing=True), gpu.event(timing=True)

    def timed() -> float:
        with gpu.current():
            stream.record(begin)
            gpu.copy(target.pointer, source.pointer, size, stream.handle)
            stream.record(end)
        stream.synchronize()
        return end.seconds_since(begin)

    try:
        return fastest(timed)
    finally:
        for owned in (source, target, stream, begin, end):
            owned.close()


def _cache_bytes() -> int:
    """All caches from level 2 on of the cores this process may use, as Linux tells; 0 where it does not."""
    found: dict[tuple[str, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        for cache in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            level, shared, size = (
                (cache / fact).read_text().strip() if (cache / fact).exists() else ""
                for fact in ("level", "shared_cpu_list", "size")
            )
            if level not in ("", "1") and size.endswith("K"):
                found[level, shared] = int(size[:-1]) << 10
    return sum(found.values())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
