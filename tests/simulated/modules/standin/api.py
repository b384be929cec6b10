"""The classes of TensorRT's Python interface that running a plan takes, with the names and checks they really have."""

from __future__ import annotations

import functools
import json
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from standin.driver import check, misuse, option, simulated
from standin.enums import (
    CudaGraphStrategy,
    DataType,
    DynamicShapesKernelSpecializationStrategy,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ExecutionContextAllocationStrategy,
    LayerInformationFormat,
    ProfilingVerbosity,
    Severity,
    TensorIOMode,
)
from standin.kernel import Buffer, Kernel, enqueue
from standin.plan import VERSIONS, read_plan

ALIGNMENT = 256  # bytes, of tensors and scratch memory
_TYPES = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(uint8)": DataType.UINT8,
    "tensor(int8)": DataType.INT8,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(bool)": DataType.BOOL,
}


def nptype(trt_type: DataType) -> type:
    """The NumPy type of a DataType; TypeError where there is none."""
    names = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool_", "FP8": "", "BF16": ""}
    name = names.get(trt_type.name, trt_type.name.lower())
    if not name:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return getattr(np, name)


def volume(iterable: Any) -> int:
    """The product of the elements."""
    result = 1
    for element in iterable:
        result *= element
    return result


class Dims(Sequence):
    """A shape. It is no tuple, but equals one."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self._shape = tuple(int(size) for size in shape)

    def __getitem__(self, index: Any) -> Any:
        return self._shape[index]

    def __len__(self) -> int:
        return len(self._shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | tuple | Dims) and self._shape == tuple(other)

    def __repr__(self) -> str:
        return repr(self._shape)


class ILogger:
    """Must be subclassed, with `log` overridden and this __init__ called."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Severity, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::ILogger::log"')


class Logger(ILogger):
    """Writes to stdout."""

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: Severity, msg: str) -> None:
        if severity <= self.min_severity:
            print(f"[TRT] [{severity.name}] {msg}")


class IProfiler:
    """Must be subclassed, with `report_layer_time` overridden."""

    def __init__(self) -> None:
        self._made = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::IProfiler::reportLayerTime"')


def _instance(value: Any, kind: type, what: str) -> None:
    """pybind11's TypeError, also for a subclass that never called the base's __init__."""
    if not isinstance(value, kind) or not getattr(value, "_made", True):
        raise TypeError(f"{what}: incompatible function arguments. {kind.__name__} expected, not {value!r}")


def _device() -> int | None:
    """The device of the current context."""
    from cuda.bindings import driver

    status, device = driver.cuCtxGetDevice()
    return None if int(status) else int(device)


class _DeviceMemory:
    """Memory that TensorRT allocates for itself; it is freed with its owner."""

    def __init__(self, owner: object, size: int) -> None:
        from cuda.bindings import driver

        self.pointer = int(check(driver.cuMemAlloc(size)))
        self.size = size
        context, device = check(driver.cuCtxGetCurrent()), check(driver.cuCtxGetDevice())
        weakref.finalize(owner, _free, type(owner).__name__, context, device, self.pointer).atexit = False


def _free(owner: str, context: Any, device: Any, pointer: int) -> None:
    from cuda.bindings import driver

    _, active = check(driver.cuDevicePrimaryCtxGetState(device))
    if not active:
        misuse(owner, "destroyed after the CUDA context that it lives in")
        return
    check(driver.cuCtxPushCurrent(context))
    driver.cuMemFree(pointer)
    driver.cuCtxPopCurrent()


