"""ONNX Runtime: one way to open a session and to run it, for the runtime and for validation."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, CpuSettings
from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import CheckFailed, EnvironmentLacks, first_line, missing_module
from rxdeploy.runtime.arrays import Array, DeviceView, part_of
from rxdeploy.runtime.cuda import DeviceArray, Gpu
from rxdeploy.runtime.inputs import ModelTensor, check_model
from rxdeploy.runtime.opening import in_its_own_thread
from rxdeploy.runtime.shares import LARGEST, Compute, SharedOut, Shares, callers_at_once

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
# Images that are computed at once; of more, the activations take memory.
_LARGEST = {"cpu": LARGEST, "cuda": 256}

# Before, QuantizeLinear of float16 truncates on a CPU instead of rounding (ONNX Runtime's pull request 32452).
_ROUNDS_FLOAT16 = (1, 30)

# TF32 would round float32 convolutions to 10 bits of mantissa, which is no float32 any more.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0"}}


def available_providers() -> list[str]:
    """CPU, and CUDA where this ONNX Runtime has it and there is a GPU; whether it starts, only a session tells."""
    here = import_onnxruntime().get_available_providers()
    return [CPU] if CUDA not in here or find_driver().problem else [CPU, CUDA]


def open_session(
    model: Path | bytes,
    provider: str = CPU,
    ordinal: int = 0,
    profile: Path | None = None,
    settings: CpuSettings | None = None,
    integers: bool = True,
    name: object = None,
) -> Any:
    """An `onnxruntime.InferenceSession` on one provider.

    `ordinal` is the GPU's number; of `settings`, what one session has is followed; with `profile`, ONNX Runtime
    writes its profile to a file beginning so. Without `integers`, Q/DQ nodes round and everything between them is
    computed in floating point, which is what a model quantised for TensorRT means: ONNX Runtime's own integer kernels
    saturate on signed activations where a CPU has no VNNI. Of such a model, float16 tensors are quantised in other
    steps where this ONNX Runtime would truncate them. `name` is what errors call a model given as bytes.

    EnvironmentLacks when the provider is not here: ONNX Runtime itself would fall back to the CPU without a
    word; or when it does not round, and the package onnx is not there to help. CheckFailed when it cannot load the
    model.
    """
    ort = import_onnxruntime()
    if provider not in ort.get_available_providers():
        raise EnvironmentLacks(f"this ONNX Runtime has no {provider}; pip install 'rxdeploy[gpu]' adds CUDA's")
    if provider == CUDA:
        if problem := find_driver().problem:
            raise EnvironmentLacks(f"ONNX Runtime's {provider} needs a GPU: {problem}")
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # the CUDA libraries that came as Python packages
    settings = settings or CpuSettings()
    options = _options(ort, settings)
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    provider_options = _PROVIDER_OPTIONS[provider] | ({"device_id": str(ordinal)} if provider == CUDA else {})
    # Its fallback would go on with another provider, now or after a failed run, and say so on stdout.
    providers: dict[str, Any] = {"providers": [(provider, provider_options)], "enable_fallback": 0}
    truncates = provider == CPU and not integers and tuple(map(int, ort.__version__.split(".")[:2])) < _ROUNDS_FLOAT16
    try:
        read = _rounded(model, ort.__version__) if truncates else model
        source = read if isinstance(read, bytes) else str(read)
        create = partial(ort.InferenceSession, source, options, **providers)
        session = in_its_own_thread(create) if settings.denormals_as_zero else create()
    except EnvironmentLacks:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        if provider == CUDA and type(error).__name__ == "EPFail":
            raise EnvironmentLacks(f"ONNX Runtime's {provider} does not start here: {first_line(error)}") from None
        what = name or ("the model" if isinstance(model, bytes) else model)
        raise CheckFailed(f"ONNX Runtime cannot load {what}: {first_line(error)}") from None
    if session.get_providers()[0] != provider:
        raise EnvironmentLacks(
            f"ONNX Runtime's {provider} does not start here, its CUDA libraries are missing or of another version; "
            "pip install -U 'rxdeploy[gpu]' brings them"
        )
    return session


def _rounded(model: Path | bytes, version: str) -> bytes:
    """The model with the float16 tensors quantised by steps that round: QuantizeLinear's own, of TensorRT's kind.

    That kind has one scale a tensor and no zero point; EnvironmentLacks for others. QuantizeLinear of a cast to float32
    would do the same, but ONNX Runtime 1.20 does not load such a model.
    """
    problem = (
        f"ONNX Runtime {version} truncates what this model, which is quantised for TensorRT, rounds; "
        "pip install -U onnxruntime brings 1.30 or later (where there is one)"
    )
    try:
        import onnx
    except ModuleNotFoundError:
        raise EnvironmentLacks(f"{problem}, pip install onnx corrects it") from None
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    graph, float32, int8 = proto.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.INT8
    constants = {each.name: each for each in graph.initializer}
    nodes = []
    for node in graph.node:
        constant = constants.get(node.input[1]) if node.op_type == "QuantizeLinear" else None
        if node.op_type != "QuantizeLinear" or (constant and constant.data_type == float32):
            nodes.append(node)
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if constant is None or constant.dims or zero is None or zero.data_type != int8:
            raise EnvironmentLacks(problem)
        if onnx.numpy_helper.to_array(zero).any():
            raise EnvironmentLacks(problem)
        name = f"{node.output[0]}.rounded"
        scale = onnx.numpy_helper.to_array(constant).astype(np.float32)
        ends = {f"{name}.scale": scale, f"{name}.least": np.float32(-128), f"{name}.most": np.float32(127)}
        graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), key) for key, a in ends.items())
        steps: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
            ("Cast", [], {"to": float32}),
            ("Div", [f"{name}.scale"], {}),
            ("Round", [], {}),
            ("Clip", [f"{name}.least", f"{name}.most"], {}),
            ("Cast", [], {"to": int8}),
        )
        value = node.input[0]
        for operator, others, attributes in steps:
            made = f"{name}.{len(nodes)}"
            nodes.append(onnx.helper.make_node(operator, [value, *others], [made], **attributes))
            value = made
        nodes[-1].output[0] = node.output[0]
    del graph.node[:]
    graph.node.extend(nodes)
    return proto.SerializeToString()


def _options(ort: Any, settings: CpuSettings) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it cannot do is an exception or seen by `open_session`
    options.intra_op_num_threads = settings.threads
    options.enable_cpu_mem_arena = settings.arena
    if not settings.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if settings.denormals_as_zero:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def run_session(session: Any, names: list[str], feed: dict[str, NDArray]) -> list[NDArray]:
    """The named outputs of a session; CheckFailed with ONNX Runtime's first line when it cannot compute them."""
    try:
        return session.run(names, feed)
    except Exception as error:  # as above
        raise CheckFailed(f"ONNX Runtime cannot run the model: {first_line(error)}") from None


