"""`rxdeploy bench` where a GPU is: arrays there and here, enqueuing against the device's own time, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standin.plan import VERSIONS, make_plan

from rxdeploy.bench import benchmark as benchmarks
from rxdeploy.bench import facts, measure, peaks, report
from rxdeploy.bench.benchmark import benchmark
from rxdeploy.engines.builder import Plan
from rxdeploy.engines.options import EngineOptions

MICROSECONDS = 3000  # that the plan takes for a batch


@pytest.fixture
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product and copies that the simulated GPU, which is a CPU, does in no time; its TensorRT has no builder."""

    def build(model: bytes, flavour: Any, options: EngineOptions, *_: Any) -> Plan:
        profiles = tuple((sizes.min, sizes.opt, sizes.max) for sizes in options.profiles)
        claims = {"flavour": flavour.name, "version": VERSIONS[flavour.module], **options.as_facts()}
        return Plan(make_plan(model, flavour=flavour.module, profiles=profiles), claims)

    monkeypatch.setattr(peaks, "build_plan", build)
    monkeypatch.setattr(peaks, "_SIDE_GPU", 64)
    monkeypatch.setattr(peaks, "_COPY_GPU", 1 << 20)
    monkeypatch.setattr(measure, "SHORTEST_SEARCH", 0.01)
    monkeypatch.setattr(measure, "LONGEST_SEARCH", 0.1)
    monkeypatch.setattr(measure, "WINDOW_SECONDS", 0.001)
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.1)


@pytest.fixture
def result(small_product: None, bundle_with_plan: Callable[..., Path]) -> benchmarks.Benchmark:
    bundle = bundle_with_plan(profiles=((1, 4, 8),), us_per_batch=MICROSECONDS)
    return benchmark(bundle, seconds=0.05, layers=True)


def test_a_plan_is_measured_with_and_without_copies(result: benchmarks.Benchmark) -> None:
    assert result.device == "tensorrt"
    assert [batch.batch for batch in result.batches] == [1, 8]  # 32 is more than the plan takes
    assert result.no_device is None and result.no_enqueue is None
    for batch in result.batches:
        assert batch.device is not None and batch.enqueue is not None and batch.device_time is not None
        assert batch.computing is batch.device
        # The device sleeps for the batch, the caller does not while it enqueues.
        assert batch.device_time.fastest >= MICROSECONDS / 1e6
        assert batch.enqueue.calls == batch.device_time.calls == batch.device.latency.calls
        assert batch.device.latency.mean >= batch.enqueue.mean


def test_the_limits_are_measured_on_the_device(result: benchmarks.Benchmark) -> None:
    limits = result.peaks
    assert limits.arithmetic == "fp32"
    assert limits.compute.value and limits.compute.how == "best of several 64 x 64 x 64 products in fp32 as a plan"
    assert limits.bandwidth.value and limits.bandwidth.how.startswith("best of several copies of 1 MiB on the device")
    assert limits.datasheet is None  # of a simulated GPU


def test_the_layers_of_a_plan_are_the_nodes_the_inspector_names(result: benchmarks.Benchmark) -> None:
    times = result.layers
    assert times is not None
    assert sum(layer.seconds for layer in times.layers) == pytest.approx(times.total)
    assert sum(layer.multiply_adds for layer in times.layers) == 8 * result.counts.multiply_adds
    rows = times.rows()
    assert set(rows) >= {"stem", "1x1", "grouped 3x3", "downsample", "head", "preprocessing", "pooling", "elementwise"}
    assert "not attributed" not in rows
    assert rows["stem"][0].nodes == ("conv1", "stem.relu")


def test_the_report_has_a_row_for_each(result: benchmarks.Benchmark) -> None:
    from rich.console import Console

    console = Console(width=110)
    with console.capture() as capture:
        for table in report.tables(result):
            console.print(table)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 110
    for row in ("with copies", "without copies", "until enqueued", "GPU's own time"):
        assert text.count(f"│ {row}") == 2
    assert "datasheet      this GPU is not in rxdeploy's list" in report.headline(result)
    batch = facts.as_facts(result)["batches"][0]
    assert {"host_arrays", "device_arrays", "enqueue", "device"} < {key for key, value in batch.items() if value}


def test_without_memory_a_limit_is_not_measured_and_the_rest_goes_on(
    small_product: None, bundle_with_plan: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "_matrix", _out_of_memory)
    found = benchmark(bundle_with_plan(profiles=((1, 1, 1),)), batches=(1,), seconds=0.01)
    assert found.peaks.compute.value is None
    assert found.peaks.compute.how == "not measured: there is not enough memory"
    assert found.floor(found.batches[0]) is None and found.peaks.bandwidth.value


def _out_of_memory(*_: Any) -> Any:
    raise MemoryError
