"""ONNX Runtime: one way to open a session and to run it, for the runtime and for validation."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle
from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import CheckFailed, EnvironmentLacks, first_line, missing_module
from rxdeploy.runtime.arrays import Array, DeviceView, part_of
from rxdeploy.runtime.batching import Closed
from rxdeploy.runtime.cuda import DeviceArray, Gpu

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# Images that are computed at once; of more, the activations take memory and, on a CPU, time: they leave its caches.
_SMALL = 200_000_000  # multiply-adds an image; the digits model has 18 million, ResNeXt-50 4230 million
_MOST_WORKERS = 8
_LARGEST = {"cpu": 64, "cuda": 256}

# TF32 would round float32 convolutions to 10 bits of mantissa, which is no float32 any more.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0"}}


def available_providers() -> list[str]:
    """CPU, and CUDA where this ONNX Runtime has it and there is a GPU; whether it starts, only a session tells."""
    here = _onnxruntime().get_available_providers()
    return [CPU] if CUDA not in here or find_driver().problem else [CPU, CUDA]


def open_session(
    model: Path | bytes,
    provider: str = CPU,
    ordinal: int = 0,
    profile: Path | None = None,
    threads: int = 0,
    integers: bool = True,
) -> Any:
    """An `onnxruntime.InferenceSession` on one provider.

    `ordinal` is the GPU's number; `threads` compute a node together (0: one a core); with `profile`, ONNX Runtime
    writes its profile to a file beginning so. Without `integers`, Q/DQ nodes round and everything between them is
    computed in floating point, which is what a model quantised for TensorRT means: ONNX Runtime's own integer kernels
    saturate on signed activations where a CPU has no VNNI.

    EnvironmentLacks when the provider is not here: ONNX Runtime itself would fall back to the CPU without a
    word. CheckFailed when it cannot load the model.
    """
    ort = _onnxruntime()
    if provider not in ort.get_available_providers():
        raise EnvironmentLacks(f"this ONNX Runtime has no {provider}; pip install 'rxdeploy[gpu]' adds CUDA's")
    if provider == CUDA:
        if problem := find_driver().problem:
            raise EnvironmentLacks(f"ONNX Runtime's {provider} needs a GPU: {problem}")
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # the CUDA libraries that came as Python packages
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it cannot do is an exception or seen below
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    provider_options = _PROVIDER_OPTIONS[provider] | ({"device_id": str(ordinal)} if provider == CUDA else {})
    source = model if isinstance(model, bytes) else str(model)
    try:
        # Its fallback would go on with another provider, now or after a failed run, and say so on stdout.
        session = ort.InferenceSession(source, options, providers=[(provider, provider_options)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        if provider == CUDA and type(error).__name__ == "EPFail":
            raise EnvironmentLacks(f"ONNX Runtime's {provider} does not start here: {first_line(error)}") from None
        what = "the model" if isinstance(model, bytes) else model
        raise CheckFailed(f"ONNX Runtime cannot load {what}: {first_line(error)}") from None
    if session.get_providers()[0] != provider:
        raise EnvironmentLacks(
            f"ONNX Runtime's {provider} does not start here, its CUDA libraries are missing or of another version; "
            "pip install -U 'rxdeploy[gpu]' brings them"
        )
    return session


def run_session(session: Any, names: list[str], feed: dict[str, NDArray]) -> list[NDArray]:
    """The named outputs of a session; CheckFailed with ONNX Runtime's first line when it cannot compute them."""
    try:
        return session.run(names, feed)
    except Exception as error:  # as above
        raise CheckFailed(f"ONNX Runtime cannot run the model: {first_line(error)}") from None


class OnnxEngine:
    """A bundle's model on ONNX Runtime: `run` and `map` for arrays that were checked already. Thread-safe."""

    def __init__(self, bundle: Bundle, device: Literal["cpu", "cuda"], ordinal: int = 0, threads: int = 0) -> None:
        manifest = bundle.manifest
        self.device = device
        self.largest = _LARGEST[device]
        self.gpu = _gpu(ordinal) if device == "cuda" else None
        self._ordinal = ordinal
        self._input, self._classes = manifest.inputs[0].name, manifest.num_classes
        self._bundle = bundle
        self._session = open_session(
            bundle.file(bundles.MODEL), _PROVIDERS[device], ordinal, threads=threads, integers=manifest.for_integers
        )
        where = find_driver().gpus[ordinal].name if device == "cuda" else "CPU"
        self.description = f"ONNX Runtime {_onnxruntime().__version__} on {where}"

    def run(self, images: Array, out: Array | None, stream: int | None) -> NDArray[np.float32] | DeviceArray | None:
        """Logits of `images`; into `out` when given, and then that is not returned. Complete on return."""
        session = self._open()
        if isinstance(images, DeviceView) or isinstance(out, DeviceView):
            return self._run_bound(session, images, out, stream)
        if out is None and len(images) <= self.largest:
            return run_session(session, ["logits"], {self._input: images})[0]
        result = np.empty((len(images), self._classes), np.float32) if out is None else out
        for begin in range(0, len(images), self.largest):
            part = slice(begin, begin + self.largest)
            np.copyto(result[part], run_session(session, ["logits"], {self._input: images[part]})[0])
        return result if out is None else None

    def map(self, batches: Iterable[NDArray]) -> Iterator[tuple[NDArray[np.float32], float | None]]:
        """Logits of each of many host batches, in order, and the seconds that each took."""
        for images in batches:
            begin = time.perf_counter()
            logits = self.run(images, None, None)
            assert isinstance(logits, np.ndarray)  # host in, host out
            yield logits, time.perf_counter() - begin

    def prepare(self, sizes: Iterable[int]) -> None:
        """ONNX Runtime has nothing to prepare."""

    def for_requests(self) -> tuple[OnnxEngine, int]:
        """The engine for batches of single requests, and how many threads are to give it batches at once.

        On a CPU, the threads of ONNX Runtime wait for each other after every node, which for a small model takes longer
        than the node: there, every core computes a batch of its own (benchmarks/serving.py).
        """
        small = self._bundle.manifest.counts.multiply_adds < _SMALL
        cores = len(os.sched_getaffinity(0))
        if self.device == "cpu" and small and cores > 1:
            return OnnxEngine(self._bundle, "cpu", threads=1), min(cores, _MOST_WORKERS)
        return self, 1

    def close(self) -> None:
        """Drop ONNX Runtime's session; calls that are running end first, as they hold it too."""
        self._session = None

    def _open(self) -> Any:
        if (session := self._session) is None:
            raise Closed("the session is closed; load the bundle again")
        return session

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


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    return onnxruntime
