"""A loaded bundle: arrays, streams of batches, image files or single requests in, logits or classes out."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.cards import read_labels
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle
from rxdeploy.engines.gpu import find_driver
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, RxDeployError
from rxdeploy.runtime import arrays
from rxdeploy.runtime.arrays import Array, DeviceView
from rxdeploy.runtime.batching import Batcher, Batching, Closed
from rxdeploy.runtime.cpu import ENGINES, CpuEngine, open_cpu_engine
from rxdeploy.runtime.cuda import LEGACY_STREAM, DeviceArray, Gpu
from rxdeploy.runtime.inputs import Inputs
from rxdeploy.runtime.lanes import PlanEngine
from rxdeploy.runtime.metrics import Metrics
from rxdeploy.runtime.onnxrt import OnnxEngine
from rxdeploy.runtime.preprocess import open_rgb, transform
from rxdeploy.signing.keys import TrustedKeys

Engine = CpuEngine | PlanEngine

_FILES_AT_ONCE = {"cpu": 8, "cuda": 32, "tensorrt": 32}  # on a CPU more gains nothing, and the first come later
_LARGEST_DEFAULT = 32  # images that `submit` puts together where `Batching` does not say
_DECODERS = 8
_NOTHING = contextlib.nullcontext()
log = logging.getLogger("rxdeploy.runtime")


@dataclass(frozen=True)
class Prediction:
    """One class that an image may belong to."""

    index: int
    label: str | None
    probability: float
    logit: float


@dataclass(frozen=True)
class Classified:
    """What became of one image file: its classes, best first, or the error that kept it from being read."""

    path: Path
    predictions: tuple[Prediction, ...] | None
    error: InputError | None


def load(
    path: str | Path,
    device: str = "auto",
    labels: str | Path | None = None,
    *,
    batching: Batching | None = None,
    trusted_keys: TrustedKeys | str | Path | bytes | None = None,
) -> Session:
    """Open the bundle at `path`, check every digest, and get it ready to run.

    `device`: "tensorrt" runs the bundle's plan, "cuda" runs model.onnx on ONNX Runtime, "cpu" on the engine that the
    bundle was tuned to, or else ONNX Runtime or OpenVINO, whichever is installed; "onnxruntime" and "openvino" are the
    CPU with that engine; "tensorrt:1" is the second GPU. "auto" takes the first of tensorrt, cuda and cpu that works
    here, and `Session.description` says which.
    `labels` is a text file with one class name a line, used instead of the bundle's own names. `batching` is for
    `Session.submit`. With `trusted_keys`, public keys as files or PEM, the bundle must be signed with one of them,
    which is checked before anything in it reaches an engine (docs/security.md).

    InputError for a bundle that is none or was altered; CheckFailed for one that no trusted key signed as it is;
    EnvironmentLacks, with the reason, for a device that is not possible here.
    """
    bundle = bundles.open_bundle(Path(path), trusted_keys)
    names = read_labels(Path(labels), bundle.manifest.num_classes) if labels else bundle.labels()
    return Session(bundle, device, names, batching or Batching())


class Session:
    """Runs one bundle. Thread-safe. Close it, or use it in a `with`, to free the device's memory at once.

    `device` is "tensorrt", "cuda" or "cpu"; `description` says it for people; `passed_over` says why "auto" did
    not take something better; `gpu` is the device for allocating arrays there (None on the CPU); `metrics` counts.
    """

    def __init__(self, bundle: Bundle, device: str, labels: Sequence[str] | None, batching: Batching) -> None:
        self.bundle = bundle
        self.engine, self.passed_over = _open(bundle, device)
        self.device: str = self.engine.device
        self.description = self.engine.description
        self.gpu = self.engine.gpu
        self.metrics = Metrics()
        self._labels = labels
        self._way_to_gpu = (
            "pip install cuda-bindings cuda-core adds what that needs"
            if self.device == "cuda"
            else "load the bundle for a GPU to use one"
        )
        self._batching = _fill_in(batching, self.engine)
        self._inputs = Inputs(bundle.manifest)
        self._compute = _Compute(bundle, self.engine, self.metrics)
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        self._batchers: list[Batcher] = []  # none until something is submitted, then one
        # Before the interpreter takes its modules apart, TensorRT's objects must be gone.
        self._finalizer = weakref.finalize(self, _close, self._batchers, self.engine, self._pid)

    def run(self, images: Any, out: Any = None, stream: Any = None) -> Any:
        """Logits, float32 (n, num_classes), of uint8 RGB images (n, image_size, image_size, 3).

        A bundle whose declared input is normalised float32 (n, 3, image_size, image_size) takes that too. Arrays:
        NumPy's, or any with DLPack, `__array_interface__` or `__cuda_array_interface__`. Images on the host give a
        NumPy array, complete on return; on the GPU, a `DeviceArray`, without a copy. `out`, on either, takes the
        logits instead and is returned. With `stream` (an integer handle, or a stream of PyTorch, CuPy, PyCUDA or
        cuda-python) device arrays are read and written in that stream's order, and the call returns when the work
        is enqueued; without, the result is complete on return. Batches larger than the plan's largest are split.

        InputError, before anything is enqueued, for another dtype, shape, layout or device, and for float32 images on
        the host with NaN, infinity or values beyond 65504; `Closed` after `close`; CheckFailed when a logit is not
        finite (host results only) or the engine fails.
        """
        self._check_open()
        handle = self._stream(stream)
        with self._context(images, out, handle):
            batch = self._batch(images, handle)
            target = None if out is None else self._target(out, batch.shape[0], handle)
        if not batch.shape[0]:
            return self._nothing(batch) if out is None else out
        begin = time.perf_counter()
        try:
            logits = self.engine.run(batch, target, handle)
        except RxDeployError:
            self.metrics.count_error()
            raise
        # Only a plan's run on device arrays and a stream is not complete by now.
        on_host = isinstance(batch, np.ndarray) or isinstance(target, np.ndarray)
        enqueued = handle is not None and self.device == "tensorrt" and not on_host
        self.metrics.record_run(batch.shape[0], None if enqueued else time.perf_counter() - begin)
        if isinstance(logits, DeviceArray):
            logits.keeps = stream  # it has its handle
        result = target if out is not None else logits
        if isinstance(result, np.ndarray):
            self._compute.check_finite(result)
        return logits if out is None else out

    def map(self, batches: Iterable[Any]) -> Iterator[NDArray[np.float32]]:
        """Logits of each of many host batches, in order. On a GPU the next is copied while one is computed.

        Batches and errors as for `run`; one or two batches are taken from `batches` ahead of the logits.
        """
        self._check_open()
        return self._map(batches)

    def _map(self, batches: Iterable[Any]) -> Iterator[NDArray[np.float32]]:
        sizes: deque[int] = deque()

        def checked() -> Iterator[NDArray]:
            for images in batches:
                self._check_open()
                if arrays.is_on_device(images, "images"):
                    raise InputError("images: map is for arrays on the host; run takes those on the GPU as they are")
                batch = self._inputs.host(images)
                if not len(batch):
                    raise InputError("images: got an empty batch")
                sizes.append(len(batch))
                yield batch

        results = self.engine.map(checked())
        while True:
            try:
                logits, seconds = next(results)
            except StopIteration:
                return
            except InputError:
                raise
            except RxDeployError:
                self.metrics.count_error()
                raise
            self.metrics.record_run(sizes.popleft(), seconds)
            self._compute.check_finite(logits)
            yield logits

    def prepare(self, sizes: Iterable[int]) -> None:
        """Let the first real call with each of these batch sizes be as fast as the later ones.

        On a GPU this compiles, measures and captures what each size needs; OpenVINO compiles the model for each size,
        which makes it faster and takes memory; ONNX Runtime has nothing to do.
        """
        self._check_open()
        sizes = list(sizes)
        for size in sizes:
            if size < 1:
                raise InputError(f"batch size {size}: it must be at least 1")
        self.engine.prepare(sizes)

    def preprocess(self, path: str | Path) -> NDArray[np.uint8]:
        """An image file as the model's evaluation transform leaves it: uint8 (image_size, image_size, 3), RGB."""
        path = Path(path)
        inputs = self.bundle.manifest.preprocessing
        image = open_rgb(path)
        try:
            return transform(image, inputs.image_size, inputs.crop_pct, inputs.interpolation)
        except InputError as error:
            raise InputError(f"image {path}: {error}") from None

    def classify(self, paths: Iterable[str | Path] | str | Path, k: int = 5) -> Iterator[Classified]:
        """The `k` most probable classes of each image file, in the order of `paths`; all classes when `k` is more.

        Files are decoded and resized by a few threads, on a GPU while it computes, on a CPU in turns with the
        inference, which needs the same cores; they are run in batches. A file that
        cannot be read gives a `Classified` with its error; any other error (see `run`) ends it. InputError when
        `k` is less than 1.
        """
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        self._check_open()
        if isinstance(paths, str | Path):
            paths = [paths]
        return self._classify(map(Path, paths), k)

    def top(self, logits: NDArray[np.float32], k: int = 5) -> list[tuple[Prediction, ...]]:
        """The `k` most probable classes of each row of `logits` (n, num_classes), best first.

        InputError for another shape; CheckFailed for NaN and infinity, of which there are no probabilities: `run` gives
        them only where it does not look, on the GPU.
        """
        if np.shape(logits)[1:] != (self._inputs.classes,):
            raise InputError(f"logits: got {np.shape(logits)}, expected (n, {self._inputs.classes}); see Session.run")
        if not np.isfinite(logits).all():
            raise CheckFailed("logits: they hold NaN or infinity, of which there are no probabilities")
        return [self._top(row, k) for row in logits]

    def submit(self, image: Any, deadline: float | None = None, timeout: float | None = None) -> Future:
        """Logits, float32 (num_classes,), of one image, computed together with those of other callers.

        `image` is as for `run`, without the batch. A request that no batch has taken `deadline` seconds from now
        fails with `DeadlineExceeded`. When the queue is full the call waits, `timeout` seconds at most, or fails
        with `Rejected`, as `Batching` says. InputError at once for an image that is none; `Closed` after `close`.
        """
        return self._batcher().submit(image, deadline, timeout)

    async def submit_async(self, image: Any, deadline: float | None = None) -> NDArray[np.float32]:
        """As `submit`, for asyncio: waits for room and for the logits without blocking the event loop."""
        return await self._batcher().submit_async(image, deadline)

    def close(self, drain: bool = True) -> None:
        """End it: what was submitted is computed (or fails with `Closed` without `drain`), and memory is freed.

        Calls that are running end first; doing it twice is no error.
        """
        with self._lock:
            self._closed = True
        if os.getpid() != self._pid:
            return  # a forked child: the threads and the GPU are the parent's
        for batcher in self._batchers:
            batcher.close(drain)
        if any(batcher.is_worker() for batcher in self._batchers):
            # In a callback of a future. This thread is to compute the rest first; the engine is freed after it.
            threading.Thread(target=self._finalizer, name="rxdeploy-close").start()
        else:
            self._finalizer()

    def __repr__(self) -> str:
        return f"Session({self.bundle.manifest.model}, {self.bundle.manifest.precision}: {self.description})"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the session is closed; load the bundle again")
        if os.getpid() != self._pid:
            raise Closed("this process was forked from the one that loaded the session; load the bundle after the fork")

    # Arrays on the device

    def _stream(self, stream: Any) -> int | None:
        if stream is None:
            return None
        if self.gpu is None:
            raise InputError(
                f"stream: the session cannot reach a GPU's streams ({self.description}); {self._way_to_gpu}"
            )
        return arrays.stream_handle(stream)

    def _context(self, images: Any, out: Any, stream: int | None) -> contextlib.AbstractContextManager[None]:
        """The GPU's context where device arrays or streams need it; the stream is checked."""
        if isinstance(images, np.ndarray) and (out is None or isinstance(out, np.ndarray)) and stream is None:
            return _NOTHING
        if self.gpu is None:
            return _NOTHING
        if stream is not None:
            with self.gpu.current():
                self.gpu.check_stream(stream)
        return self.gpu.current()

    def _batch(self, images: Any, stream: int | None) -> Array:
        if not arrays.is_on_device(images, "images"):
            return self._inputs.host(images)
        return self._inputs.device(self._view(images, "images", stream))

    def _view(self, array: Any, name: str, stream: int | None) -> DeviceView:
        if self.gpu is None:
            raise InputError(
                f"{name}: the array lies on a GPU, and the session cannot reach it ({self.description}); bring it to "
                f"the host (.cpu(), .get()); {self._way_to_gpu}"
            )
        # Without a stream the engine's own is used, which waits for nobody: let the legacy stream's order hold.
        view = arrays.device_view(array, name, LEGACY_STREAM if stream is None else stream, self.gpu)
        if stream is None:
            self.gpu.synchronize(LEGACY_STREAM)
        if view.device != self.gpu.ordinal:
            raise InputError(f"{name}: the array lies on GPU {view.device}, the session runs on GPU {self.gpu.ordinal}")
        return view

    def _target(self, out: Any, images: int, stream: int | None) -> Array:
        target: Array
        if arrays.is_on_device(out, "out"):
            target = self._view(out, "out", stream)
            writable = not target.readonly
        else:
            target = arrays.host_array(out, "out")
            writable = target.flags.writeable
        expected = (images, self._inputs.classes)
        if target.dtype != np.float32 or target.shape != expected:
            raise InputError(f"out: got {target.dtype} {target.shape}, expected float32 {expected}")
        if not writable:
            raise InputError("out: the array is read-only")
        return target

    def _nothing(self, batch: Array) -> NDArray[np.float32] | DeviceArray:
        """The logits of no images, where the images are."""
        shape = (0, self._inputs.classes)
        if isinstance(batch, DeviceView) and self.gpu is not None:
            return self.gpu.empty(shape, np.float32)
        return np.empty(shape, np.float32)

    # Files

    def _classify(self, paths: Iterator[Path], k: int) -> Iterator[Classified]:
        size = min(self.engine.largest, _FILES_AT_ONCE[self.device])
        turns = self.device == "cpu"
        groups: deque[list[tuple[Path, InputError | None]]] = deque()

        def batches() -> Iterator[NDArray]:
            while True:
                group: list[tuple[Path, InputError | None]] = []
                images = []
                for path, outcome in decoded:
                    failed = isinstance(outcome, InputError)
                    group.append((path, outcome if failed else None))
                    if not failed:
                        images.append(outcome)
                    if len(images) == size:
                        break
                if group:
                    groups.append(group)
                if not images:
                    return
                yield np.stack(images)

        with _Decoders(self.preprocess, paths, ahead=8 * size if turns else 2 * size, turns=turns) as decoded:
            for logits in self.map(batches()):
                rows = iter(self.top(logits, k))
                for path, error in groups.popleft():
                    yield Classified(path, None if error else next(rows), error)
            for group in groups:  # the last files, when none of them could be read
                yield from (Classified(path, None, error) for path, error in group)

    def _top(self, logits: NDArray[np.float32], k: int) -> tuple[Prediction, ...]:
        exp = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exp / exp.sum()
        best: list[int] = np.argsort(-logits, kind="stable")[:k].tolist()
        return tuple(
            Prediction(i, self._labels[i] if self._labels else None, float(probabilities[i]), float(logits[i]))
            for i in best
        )

    # Single requests

    def _batcher(self) -> Batcher:
        self._check_open()
        if not self._batchers:
            with self._lock:
                self._check_open()
                if not self._batchers:
                    engine, workers = self.engine.for_requests()
                    compute = _Compute(self.bundle, engine, self.metrics)
                    self._batchers.append(Batcher(compute, self._inputs.one, self._batching, self.metrics, workers))
        return self._batchers[0]


