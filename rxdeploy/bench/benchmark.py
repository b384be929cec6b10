"""The whole benchmark of one bundle, from loading it to its layers' times."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.bench import counts as counting
from rxdeploy.bench.counts import GraphCounts
from rxdeploy.bench.layers import LayerTimes, layer_times
from rxdeploy.bench.measure import Clock, WarmUp, repeat, warm_up
from rxdeploy.bench.numerics import Numerics, try_examine
from rxdeploy.bench.peaks import Peaks, Prober
from rxdeploy.bench.roofline import Floor, floor
from rxdeploy.bench.samples import sample_images
from rxdeploy.bench.statistics import Latency, Throughput, latency, throughput
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, Manifest
from rxdeploy.engines.options import MAX_BATCH
from rxdeploy.errors import EnvironmentLacks, InputError, RxDeployError
from rxdeploy.pipeline import Reporter, Stage
from rxdeploy.runtime.session import Session, load
from rxdeploy.signing.keys import TrustedKeys

DEFAULT_BATCHES = (1, 8, 32)
LONGEST = 600.0  # seconds that a batch size may be measured for


@dataclass(frozen=True)
class Series:
    """Calls of one kind, one after the other."""

    latency: Latency
    throughput: Throughput


@dataclass(frozen=True)
class BatchResult:
    """What one batch size gave.

    `host` took and gave NumPy arrays; on a GPU that includes the copies. `device` took and gave arrays on the GPU;
    `enqueue` is how long `run` took to return then, `device_time` what the GPU says it worked. Where there is no
    such thing they are None, and `Benchmark.no_device` and `no_enqueue` say why.
    """

    batch: int
    warm_up: WarmUp
    host: Series
    device: Series | None
    enqueue: Latency | None
    device_time: Latency | None

    @property
    def computing(self) -> Series:
        """What to compare with the device's limits: without copies where there are any."""
        return self.device or self.host


@dataclass(frozen=True)
class Benchmark:
    """Everything measured; facts.py, report.py and plot.py show it.

    `failures` says what could not be measured ("batch 32", "layers") and why.
    """

    bundle: Bundle
    device: str
    description: str
    passed_over: tuple[str, ...]
    seconds: float
    counts: GraphCounts
    peaks: Peaks
    batches: tuple[BatchResult, ...]
    failures: dict[str, RxDeployError]
    layers: LayerTimes | None
    no_device: str | None
    no_enqueue: str | None
    numerics: Numerics | str = "not looked for"  # or why nothing is known of them
    flushes_denormals: bool = False

    @property
    def card_flops(self) -> int | None:
        """The card's FLOPs of one image, in the card's own unit."""
        return self.bundle.manifest.card.figures.flops

    @property
    def counted_flops(self) -> int:
        """Two for each multiply-add of one image."""
        return 2 * self.counts.multiply_adds

    def floor(self, result: BatchResult) -> Floor | None:
        """The shortest time that this batch could take here; None where a limit of the device is not known."""
        return floor(self.counts, result.batch, self.peaks.compute.value, self.peaks.bandwidth.value)

    def above_floor(self, result: BatchResult) -> float | None:
        """How many times its floor the median call of this batch takes."""
        least = self.floor(result)
        return result.computing.latency.median / least.seconds if least else None


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes from ``1,8,32``, ascending, each once; InputError for anything else."""
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise InputError(f"--batch {text}: expected batch sizes with commas between, as in 1,8,32")
    sizes = sorted({int(part) for part in text.split(",")})
    if not 1 <= sizes[0] <= sizes[-1] <= MAX_BATCH:
        raise InputError(f"--batch {text}: every batch size must be from 1 to {MAX_BATCH}")
    return tuple(sizes)


def check_seconds(seconds: float) -> None:
    """InputError unless a batch size can be measured for so long."""
    if not 0 < seconds <= LONGEST:
        raise InputError(f"--seconds {seconds:g}: must be more than 0 and at most {LONGEST:g}")


def default_batches(manifest: Manifest, device: str) -> tuple[int, ...]:
    """1, 8 and 32, for a plan those that it takes as they are; its largest where it takes none of them."""
    limits = manifest.inputs[0].batch
    if device != "tensorrt" or limits is None:
        return DEFAULT_BATCHES
    return tuple(size for size in DEFAULT_BATCHES if limits[0] <= size <= limits[1]) or (limits[1],)


def benchmark(
    path: Path,
    device: str = "auto",
    batches: Sequence[int] | None = None,
    seconds: float = 3.0,
    layers: bool = False,
    reporter: Reporter | None = None,
    trusted_keys: TrustedKeys | None = None,
) -> Benchmark:
    """Measure the bundle at `path` on `device`, each batch size for `seconds`, and its layers if asked to.

    Errors: those of `runtime.load`; CheckFailed when the model's multiply-adds are not those that the manifest
    states, or no batch size could be measured; EnvironmentLacks when onnx is not installed.
    """
    check_seconds(seconds)
    stages = _Stages(reporter or Reporter())
    with load(path, device, trusted_keys=trusted_keys) as session, Prober(session, _ordinal(device)) as prober:
        bundle, manifest = session.bundle, session.bundle.manifest
        counts = counting.count(bundle.file(bundles.MODEL))
        counting.check(counts, manifest.counts.multiply_adds, path)
        peaks = stages.run("peak", prober.measure, _peak_text)
        bench = _Bench(session, seconds)
        results: list[BatchResult] = []
        for size in batches or default_batches(manifest, session.device):
            result = stages.attempt(f"batch {size}", partial(bench.measure, size), _batch_text)
            results += [result] if result else []
            peaks = stages.run("peak", prober.measure, _peak_text)
        if not results:
            raise next(iter(stages.failures.values()))
        times = None
        if layers:
            profile = partial(layer_times, session, _ordinal(device), counts, results[-1].batch, seconds)
            times = stages.attempt("layers", profile, _layers_text)
        return Benchmark(
            bundle=bundle,
            device=session.device,
            description=session.description,
            passed_over=session.passed_over,
            seconds=seconds,
            counts=counts,
            peaks=peaks,
            batches=tuple(results),
            failures=stages.failures,
            layers=times,
            no_device=_why_no_device(session),
            no_enqueue=_why_no_enqueue(session),
            numerics=try_examine(bundle),
            flushes_denormals=getattr(getattr(session.engine, "settings", None), "denormals_as_zero", False),
        )


def _ordinal(device: str) -> int:
    """The GPU's number in ``cuda:1``; the session was opened with it, so it is one."""
    return int(device.partition(":")[2] or 0)


