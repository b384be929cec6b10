"""ONNX Runtime: one way to open a session and to run it, for the runtime and for validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import CheckFailed, EnvironmentLacks, first_line, missing_module

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# TF32 would round float32 convolutions to 10 bits of mantissa, which is no float32 any more.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0"}}


def available_providers() -> list[str]:
    """CPU, and CUDA where this ONNX Runtime has it and there is a GPU; whether it starts, only a session tells."""
    here = _onnxruntime().get_available_providers()
    return [CPU] if CUDA not in here or find_driver().problem else [CPU, CUDA]


def open_session(model: Path | bytes, provider: str = CPU) -> Any:
    """An `onnxruntime.InferenceSession` on one provider.

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
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=[(provider, _PROVIDER_OPTIONS[provider])])
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


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    return onnxruntime