class _Compute:
    """Logits of a checked host batch, counted and found finite. (Not of Session, which its threads would keep.)"""

    def __init__(self, bundle: Bundle, engine: Engine, metrics: Metrics) -> None:
        self._bundle, self._engine, self._metrics = bundle, engine, metrics

    def __call__(self, images: NDArray) -> NDArray[np.float32]:
        begin = time.perf_counter()
        try:
            logits = self._engine.run(images, None, None)
        except RxDeployError:
            self._metrics.count_error()
            raise
        self._metrics.record_run(len(images), time.perf_counter() - begin)
        assert isinstance(logits, np.ndarray)  # host in, host out
        self.check_finite(logits)
        return logits

    def check_finite(self, logits: NDArray[np.float32]) -> None:
        if not np.isfinite(logits).all():
            self._metrics.count_error()
            raise CheckFailed(
                f"bundle {self._bundle.path}: the logits hold NaN or infinity; validate the model, or build with --fp32"
            )


class _Decoders:
    """Threads that read image files ahead of who iterates: (path, image or its error), in order.

    Where inference and decoding need the same cores, they take `turns`: `ahead` files on all cores, then none until
    those are used up. At the same time, the threads of the inference would wait for the one whose core was taken, and
    every file cost twice.
    """

    def __init__(self, read: Callable[[Path], NDArray], paths: Iterator[Path], ahead: int, turns: bool) -> None:
        self._read, self._paths = read, paths
        self._pool = ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1), "rxdeploy-decode")
        self._waiting: deque[tuple[Path, Future]] = deque()
        self._ahead, self._turns = ahead, turns

    def __enter__(self) -> _Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Path, Any]]:
        return self

    def __next__(self) -> tuple[Path, Any]:
        if not self._turns or not self._waiting:
            self._fill()
        if not self._waiting:
            raise StopIteration
        path, future = self._waiting.popleft()
        return path, future.result()

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead and (path := next(self._paths, None)) is not None:
            self._waiting.append((path, self._pool.submit(self._outcome, path)))
        if self._turns:
            wait(future for _, future in self._waiting)

    def _outcome(self, path: Path) -> NDArray | InputError:
        try:
            return self._read(path)
        except InputError as error:
            return error