def _why_no_device(session: Session) -> str | None:
    """Why there are no calls without copies; None where there are."""
    if session.device == "cpu":
        return "no copies: the CPU computes on the caller's memory"
    return None if session.gpu else "arrays on the GPU need cuda-python; pip install 'rxdeploy[gpu]' adds it"


def _why_no_enqueue(session: Session) -> str | None:
    """Why enqueuing is not told from computing; None where it is."""
    if session.device == "cuda" and session.gpu:
        return "ONNX Runtime returns only when the GPU is done"
    return _why_no_device(session)


class _Stages:
    """Tells the reporter of each part of the benchmark; `failures` are of the parts that need not succeed."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.failures: dict[str, RxDeployError] = {}

    def attempt(self, name: str, work: Callable[[], Any], text: Callable[[Any], str]) -> Any | None:
        """As `run`, but an error is noted, and None is what it gives."""
        try:
            return self.run(name, work, text)
        except RxDeployError as error:
            self.failures[name] = type(error)(f"{name} could not be measured: {error}")
        except MemoryError:
            self.failures[name] = EnvironmentLacks(f"{name} could not be measured: there is not enough memory")
        return None

    def run(self, name: str, work: Callable[[], Any], text: Callable[[Any], str]) -> Any:
        self._reporter.started(name)
        begin = time.perf_counter()
        try:
            result = work()
        except BaseException:
            self._reporter.finished(Stage(name, time.perf_counter() - begin, False, "failed"))
            raise
        self._reporter.finished(Stage(name, time.perf_counter() - begin, False, text(result)))
        return result


def _peak_text(peaks: Peaks) -> str:
    compute, bandwidth = peaks.compute.value, peaks.bandwidth.value
    return (
        (f"{compute / 1e9:.0f} GFLOP/s" if compute else "compute not measured")
        + ", "
        + (f"{bandwidth / 1e9:.0f} GB/s" if bandwidth else "bandwidth not measured")
    )


def _batch_text(result: BatchResult) -> str:
    series = result.computing
    return f"{series.throughput.images_per_s:.4g} images/s in {series.latency.calls} calls"


def _layers_text(times: LayerTimes) -> str:
    return f"batch {times.batch}, {times.runs} runs profiled"


@dataclass(frozen=True)
class _Bench:
    """Measures batch sizes."""

    session: Session
    seconds: float
    clock: Clock = time.perf_counter

    def measure(self, size: int) -> BatchResult:
        session, images = self.session, sample_images(self.session.bundle.manifest, size)
        session.prepare([size])

        def run() -> None:
            session.run(images)

        warm = warm_up(run, self.clock)
        host = self._series(size, repeat(run, self.seconds, self.clock))
        return BatchResult(size, warm, host, *self._on_device(images))

    def _on_device(self, images: NDArray) -> tuple[Series | None, Latency | None, Latency | None]:
        """Calls with arrays on the GPU, and their enqueuing and device time, as far as there is such a thing."""
        if _why_no_device(self.session):
            return None, None, None
        call = _DeviceCall(self.session, images, self.clock)
        try:
            warm_up(call, self.clock)
            call.forget()
            series = self._series(len(images), repeat(call, self.seconds, self.clock))
            told = bool(call.enqueue)
            return series, latency(call.enqueue) if told else None, latency(call.device) if told else None
        finally:
            call.close()

    def _series(self, size: int, durations: Sequence[float]) -> Series:
        return Series(latency(durations), throughput(durations, size))


@dataclass
class _DeviceCall:
    """A call with arrays on the GPU, waited for; notes how long enqueuing took, and the GPU, where that can be told."""

    session: Session
    images: NDArray
    clock: Clock
    enqueue: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        gpu = self.session.gpu
        assert gpu is not None
        self._source = gpu.empty(self.images.shape, self.images.dtype)
        self._source.fill(self.images)
        self._target = gpu.empty((len(self.images), self.session.bundle.manifest.num_classes), np.float32)
        self._stream, self._begin, self._end = gpu.stream(), gpu.event(timing=True), gpu.event(timing=True)
        self._ordered = _why_no_enqueue(self.session) is None

    def __call__(self) -> None:
        if not self._ordered:
            self.session.run(self._source, self._target)
            return
        stream = self._stream
        stream.record(self._begin)
        before = self.clock()
        self.session.run(self._source, self._target, stream)
        self.enqueue.append(self.clock() - before)
        stream.record(self._end)
        stream.synchronize()
        self.device.append(self._end.seconds_since(self._begin))

    def forget(self) -> None:
        """Start the notes afresh."""
        self.enqueue.clear()
        self.device.clear()

    def close(self) -> None:
        """Free what belongs to it on the GPU."""
        self._stream.synchronize()
        for owned in (self._stream, self._begin, self._end):
            owned.close()
