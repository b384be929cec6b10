"""The whole benchmark: on a real bundle, and with an engine whose speed is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from rxdeploy.bench import benchmark as benchmarks
from rxdeploy.bench.benchmark import benchmark, check_seconds, default_batches, parse_batches
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import open_bundle
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.pipeline import Reporter, Stage
from rxdeploy.runtime.session import Session

pytest.importorskip("onnx", reason="counting reads the model with onnx")
pytest.importorskip("onnxruntime", reason="the bundle runs on it")
Bundles = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "sizes"), [("1", (1,)), ("8,1,32", (1, 8, 32)), ("4,4,2,4", (2, 4)), ("4096", (4096,))]
)
def test_batch_sizes_are_sorted_and_merged(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_batches(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "0", "1,0", "-1", "1,,2", "1, 2", "one", "1.5", "4097", "9999999", "1,", "\u0661"]
)
def test_what_is_no_batch_size(text: str) -> None:
    with pytest.raises(InputError, match=r"^--batch "):
        parse_batches(text)


@pytest.mark.parametrize("seconds", [0, -1, 601, float("nan"), float("inf")])
def test_what_is_no_time_to_measure_for(seconds: float) -> None:
    with pytest.raises(InputError, match=r"^--seconds "):
        check_seconds(seconds)


def test_default_batch_sizes_are_what_the_plan_takes(bundle: Bundles) -> None:
    manifest = open_bundle(bundle()).manifest

    def taking(*limits: int) -> bundles.Manifest:
        (tensor,) = manifest.inputs
        return msgspec.structs.replace(manifest, inputs=(msgspec.structs.replace(tensor, batch=limits),))

    assert default_batches(manifest, "cpu") == default_batches(taking(1, 4), "cuda") == (1, 8, 32)
    assert default_batches(taking(1, 32), "tensorrt") == (1, 8, 32)
    assert default_batches(taking(2, 16), "tensorrt") == (8,)
    assert default_batches(taking(4, 6), "tensorrt") == (6,)


class Told(Reporter):
    """What a reporter is told."""

    def __init__(self) -> None:
        self.started_, self.finished_ = [], []

    def started(self, stage: str) -> None:
        self.started_.append(stage)

    def finished(self, stage: Stage) -> None:
        self.finished_.append((stage.name, stage.detail))


@pytest.mark.parametrize("input_kind", ["uint8", "float32"])
def test_a_real_bundle(bundle: Bundles, quick: None, input_kind: str) -> None:
    told = Told()
    found = benchmark(bundle("fp32", input_kind), "cpu", (1, 3), seconds=0.02, layers=True, reporter=told)
    assert [result.batch for result in found.batches] == [1, 3] and not found.failures
    assert found.counts.multiply_adds == found.bundle.manifest.counts.multiply_adds
    for result in found.batches:
        assert result.computing is result.host
        assert result.device is result.enqueue is result.device_time is None
        speed = result.host.throughput
        assert speed.images_per_s == pytest.approx(result.batch / result.host.latency.mean)
        floor = found.floor(result)
        assert floor and floor.compute == pytest.approx(
            2 * found.counts.multiply_adds * result.batch / found.peaks.compute.value
        )
        assert found.above_floor(result) == pytest.approx(result.host.latency.median / floor.seconds)
    assert found.no_device == found.no_enqueue == "no copies: the CPU computes on the caller's memory"
    assert found.layers and found.layers.batch == 3
    assert told.started_ == ["peak", "batch 1", "peak", "batch 3", "peak", "layers"]
    assert [name for name, _ in told.finished_] == told.started_


def test_a_batch_that_fails_leaves_the_others(bundle: Bundles, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Session.run

    def failing(self: Session, images: Any, *more: Any) -> Any:
        if len(images) == 2:
            raise EnvironmentLacks("the GPU has not enough free memory")
        if len(images) == 3:
            raise MemoryError
        return run(self, images, *more)

    monkeypatch.setattr(Session, "run", failing)
    path, told = bundle(), Told()
    found = benchmark(path, "cpu", (1, 2, 3, 4), seconds=0.01, reporter=told)
    assert [result.batch for result in found.batches] == [1, 4]
    assert {size: (type(error), str(error)) for size, error in found.failures.items()} == {
        "batch 2": (EnvironmentLacks, "batch 2 could not be measured: the GPU has not enough free memory"),
        "batch 3": (EnvironmentLacks, "batch 3 could not be measured: there is not enough memory"),
    }
    assert ("batch 2", "failed") in told.finished_
    with pytest.raises(EnvironmentLacks, match="batch 2 could not be measured"):
        benchmark(path, "cpu", (2, 3), seconds=0.01)


def test_layers_that_cannot_be_told_leave_the_batches(
    bundle: Bundles, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise EnvironmentLacks("it tells nothing")

    monkeypatch.setattr(benchmarks, "layer_times", failing)
    found = benchmark(bundle(), "cpu", (1,), seconds=0.01, layers=True)
    assert found.batches and found.layers is None
    assert str(found.failures["layers"]) == "layers could not be measured: it tells nothing"


def test_a_model_with_other_counts_than_its_manifest(bundle: Bundles, quick: None, tmp_path: Path) -> None:
    """As if the model inside came from another card."""
    opened = open_bundle(bundle())
    counts = msgspec.structs.replace(opened.manifest.counts, multiply_adds=opened.manifest.counts.multiply_adds - 1)
    manifest = msgspec.structs.replace(opened.manifest, counts=counts)
    bundles.write_bundle(tmp_path / "other", manifest, {bundles.MODEL: opened.file(bundles.MODEL)}, overwrite=False)
    with pytest.raises(CheckFailed, match="multiply-adds"):
        benchmark(tmp_path / "other", "cpu", (1,), seconds=0.01)


# An engine whose speed is known


class Simulated:
    """A session whose calls take known times on a clock of their own: 10 ms and 1 ms an image, 1 ms to enqueue."""

    def __init__(self, bundle: bundles.Bundle, device: str) -> None:
        self.bundle, self.device, self.now = bundle, device, 0.0
        self.gpu = None if device == "cpu" else self
        self.prepared: list[int] = []

    def clock(self) -> float:
        return self.now

    def prepare(self, sizes: list[int]) -> None:
        self.prepared += sizes

    def run(self, images: Any, out: Any = None, stream: Any = None) -> None:
        size, copies = images.shape[0], isinstance(images, np.ndarray)
        assert images.dtype == np.uint8
        self.now += 1e-3 if stream else 10e-3 + size * 1e-3 + (5e-3 if copies and self.gpu else 0)
        self.busy_until = self.now + 10e-3 + size * 1e-3

    # What of a Gpu is used

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return SimpleNamespace(shape=shape, dtype=np.dtype(dtype), fill=lambda values: None)

    def stream(self) -> Any:
        return SimpleNamespace(record=self._record, synchronize=self._wait, close=lambda: None)

    def event(self, timing: bool) -> Any:
        assert timing
        moment = SimpleNamespace(at=0.0, close=lambda: None)
        moment.seconds_since = lambda earlier: moment.at - earlier.at
        return moment

    busy_until = 0.0

    def _record(self, event: Any) -> None:
        event.at = max(self.now, self.busy_until)

    def _wait(self) -> None:
        self.now = max(self.now, self.busy_until)


def measured(bundle: Path, device: str, size: int) -> tuple[benchmarks.BatchResult, Simulated]:
    session = Simulated(open_bundle(bundle), device)
    return benchmarks._Bench(session, 3.0, session.clock).measure(size), session  # type: ignore[arg-type]


def test_known_durations_on_a_cpu(bundle: Bundles) -> None:
    result, session = measured(bundle(), "cpu", 5)
    assert session.prepared == [5]
    assert result.host.latency.median == pytest.approx(15e-3)
    assert result.host.latency.calls == 200
    assert result.host.throughput.images_per_s == pytest.approx(5 / 15e-3)
    assert result.warm_up.stable and result.device is None


def test_known_durations_of_a_plan(bundle: Bundles) -> None:
    """With copies 5 ms more than the device takes; enqueuing 1 ms of the 1 + 14 ms that a call without them takes."""
    result, _ = measured(bundle(), "tensorrt", 4)
    assert result.host.latency.median == pytest.approx(19e-3)
    assert result.device and result.enqueue and result.device_time
    assert result.device.latency.median == pytest.approx(15e-3)
    assert result.enqueue.median == pytest.approx(1e-3)
    assert result.device_time.median == pytest.approx(15e-3)
    assert result.enqueue.calls == result.device_time.calls == result.device.latency.calls == 201
    assert result.computing is result.device


def test_onnx_runtime_on_a_gpu_tells_no_enqueuing(bundle: Bundles) -> None:
    result, _ = measured(bundle(), "cuda", 4)
    assert result.host.latency.median == pytest.approx(19e-3)
    assert result.device and result.device.latency.median == pytest.approx(14e-3)
    assert result.enqueue is None and result.device_time is None


@pytest.mark.parametrize(
    ("device", "gpu", "no_device", "no_enqueue"),
    [
        ("cpu", False, "no copies: the CPU", "no copies: the CPU"),
        ("cuda", True, None, "ONNX Runtime returns only when the GPU is done"),
        ("cuda", False, "arrays on the GPU need cuda-python", "arrays on the GPU need cuda-python"),
        ("tensorrt", True, None, None),
    ],
)
def test_what_is_missing_has_a_reason(device: str, gpu: bool, no_device: str | None, no_enqueue: str | None) -> None:
    session: Any = SimpleNamespace(device=device, gpu=object() if gpu else None)
    for found, expected in (
        (benchmarks._why_no_device(session), no_device),
        (benchmarks._why_no_enqueue(session), no_enqueue),
    ):
        assert (found or "").startswith(expected or "") and (found is None) == (expected is None)