def parse_device(device: str) -> tuple[str, int]:
    """(kind, number of the GPU) of a device's name: ("cuda", 1) of "cuda:1"."""
    kind, colon, number = str(device).partition(":")
    numbered = kind not in ("cpu", *ENGINES) and number.isdecimal() and len(number) < 5
    if kind not in ("auto", "tensorrt", "cuda", "cpu", *ENGINES) or (colon and not numbered):
        raise InputError(
            f"device {device!r}: must be auto, tensorrt, cuda, cpu, onnxruntime or openvino; a GPU's number may "
            "follow: cuda:1"
        )
    return kind, int(number or 0)


def _open(bundle: Bundle, device: str) -> tuple[Engine, tuple[str, ...]]:
    """The engine for `device`, and for "auto" why the better ones were passed over."""
    kind, ordinal = parse_device(device)
    openers: dict[str, Callable[[], Engine]] = {
        "tensorrt": lambda: PlanEngine(bundle, Gpu(ordinal)),
        "cuda": lambda: OnnxEngine(bundle, "cuda", ordinal),
        "cpu": lambda: open_cpu_engine(bundle),
    }
    of_cpu = {name: partial(open_cpu_engine, bundle, engine=name) for name in ENGINES}
    if kind != "auto":
        try:
            return (openers | of_cpu)[kind](), ()
        except EnvironmentLacks as error:
            raise EnvironmentLacks(f"device {device} is not possible here: {error}") from None
    passed_over: list[str] = []
    for name, opener in openers.items():
        try:
            engine = opener()
        except EnvironmentLacks as error:
            passed_over.append(f"{name}: {error}")
        else:
            # A GPU that is there and not used is worth a warning; that there is none, is not.
            level = logging.WARNING if passed_over and not find_driver().problem else logging.INFO
            log.log(level, "running on %s%s", engine.description, "".join(f"; {reason}" for reason in passed_over))
            return engine, tuple(passed_over)
    raise EnvironmentLacks(f"bundle {bundle.path} cannot run here: {'; '.join(passed_over)}")


def _fill_in(batching: Batching, engine: Engine) -> Batching:
    if batching.max_batch is not None:
        return batching
    return replace(batching, max_batch=min(engine.largest, _LARGEST_DEFAULT))


def _close(batchers: list[Batcher], engine: Engine, pid: int) -> None:
    if os.getpid() != pid:
        return  # as in `Session.close`
    for batcher in batchers:
        batcher.close()
    engine.close()