class Runtime:
    """Loads plans. The real one crashes where there is no driver."""

    _flavour = "tensorrt"

    @property
    def _engine(self) -> type[ICudaEngine]:
        return ICudaEngine

    def __init__(self, logger: ILogger) -> None:
        try:
            simulated()
        except OSError:
            raise SystemError("real TensorRT would crash here") from None
        _instance(logger, ILogger, "Runtime.__init__()")
        self.logger = logger
        self.engine_host_code_allowed = False
        self.max_threads = 1

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        memoryview(serialized_engine)  # TypeError, as the real one's, for what is no buffer
        if _device() is None:
            misuse("deserialize_cuda_engine", "no current context: the engine would go to device 0")
            return None
        try:
            header, onnx = read_plan(serialized_engine)
        except ValueError:
            return self._refuse("Error Code 1: Serialization (magic tag does not match)")
        for _, problem in self._problems(header):
            return self._refuse(f"Error Code 6: API Usage Error ({problem})")
        return self._engine(self, header, onnx)

    def _refuse(self, text: str) -> None:
        self.logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: {text}")

    def _problems(self, header: dict[str, Any]) -> Iterator[tuple[EngineInvalidityDiagnostics, str]]:
        version, capability = VERSIONS[self._flavour], option("compute_capability")
        here = f"{capability // 10}.{capability % 10}"
        lean = self._flavour == "tensorrt_lean"
        same = header["flavour"] == ("tensorrt" if lean else self._flavour)
        if not same or (lean and not header["version_compatible"]):
            yield EngineInvalidityDiagnostics.MALFORMED_ENGINE, "the plan is not of this TensorRT"
        elif _numbers(header["version"]) > _numbers(version) or (
            header["version"] != version and not header["version_compatible"]
        ):
            yield (
                EngineInvalidityDiagnostics.VERSION_MISMATCH,
                "The engine plan file is not compatible with this version of TensorRT, "
                f"expecting library version {version} got {header['version']}, please rebuild.",
            )
        if header["version_compatible"] and not self.engine_host_code_allowed:
            yield EngineInvalidityDiagnostics.VERSION_MISMATCH, "engineHostCodeAllowed must be set for such a plan"
        if header["compute_capability"] not in (None, here):
            yield (
                EngineInvalidityDiagnostics.UNSUPPORTED_CC,
                "The engine plan file is generated on an incompatible device, "
                f"expecting compute {here} got compute {header['compute_capability']}, please rebuild.",
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class RtxRuntime(Runtime):
    """What TensorRT-RTX has beyond that."""

    _flavour = "tensorrt_rtx"

    @property
    def _engine(self) -> type[ICudaEngine]:
        return RtxCudaEngine

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        try:
            header, _ = read_plan(buffer)
        except ValueError:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        diagnostics = 0
        for diagnostic, _ in self._problems(header):
            diagnostics |= int(diagnostic)
        return EngineValidity.INVALID if diagnostics else EngineValidity.VALID, diagnostics


class LeanRuntime(Runtime):
    _flavour = "tensorrt_lean"


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        _instance(strategy, ExecutionContextAllocationStrategy, "set_execution_context_allocation_strategy()")
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        return self._strategy


class IRuntimeCache:
    """What TensorRT-RTX has compiled; here nothing is."""


class RtxRuntimeConfig(IRuntimeConfig):
    """With TensorRT-RTX's properties, which take nothing but their own enumerations."""

    _cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        _instance(cache, IRuntimeCache, "set_runtime_cache()")
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache

    _cuda_graph = CudaGraphStrategy.DISABLED
    _specialization = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def cuda_graph_strategy(self) -> CudaGraphStrategy:
        return self._cuda_graph

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: CudaGraphStrategy) -> None:
        _instance(strategy, CudaGraphStrategy, "cuda_graph_strategy")
        self._cuda_graph = strategy

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> DynamicShapesKernelSpecializationStrategy:
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(
        self, strategy: DynamicShapesKernelSpecializationStrategy
    ) -> None:
        _instance(strategy, DynamicShapesKernelSpecializationStrategy, "dynamic_shapes_kernel_specialization_strategy")
        self._specialization = strategy


class ICudaEngine:
    """A loaded plan: made by Runtime.deserialize_cuda_engine only."""

    @property
    def _context(self) -> type[IExecutionContext]:
        return IExecutionContext

    def __init__(self, runtime: Runtime, header: dict[str, Any], onnx: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._runtime, self._header = runtime, header
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._inputs = {tensor.name: tensor for tensor in self._session.get_inputs()}
        self._tensors = self._inputs | {tensor.name: tensor for tensor in self._session.get_outputs()}
        self._device = _device()
        self._weights = _DeviceMemory(self, len(onnx))

    def _log(self, text: str, severity: Severity = Severity.ERROR) -> None:
        self._runtime.logger.log(severity, text)

    @property
    def name(self) -> str:
        return "Unnamed Network 0"

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return len(self._header["layers"])

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def num_aux_streams(self) -> int:
        return 0

    @property
    def profiling_verbosity(self) -> ProfilingVerbosity:
        return ProfilingVerbosity.DETAILED

    @property
    def device_memory_size_v2(self) -> int:
        return self._header["scratch"]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._header["scratch"] if 0 <= profile_index < self.num_optimization_profiles else 0

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        if name not in self._tensors:
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self._tensors[name].type]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims([size if isinstance(size, int) else -1 for size in self._tensors[name].shape])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if name not in self._inputs or not 0 <= profile_index < self.num_optimization_profiles:
            self._log(f"getProfileShape: no input {name} or no profile {profile_index}")
            return [Dims()] * 3
        rest = self.get_tensor_shape(name)[1:]
        return [Dims((batch, *rest)) for batch in self._header["profiles"][profile_index]]

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> IExecutionContext:
        if isinstance(strategy, IRuntimeConfig):
            strategy = strategy.get_execution_context_allocation_strategy()
        _instance(strategy, ExecutionContextAllocationStrategy, "create_execution_context()")
        return self._context(self, strategy)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class RtxCudaEngine(ICudaEngine):
    @property
    def _context(self) -> type[IExecutionContext]:
        return RtxExecutionContext

    def create_runtime_config(self) -> IRuntimeConfig:
        return RtxRuntimeConfig()


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self.execution_context: IExecutionContext | None = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        layers = self._engine._header["layers"]
        if format is LayerInformationFormat.ONELINE:
            return "".join(f"{layer['Name']}\n" for layer in layers)
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._tensors)})

    def get_layer_information(self, layer_index: int, format: LayerInformationFormat) -> str:
        layer = self._engine._header["layers"][layer_index]
        return layer["Name"] if format is LayerInformationFormat.ONELINE else json.dumps(layer)