def _tensors(found: Any) -> list[ModelTensor]:
    """The inputs or outputs of a session, as the manifest tells them."""
    return [
        ModelTensor(
            each.name,
            _DTYPES.get(each.type, each.type),
            tuple(size if isinstance(size, int) else None for size in each.shape[1:]),
        )
        for each in found
    ]


class OnnxEngine(SharedOut[Any]):
    """A bundle's model on ONNX Runtime: `run` and `map` for arrays that were checked already. Thread-safe.

    `settings` are for a CPU.
    """

    def __init__(
        self, bundle: Bundle, device: Literal["cpu", "cuda"], ordinal: int = 0, settings: CpuSettings | None = None
    ) -> None:
        manifest = bundle.manifest
        self.device = device
        self.largest = _LARGEST[device]
        self.gpu = _gpu(ordinal) if device == "cuda" else None
        self.settings = (settings or CpuSettings()) if device == "cpu" else CpuSettings()
        self._ordinal = ordinal
        self._input, self._classes = manifest.inputs[0].name, manifest.num_classes
        self._bundle = bundle
        # Without threads of its own a session computes on as many as call it.
        count = 1 if self.settings.threads == 1 else self.settings.sessions
        model = bundle.read(bundles.MODEL)  # the bytes that were checked, for each of them
        sessions = [self._session(model) for _ in range(count)]
        check_model(bundle, _tensors(sessions[0].get_inputs()), _tensors(sessions[0].get_outputs()))
        computes = [self._compute(sessions[n % count]) for n in range(self.settings.sessions)]
        self._held = Shares(computes, self.largest, self._classes), sessions[0]
        where = find_driver().gpus[ordinal].name if device == "cuda" else "CPU"
        self.description = f"ONNX Runtime {import_onnxruntime().__version__} on {where}"

    def run(self, images: Array, out: Array | None, stream: int | None) -> NDArray[np.float32] | DeviceArray | None:
        """Logits of `images`; into `out` when given, and then that is not returned. Complete on return."""
        shares, session = self._open()
        if isinstance(images, DeviceView) or isinstance(out, DeviceView):
            return self._run_bound(session, images, out, stream)
        return shares.run(images, out)

    def prepare(self, sizes: Iterable[int]) -> None:
        """ONNX Runtime has nothing to prepare."""

    def for_requests(self) -> tuple[OnnxEngine, int]:
        """The engine for batches of single requests, and how many threads are to give it batches at once.

        On a CPU, the threads of ONNX Runtime wait for each other after every node, which for a small model takes longer
        than the node: there, every core computes a batch of its own (benchmarks/serving.py).
        """
        callers = callers_at_once(self._bundle.manifest) if self.device == "cpu" else 1
        if callers == 1:
            return self, 1
        settings = msgspec.structs.replace(self.settings, threads=1, sessions=1)
        return OnnxEngine(self._bundle, "cpu", settings=settings), callers

    def _session(self, model: bytes) -> Any:
        integers, name = self._bundle.manifest.for_integers, self._bundle.file(bundles.MODEL)
        provider, settings = _PROVIDERS[self.device], self.settings
        return open_session(model, provider, self._ordinal, settings=settings, integers=integers, name=name)

    def _compute(self, session: Any) -> Compute:
        return lambda images: run_session(session, ["logits"], {self._input: images})[0]

    def _run_bound(self, session: Any, images: Array, out: Array | None, stream: int | None) -> DeviceArray | None:
        assert self.gpu is not None  # the caller saw to it
        if stream is not None:
            self.gpu.synchronize(stream)  # ONNX Runtime has a stream of its own
        count = images.shape[0]
        made = self.gpu.empty((count, self._classes), np.float32) if out is None else None
        target = out if made is None else made
        for begin in range(0, count, self.largest):
            end = min(begin + self.largest, count)
            self._run_part(session, part_of(images, begin, end), part_of(target, begin, end))
        return made

    def _run_part(self, session: Any, images: Array, target: Array) -> None:
        binding = session.io_binding()
        if isinstance(images, DeviceView):
            binding.bind_input(self._input, "cuda", self._ordinal, images.dtype.type, images.shape, images.pointer)
        else:
            binding.bind_cpu_input(self._input, np.ascontiguousarray(images))
        if isinstance(target, np.ndarray):
            binding.bind_output("logits", "cpu")
        else:
            binding.bind_output("logits", "cuda", self._ordinal, np.float32, target.shape, target.pointer)
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # as above
            raise CheckFailed(f"ONNX Runtime cannot run the model: {first_line(error)}") from None
        if isinstance(target, np.ndarray):
            np.copyto(target, binding.copy_outputs_to_cpu()[0])


def _gpu(ordinal: int) -> Gpu | None:
    """The GPU, or None without cuda-python, which is needed only for arrays and streams on the device."""
    try:
        return Gpu(ordinal)
    except EnvironmentLacks:
        return None


def import_onnxruntime() -> Any:
    """The module onnxruntime; EnvironmentLacks, with the command that installs it, where it is not.

    Its newer wheels send telemetry to Microsoft and keep an identifier in the home directory, unless told not to before
    they are imported (docs/Privacy.md of ONNX Runtime). Who has set the variable is left alone.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    return onnxruntime
