"""ONNX Runtime: one way to open a session and to run it, for the runtime and for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import MAX_BATCH
from rxdeploy.errors import CheckFailed, EnvironmentLacks, first_line, missing_module
from rxdeploy.runtime.arrays import Array, DeviceView
from rxdeploy.runtime.cuda import DeviceArray, Gpu

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}

# TF32 would round float32 convolutions to 10 bits of mantissa, which is no float32 any more.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0"}}


def available_providers() -> list[str]:
    """CPU, and CUDA where this ONNX Runtime has it and there is a GPU; whether it starts, only a session tells."""
    here = _onnxruntime().get_available_providers()
    return [CPU] if CUDA not in here or find_driver().problem else [CPU, CUDA]


def open_session(model: Path | bytes, provider: str = CPU, ordinal: int = 0, profile: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on one provider.

    `ordinal` is the GPU's number; with `profile`, ONNX Runtime writes its profile to a file beginning so.

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
    options.log_severity_level = 4  # what it cannot do is an exception or seen below
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    provider_options = _PROVIDER_OPTIONS[provider] | ({"device_id": str(ordinal)} if provider == CUDA else {})
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=[(provider, provider_options)])
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
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

    def __init__(self, bundle: Bundle, device: Literal["cpu", "cuda"], ordinal: int = 0) -> None:
        manifest = bundle.manifest
        self.device = device
        self.largest = MAX_BATCH  # no batch is too large but for memory
        self.gpu = _gpu(ordinal) if device == "cuda" else None
        self._ordinal = ordinal
        self._input, self._classes = manifest.inputs[0].name, manifest.num_classes
        self._session = open_session(bundle.file(bundles.MODEL), _PROVIDERS[device], ordinal)
        where = find_driver().gpus[ordinal].name if device == "cuda" else "CPU"
        self.description = f"ONNX Runtime {_onnxruntime().__version__} on {where}"

    def run(self, images: Array, out: Array | None, stream: int | None) -> NDArray[np.float32] | DeviceArray | None:
        """Logits of `images`; into `out` when given, and then that is not returned. Complete on return."""
        if isinstance(images, DeviceView) or isinstance(out, DeviceView):
            return self._run_bound(images, out, stream)
        logits = run_session(self._session, ["logits"], {self._input: images})[0]
        if out is None:
            return logits
        np.copyto(out, logits)
        return None

    def map(self, batches: Iterable[NDArray]) -> Iterator[NDArray[np.float32]]:
        """Logits of each of many host batches, in order."""
        for images in batches:
            yield run_session(self._session, ["logits"], {self._input: images})[0]

    def prepare(self, sizes: Iterable[int]) -> None:
        """ONNX Runtime has nothing to prepare."""

    def close(self) -> None:
        """Drop ONNX Runtime's session; calls that are running end first, as they hold it too."""
        self._session = None

    def _run_bound(self, images: Array, out: Array | None, stream: int | None) -> DeviceArray | None:
        assert self.gpu is not None  # the caller saw to it
        if stream is not None:
            self.gpu.synchronize(stream)  # ONNX Runtime has a stream of its own
        shape = (images.shape[0], self._classes)
        made = self.gpu.empty(shape, np.float32) if out is None else None
        binding = self._session.io_binding()
        if isinstance(images, DeviceView):
            binding.bind_input(self._input, "cuda", self._ordinal, images.dtype.type, images.shape, images.pointer)
        else:
            binding.bind_cpu_input(self._input, np.ascontiguousarray(images))
        target = made or out
        if isinstance(target, np.ndarray):
            binding.bind_output("logits", "cpu")
        else:
            assert target is not None
            binding.bind_output("logits", "cuda", self._ordinal, np.float32, shape, target.pointer)
        try:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # as above
            raise CheckFailed(f"ONNX Runtime cannot run the model: {first_line(error)}") from None
        if isinstance(target, np.ndarray):
            np.copyto(target, binding.copy_outputs_to_cpu()[0])
        return made


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