def _exclusive(method: Callable) -> Callable:
    """A context is not thread-safe: two calls at once are misuse."""

    @functools.wraps(method)
    def call(self: IExecutionContext, *arguments: Any) -> Any:
        if not self._entered.acquire(blocking=False):
            misuse(method.__name__, "another thread is using this execution context")
            return False
        try:
            return method(self, *arguments)
        finally:
            self._entered.release()

    return call


class IExecutionContext:
    """Executes an engine: made by ICudaEngine.create_execution_context only."""

    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self.engine = engine
        self.enqueue_emits_profile = True
        self.name = "Unnamed Execution Context"
        self._profiler: IProfiler | None = None
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._entered, self._busy, self._running = threading.Lock(), threading.Lock(), 0
        self._seconds: float | None = None  # the latest execution's time on the device
        self._user_managed = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        size = engine._header["scratch"]
        self._scratch: tuple[int, int] | None = None if self._user_managed and size else (0, 0)
        if size and not self._user_managed:
            own = _DeviceMemory(self, size)
            self._scratch = own.pointer, own.size

    @property
    def active_optimization_profile(self) -> int:
        return -1 if self._profile is None else self._profile

    @property
    def profiler(self) -> IProfiler | None:
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: IProfiler) -> None:
        _instance(profiler, IProfiler, "profiler")
        self._profiler = profiler

    def _refuse(self, text: str) -> bool:
        self.engine._log(f"IExecutionContext::{text}")
        return False

    @_exclusive
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse(
                f"setOptimizationProfileAsync: Error Code 3: API Usage Error (profile index {profile_index} is not one "
                f"of {self.engine.num_optimization_profiles})"
            )
        if _capturing(stream_handle):
            return self._refuse("setOptimizationProfileAsync: the stream is capturing")
        if profile_index != self._profile:
            self._shapes.clear()
        self._profile = profile_index
        return True

    @_exclusive
    def set_input_shape(self, name: str, shape: Any) -> bool:
        if not isinstance(shape, tuple | list | Dims):
            raise TypeError("set_input_shape(): incompatible function arguments")
        shape = tuple(int(size) for size in shape)
        if name not in self.engine._inputs:
            return self._refuse(f"setInputShape: Error Code 3: API Usage Error (there is no input tensor {name})")
        if self._profile is None:
            return self._refuse("setInputShape: Error Code 3: API Usage Error (Profile index must be set)")
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(smallest) or any(
            not low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        ):
            return self._refuse(
                f"setInputShape: Error Code 3: API Usage Error (Set dimensions {shape} of tensor {name} do not satisfy "
                f"profile {self._profile}. Valid range is {smallest} to {largest})"
            )
        self._shapes[name] = shape
        return True

    @_exclusive
    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._tensors:
            return self._refuse(f"setTensorAddress: Error Code 3: API Usage Error (there is no tensor {name})")
        if memory % ALIGNMENT:
            return self._refuse(f"setTensorAddress: {name} must be aligned on {ALIGNMENT} bytes")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    @_exclusive
    def set_device_memory(self, memory: int, size: int) -> None:
        needed = self.engine.device_memory_size_v2
        if self._profile is not None:
            needed = self.engine.get_device_memory_size_for_profile_v2(self._profile)
        problem = None
        if not self._user_managed:
            problem = "Context not created with user managed device memory, cannot set buffer"
        elif memory % ALIGNMENT:
            problem = f"memory must be aligned on {ALIGNMENT} byte boundary"
        elif size < needed:
            problem = f"The provided memory size is too small. Provided {size} bytes, need {needed}"
        if problem:
            self._refuse(f"setDeviceMemoryV2: {problem}")
        else:
            self._scratch = int(memory), int(size)

    def get_tensor_shape(self, name: str) -> Dims:
        if name in self.engine._inputs:
            return Dims(self._shapes.get(name, self.engine.get_tensor_shape(name)))
        batch = next(iter(self._shapes.values()))[0] if self._shapes else -1
        return Dims([batch if size < 0 else size for size in self.engine.get_tensor_shape(name)])

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine._inputs if name not in self._shapes]

    @_exclusive
    def execute_async_v3(self, stream_handle: int) -> bool:
        if problem := self._not_ready():
            return self._refuse(f"enqueueV3: Error Code 3: API Usage Error ({problem})")
        if stream_handle == 0:
            self.engine._log("Using default stream in enqueueV3() may lead to performance issues", Severity.WARNING)
        captured = _capturing(stream_handle)
        assert self._scratch is not None and self._profile is not None
        batch = next(iter(self._shapes.values()))[0]
        header = self.engine._header
        kernel = Kernel(
            weakref.ref(self),
            self.engine._session,
            [self._buffer(name) for name in self.engine._inputs],
            [self._buffer(name) for name in self.engine._tensors if name not in self.engine._inputs],
            self._scratch,
            self._profile,
            (header["us_per_batch"] + header["us_per_image"] * batch) / 1e6,
            captured,
        )
        if not enqueue(kernel, stream_handle):
            return self._refuse("enqueueV3: Error Code 1: Cuda Runtime")
        if self._profiler and self.enqueue_emits_profile and not captured:
            from cuda.bindings import driver

            driver.cuStreamSynchronize(stream_handle)
            self._report()
        return True

    def _not_ready(self) -> str | None:
        """What must be set first."""
        if self._profile is None:
            return "Profile index must be set"
        if missing := self.infer_shapes():
            return f"Following input tensors' dimensions are not specified: {', '.join(missing)}"
        for name in self.engine._tensors:
            if not self._addresses.get(name):
                kind = "input" if name in self.engine._inputs else "output"
                return f"Address is not set for {kind} tensor {name}"
        if self._scratch is None:
            return "IExecutionContext::setDeviceMemoryV2 should be called before enqueue/execute"
        if self._scratch[1] < self.engine.get_device_memory_size_for_profile_v2(self._profile):
            return "the provided memory size is too small"
        if _device() != self.engine._device:
            misuse("execute_async_v3", "the current context is not that of the engine's device")
            return "the engine belongs to another device"
        return None

    def _buffer(self, name: str) -> Buffer:
        shape = tuple(self.get_tensor_shape(name))
        return Buffer(name, self._addresses[name], shape, nptype(self.engine.get_tensor_dtype(name)))

    def report_to_profiler(self) -> bool:
        return self._report() if self._profiler and not self.enqueue_emits_profile else False

    def _report(self) -> bool:
        if self._seconds is None or self._profiler is None:
            return False
        layers = self.engine._header["layers"]
        for layer in layers:
            self._profiler.report_layer_time(layer["Name"], self._seconds * 1e3 / len(layers))
        return True


class RtxExecutionContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return True


def _capturing(stream: int) -> bool:
    from cuda.bindings import driver

    return int(check(driver.cuStreamIsCapturing(stream))) != 0


_COMMON = (
    *(DataType, Dims, ExecutionContextAllocationStrategy, ICudaEngine, IExecutionContext, ILogger, IProfiler),
    *(IRuntimeConfig, EngineInspector, LayerInformationFormat, Logger, ProfilingVerbosity, Runtime, TensorIOMode),
    *(nptype, volume),
)
_RTX = (CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy, EngineInvalidityDiagnostics, EngineValidity)
_RTX_CLASSES = {
    "Runtime": RtxRuntime,
    "ICudaEngine": RtxCudaEngine,
    "IExecutionContext": RtxExecutionContext,
    "IRuntimeConfig": RtxRuntimeConfig,
}


def members(module: str) -> dict[str, Any]:
    """What `module` consists of: "tensorrt", "tensorrt_lean" or "tensorrt_rtx"."""
    names: dict[str, Any] = {each.__name__: each for each in _COMMON}
    if module == "tensorrt_rtx":
        names |= {each.__name__: each for each in _RTX} | _RTX_CLASSES
    if module == "tensorrt_lean":
        names["Runtime"] = LeanRuntime
    return names | {"__version__": VERSIONS[module], "float32": DataType.FLOAT, "uint8": DataType.UINT8}
