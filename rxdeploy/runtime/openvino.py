"""OpenVINO on a CPU: a second engine for the same model.onnx, beside ONNX Runtime.

Its CPU plugin is used as its documentation recommends for latency: one stream for each batch that is computed at once
(a session's, or a caller's), each with threads of its own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, CpuSettings
from rxdeploy.errors import CheckFailed, EnvironmentLacks, first_line, missing_module
from rxdeploy.runtime.arrays import Array
from rxdeploy.runtime.inputs import ModelTensor, check_model
from rxdeploy.runtime.opening import in_its_own_thread
from rxdeploy.runtime.shares import LARGEST, SharedOut, Shares, callers_at_once

_TELEMETRY = "openvino_telemetry"
_NO_WORK = ("Const", "Input", "Output")  # types of nodes
_REQUESTS = 2  # a stream: while one is computed, the next one's images are handed in
_importing = threading.Lock()
_process: int | None = None  # that OpenVINO's threads belong to, once there are any


def import_openvino() -> Any:
    """The module openvino; EnvironmentLacks, with the command that installs it, where it is not.

    As it is imported it sends telemetry and keeps an identifier in the home directory, unless the package that does so
    cannot be imported: here it cannot. (Where the process had imported openvino before, that was done already.)
    """
    with _importing:
        kept = sys.modules.pop(_TELEMETRY, None)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # what makes an import fail
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise missing_module(error) from None
        except ImportError as error:
            raise EnvironmentLacks(f"OpenVINO does not load here: {error}; pip install -U openvino") from None
        finally:
            del sys.modules[_TELEMETRY]
            if kept is not None:
                sys.modules[_TELEMETRY] = kept
    return openvino


def read_model(model: Path | bytes, name: object = None) -> Any:
    """An `openvino.Model`; CheckFailed when OpenVINO cannot read it, EnvironmentLacks in a forked child.

    `name` is what errors call a model given as bytes.
    """
    core = _core()
    try:
        return core.read_model(model)
    except RuntimeError as error:
        what = name or ("the model" if isinstance(model, bytes) else model)
        raise CheckFailed(f"OpenVINO cannot load {what}: {_reason(error)}") from None


def compile_model(model: Any, settings: CpuSettings | None = None, streams: int = 1, profile: bool = False) -> Any:
    """An `openvino.CompiledModel` of what `read_model` gave; CheckFailed when OpenVINO cannot compile it.

    `streams` batches are computed at once, each by `settings.threads` threads (0: all cores, shared by the streams);
    `profile` counts the time of each node. Floats are computed in float32, whatever the CPU has besides: by itself
    OpenVINO takes bfloat16, of 8 bits, where that is faster, and rounds the activations of products whose weights
    alone are integers. Threads are not bound to cores: two engines would bind theirs to the same ones.
    """
    settings = settings or CpuSettings(engine="openvino")
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": settings.threads * streams,
        "ENABLE_CPU_PINNING": False,  # two engines of one thread: 9600 instead of 5000 digits/s, one: the same
        "CPU_DENORMALS_OPTIMIZATION": settings.denormals_as_zero,
        "PERF_COUNT": profile,
    }
    try:
        return in_its_own_thread(partial(_core().compile_model, model, "CPU", properties))
    except RuntimeError as error:
        raise CheckFailed(f"OpenVINO cannot compile the model: {_reason(error)}") from None


class NodeTime(NamedTuple):
    """A node of what OpenVINO made of a model: its type, the nodes it was made from, and its mean seconds a run."""

    kind: str
    sources: tuple[str, ...]
    seconds: float


def node_times(compiled: Any) -> dict[str, NodeTime]:
    """The nodes, by OpenVINO's names, of a model compiled with `profile`: means of all its runs so far.

    OpenVINO gives whole microseconds, and of less says that a node did not run.
    """
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: value.value for key, value in node.get_rt_info().items()}
        kind, microseconds = facts["layerType"], facts["execTimeMcs"]
        if kind not in _NO_WORK:
            sources = tuple(filter(None, facts["originalLayersNames"].split(",")))
            seconds = 0.0 if microseconds == "not_executed" else int(microseconds) / 1e6
            found[node.get_friendly_name()] = NodeTime(kind, sources, seconds)
    return found


class Requests:
    """A compiled model with its infer requests, each of which computes one batch at a time. Thread-safe."""

    def __init__(self, compiled: Any, count: int) -> None:
        self._tensor = import_openvino().Tensor
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(count):
            self._idle.put(compiled.create_infer_request())

    def run(self, images: NDArray) -> NDArray[np.float32]:
        """The logits of `images`; waits for a request when all are busy."""
        if not (images.flags.c_contiguous and images.flags.writeable):
            images = images.copy()  # no other memory is taken as it is
        request = self._idle.get()
        try:
            request.set_input_tensor(self._tensor(images, shared_memory=True))
            try:
                # `infer` would compute on the caller's thread, which is slower when other work wants its core.
                request.start_async()
            finally:
                request.wait()  # even when interrupted: it reads `images`
            return np.array(request.get_output_tensor().data)  # a copy: the next inference overwrites it
        except RuntimeError as error:
            raise CheckFailed(f"OpenVINO cannot run the model: {_reason(error)}") from None
        finally:
            self._idle.put(request)


class OpenVinoEngine(SharedOut["_Ways"]):
    """A bundle's model on OpenVINO: `run` and `map` for host arrays that were checked already. Thread-safe.

    `sizes` are batch sizes to be ready for, as `prepare` makes it; `callers` batches are computed at once, each from
    another thread.
    """

    device = "cpu"
    largest = LARGEST
    gpu = None

    def __init__(
        self, bundle: Bundle, settings: CpuSettings | None = None, sizes: Iterable[int] = (), callers: int = 1
    ) -> None:
        self.settings = settings or CpuSettings(engine="openvino")
        self._bundle = bundle
        model, split_from = _read(bundle), self.settings.split_from
        split = _Models(model, self.settings, self.settings.sessions * callers)
        whole = _Models(model, self.settings_for(0), callers) if split_from else split
        self._held = (
            Shares(
                [split.compute] * self.settings.sessions,
                self.largest,
                bundle.manifest.num_classes,
                whole.compute if split_from else None,
                split_from,
            ),
            _Ways(whole, split),
        )
        self.prepare(sizes)
        split.check()
        self.description = f"OpenVINO {import_openvino().__version__.partition('-')[0]} on CPU"

    def run(self, images: Array, out: Array | None, stream: int | None) -> NDArray[np.float32] | None:
        """Logits of `images`; into `out` when given, and then that is not returned. Complete on return."""
        assert isinstance(images, np.ndarray) and (out is None or isinstance(out, np.ndarray))  # there is no device
        return self._open()[0].run(images, out)

    def settings_for(self, images: int) -> CpuSettings:
        """Those for batches of so many images."""
        found = self.settings
        if images >= found.split_from:
            return found
        return msgspec.structs.replace(found, threads=found.threads * found.sessions, sessions=1, split_from=0)

    def prepare(self, sizes: Iterable[int]) -> None:
        """Compile the model once more for each of these batch sizes, which makes them faster and takes memory."""
        shares, ways = self._open()
        for images in sizes:
            models = ways.whole if images < self.settings.split_from else ways.split
            for size in shares.sizes(images):
                models.compile(size)

    def for_requests(self) -> tuple[OpenVinoEngine, int]:
        """The engine for batches of single requests, and how many threads are to give it batches at once.

        As on ONNX Runtime: of a small model, every core computes a batch of its own.
        """
        callers = callers_at_once(self._bundle.manifest)
        if callers == 1:
            return self, 1
        settings = msgspec.structs.replace(self.settings, threads=1, sessions=1, split_from=0)
        return OpenVinoEngine(self._bundle, settings, callers=callers), callers


def _read(bundle: Bundle) -> Any:
    if not bundle.manifest.for_integers:
        # With its undocumented switch for that, 2026.4 gave logits 200 times too large on two streams.
        raise EnvironmentLacks(
            f"bundle {bundle.path}: its Q/DQ nodes are placed for TensorRT, between which OpenVINO would compute "
            "in integers, which saturate on many CPUs; pip install 'rxdeploy[cpu]' adds ONNX Runtime, which "
            "computes there in floating point, or build the bundle with --target onnxruntime"
        )
    model = read_model(bundle.read(bundles.MODEL), name=bundle.file(bundles.MODEL))
    check_model(bundle, _tensors(model.inputs), _tensors(model.outputs))
    return model


def _tensors(found: Any) -> list[ModelTensor]:
    """The inputs or outputs of a model, as the manifest tells them."""
    return [
        ModelTensor(
            each.get_any_name(),
            each.element_type.to_dtype().name,
            ()
            if each.partial_shape.rank.is_dynamic
            else tuple(size.get_length() if size.is_static else None for size in list(each.partial_shape)[1:]),
        )
        for each in found
    ]


class _Models:
    """A model, compiled for single batch sizes and, once it is needed, for any.

    For any size, OpenVINO plans anew what it computes when the size is another than before, and leaves some
    optimisations out.
    """

    def __init__(self, model: Any, settings: CpuSettings, streams: int) -> None:
        self._model, self._settings, self._streams = model, settings, streams
        self._lock = threading.Lock()
        self._compiled: dict[int | None, Requests] = {}  # by batch size; None: any

    def compute(self, images: NDArray) -> NDArray[np.float32]:
        """The logits of `images`."""
        compiled = self._compiled.get(len(images)) or self._compiled.get(None) or self.compile(None)
        return compiled.run(images)

    def compile(self, size: int | None) -> Requests:
        """Compile it for this batch size, unless that was done before."""
        with self._lock:
            if size not in self._compiled:
                model = self._model if size is None else of_size(self._model, size)
                compiled = compile_model(model, self._settings, self._streams)
                self._compiled[size] = Requests(compiled, _REQUESTS * self._streams)
            return self._compiled[size]

    def check(self) -> None:
        """CheckFailed when it cannot be compiled, which is then not found out by the first batch."""
        if not self._compiled:
            self.compile(None)


class _Ways(NamedTuple):
    """For the batches that all threads compute together, and for those that are split."""

    whole: _Models
    split: _Models


def of_size(model: Any, images: int) -> Any:
    """A copy of an `openvino.Model` for batches of exactly so many images."""
    model = model.clone()
    model.reshape([images, *list(model.input().partial_shape)[1:]])
    return model


def _core() -> Any:
    """OpenVINO's entry. EnvironmentLacks where it would wait for ever for threads that a fork has left behind."""
    global _process
    if _process not in (None, os.getpid()):
        raise EnvironmentLacks(
            "OpenVINO was used by the process that this one was forked from, and cannot be used in both; fork before "
            "that, or start processes with spawn"
        )
    core = import_openvino().Core()
    _process = os.getpid()
    return core


def _reason(error: RuntimeError) -> str:
    """What OpenVINO's error says, without the places in its source that it came from."""
    lines = (line.strip() for line in str(error).splitlines())
    told = (line for line in lines if line and not line.startswith(("Exception from ", "Check '")))
    return next(told, first_line(error))
