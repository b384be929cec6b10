"""Histograms against NumPy on the raw samples, and the text format against Prometheus' own parser."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from rxdeploy.errors import InputError
from rxdeploy.runtime.metrics import Histogram, Metrics, Snapshot, exposition

COUNTERS = ("error", "failed", "rejected", "expired", "cancelled")
HALF_BUCKET = 2 ** (1 / 32)
RNG = np.random.default_rng(11)
SAMPLES = {
    "log-normal": RNG.lognormal(-6, 1.5, 5000),
    "uniform": RNG.uniform(1e-3, 5e-3, 1000),
    "two modes": np.concatenate([RNG.normal(1e-3, 1e-5, 950), RNG.normal(0.5, 0.01, 50)]),
    "constant": np.full(100, 0.0123),
    "one": np.array([3.7e-4]),
    "whole range": np.geomspace(1e-6, 1000, 4001),
    "octaves": 1e-6 * 2.0 ** np.arange(30),
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as they can, so that an update without a lock is lost soon."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def filled(samples: NDArray[np.float64]) -> Histogram:
    histogram = Histogram()
    for seconds in samples:
        histogram.record(float(seconds))
    return histogram


@pytest.mark.parametrize("q", [0, 1, 50, 90, 99, 99.9, 100])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
def test_percentiles_are_numpys_within_half_a_bucket(samples: NDArray[np.float64], q: float) -> None:
    expected = np.percentile(samples, q, method="inverted_cdf")
    ratio = filled(samples).percentile(q) / expected
    assert 1 / HALF_BUCKET * (1 - 1e-12) <= ratio <= HALF_BUCKET * (1 + 1e-12)


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
def test_what_is_exact(samples: NDArray[np.float64]) -> None:
    histogram = filled(samples)
    assert histogram.count == len(samples)
    assert histogram.sum == pytest.approx(samples.sum(), rel=1e-12)
    assert histogram.max == samples.max()
    for edge, below in histogram.cumulative():
        assert below == np.count_nonzero(samples <= edge)


def test_beyond_the_range() -> None:
    histogram = filled(np.array([0.0, 1e-9, 2e-9, 5000.0, 9000.0]))
    assert histogram.percentile(0) == 0
    assert histogram.percentile(40) <= 1e-6
    assert histogram.percentile(100) == 9000
    assert histogram.cumulative()[0] == (1e-6, 3)
    assert histogram.cumulative()[-1] == (pytest.approx(1073.7, abs=0.1), 3)


def test_nothing_recorded() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.sum, histogram.max, histogram.percentile(50)) == (0, 0, 0, 0)


@pytest.mark.parametrize("q", [-1, 100.1, math.nan])
def test_no_such_percentile(q: float) -> None:
    with pytest.raises(InputError, match="percentile"):
        Histogram().percentile(q)


@pytest.mark.parametrize("names", [("log-normal", "two modes"), ("two modes", "log-normal")])
def test_merging_is_as_if_recorded_in_one(names: tuple[str, str]) -> None:
    a, b = (SAMPLES[name] for name in names)
    merged, both = filled(a), filled(np.concatenate([a, b]))
    merged.merge(filled(b))
    assert merged.cumulative() == both.cumulative()
    assert [merged.percentile(q) for q in (0, 50, 99, 100)] == [both.percentile(q) for q in (0, 50, 99, 100)]
    assert (merged.count, merged.max) == (both.count, both.max)
    assert merged.sum == pytest.approx(both.sum, rel=1e-12)


def test_merging_nothing_changes_nothing() -> None:
    histogram = filled(SAMPLES["uniform"])
    before = histogram.cumulative(), histogram.percentile(0), histogram.max
    histogram.merge(Histogram())
    assert (histogram.cumulative(), histogram.percentile(0), histogram.max) == before


def in_threads(work: Callable[[int], object], threads: int = 8) -> None:
    """`work(i)` in that many threads, all let go at once."""
    barrier = threading.Barrier(threads)

    def start(i: int) -> None:
        barrier.wait()
        work(i)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(start, i) for i in range(threads)]:
            done.result()


@pytest.mark.usefixtures("eager_switching")
def test_no_count_is_lost_between_threads() -> None:
    histogram, metrics = Histogram(), Metrics()

    def work(thread: int) -> None:
        for i in range(1000):
            histogram.record(2.0**-thread)
            metrics.record_run(3, 2.0**-thread)
            metrics.record_request(1)
            metrics.record_batch(i % 4, (0.25, 0.5))
            metrics.record_run(0, None)
            for name in COUNTERS:
                getattr(metrics, f"count_{name}")()

    in_threads(work)
    assert histogram.count == 8000
    assert histogram.sum == 1000 * sum(2.0**-i for i in range(8))
    snapshot = metrics.snapshot()
    assert (snapshot.images, snapshot.runs.count, snapshot.requests.count) == (24000, 8000, 24000)
    assert snapshot.runs.sum == histogram.sum
    assert snapshot.batches == dict.fromkeys(range(4), 2000)
    assert snapshot.enqueued == snapshot.errors == snapshot.failed == 8000
    assert snapshot.rejected == snapshot.expired == snapshot.cancelled == 8000


@pytest.mark.usefixtures("eager_switching")
def test_a_snapshot_is_of_one_moment() -> None:
    metrics = Metrics()

    def work(thread: int) -> None:
        for _ in range(300):
            if thread == 0:
                snapshot = metrics.snapshot()
                assert snapshot.images == 2 * snapshot.runs.count
                assert snapshot.runs.sum == 0.5 * snapshot.runs.count
            else:
                metrics.record_run(2, 0.5)

    in_threads(work, 4)


def test_rates() -> None:
    clock = Clock()
    metrics = Metrics(clock)

    def rates() -> tuple[float, float]:
        snapshot = metrics.snapshot()
        assert snapshot.uptime == clock.now
        return snapshot.images_per_second, snapshot.images_per_second_recent

    assert rates() == (0, 0)
    for half_second in range(8):  # 20 images/s for 4 s
        clock.now = half_second / 2
        metrics.record_run(10, 0.1)
    clock.now = 4.0
    assert rates() == (20, 20)
    clock.now = 12.5  # the window begins at second 2
    assert rates() == (80 / 12.5, 40 / 10.5)
    clock.now = 14.0  # nothing of second 3 any more
    assert rates() == (80 / 14, 0)
    for second in range(100, 140):  # 5 images/s; every counter of the ring is used again, three times
        clock.now = float(second)
        metrics.record_run(5, 0.1)
    clock.now = 140.0
    assert rates() == ((80 + 200) / 140, 5)


def test_the_snapshot_has_what_was_recorded() -> None:
    metrics = Metrics()
    for seconds in SAMPLES["uniform"]:
        metrics.record_run(1, float(seconds))
    for seconds in SAMPLES["log-normal"]:
        metrics.record_request(float(seconds))
    metrics.record_batch(7)
    metrics.record_batch(2)
    metrics.record_batch(7)
    metrics.watch_queue(lambda: (3, 9))
    snapshot = metrics.snapshot()
    for latency, name in ((snapshot.runs, "uniform"), (snapshot.requests, "log-normal")):
        samples = SAMPLES[name]
        percentiles = np.percentile(samples, [50, 90, 99, 99.9], method="inverted_cdf")
        assert [latency.p50, latency.p90, latency.p99, latency.p999] == pytest.approx(percentiles, rel=0.022)
        assert (latency.count, latency.max) == (len(samples), samples.max())
        assert [latency.mean, latency.sum] == pytest.approx([samples.mean(), samples.sum()], rel=1e-12)
    assert list(snapshot.batches.items()) == [(2, 1), (7, 2)]
    assert (snapshot.queue_depth, snapshot.queue_depth_max) == (3, 9)


def test_json() -> None:
    metrics = Metrics()
    metrics.record_run(4, 0.25)
    metrics.record_batch(4, [0.5])
    found = json.loads(metrics.json())
    assert found["images"] == 4
    assert found["batches"] == {"4": 1}
    assert (found["runs"]["max"], found["requests"]["p99"]) == (0.25, 0.5)
    assert set(found) == set(Snapshot.__struct_fields__)


# Prometheus


Samples = dict[str, list[tuple[dict[str, str], float]]]


def parsed(text: str) -> tuple[dict[str, str], Samples]:
    """Types by family, and samples by name, as Prometheus' own library reads them."""
    parser = pytest.importorskip("prometheus_client.parser", reason="the reference is Prometheus' own parser")
    types, samples = {}, {}
    for family in parser.text_string_to_metric_families(text):
        assert family.name not in types  # a family that comes twice is an error for Prometheus
        assert family.documentation
        types[family.name] = family.type
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return types, samples


def busy() -> Metrics:
    metrics = Metrics()
    for seconds in SAMPLES["two modes"]:
        metrics.record_run(2, float(seconds))
    for size in (1, 1, 2, 3, 8, 9, 64, 2000):
        metrics.record_batch(size, SAMPLES["octaves"])
    metrics.watch_queue(lambda: (5, 17))
    for number, name in enumerate(COUNTERS, 2):
        getattr(metrics, f"count_{name}")(np.int64(number))
    metrics.record_run(9, None)
    return metrics


def test_prometheus_counters_and_gauges() -> None:
    metrics = busy()
    types, samples = parsed(metrics.prometheus())
    assert metrics.prometheus().endswith("\n")
    values = {name: found[0][1] for name, found in samples.items() if len(found) == 1}
    expected = {"errors": 2, "failed": 3, "rejected": 4, "expired": 5, "cancelled": 6, "images": 2009, "enqueued": 1}
    expected = {f"{name}_total": value for name, value in expected.items()}
    for name, value in (expected | {"queue_depth": 5, "queue_depth_max": 17}).items():
        assert values[f"rxdeploy_{name}"] == value
        assert types[f"rxdeploy_{name.removesuffix('_total')}"] == ("counter" if name.endswith("_total") else "gauge")
    assert values["rxdeploy_start_time_seconds"] == metrics.snapshot().started


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("run_seconds", SAMPLES["two modes"]),
        ("request_seconds", np.tile(SAMPLES["octaves"], 8)),
        ("batch_size", np.array([1, 1, 2, 3, 8, 9, 64, 2000])),
    ],
)
def test_prometheus_histograms(name: str, recorded: NDArray) -> None:
    types, samples = parsed(busy().prometheus({"model": "m"}))
    assert types[f"rxdeploy_{name}"] == "histogram"
    buckets = [(float(labels["le"]), value) for labels, value in samples[f"rxdeploy_{name}_bucket"]]
    assert len(buckets) > 10
    assert buckets[-1] == (math.inf, len(recorded))
    assert buckets == [(edge, np.count_nonzero(recorded <= edge)) for edge, _ in sorted(buckets)]
    assert samples[f"rxdeploy_{name}_count"] == [({"model": "m"}, len(recorded))]
    assert samples[f"rxdeploy_{name}_sum"] == [({"model": "m"}, pytest.approx(recorded.sum(), rel=1e-12))]


def test_prometheus_labels() -> None:
    labels = {"model": 'a "quoted"\\name,\nin two lines = {}', "zone": "ü", "_1": ""}
    _, samples = parsed(busy().prometheus(labels))
    for name, found in samples.items():
        for with_labels, _ in found:
            assert {key: value for key, value in with_labels.items() if key != "le"} == labels, name


@pytest.mark.parametrize("name", ["le", "__name__", "1st", "a-b", "", "a\n", "ä"])
def test_label_names_that_prometheus_forbids(name: str) -> None:
    with pytest.raises(InputError, match="label"):
        Metrics().prometheus({name: "x"})


def test_several_sessions_in_one_text() -> None:
    a, b = Metrics(), Metrics()
    a.record_run(1, 0.5)
    b.record_run(7, 0.5)
    text = exposition([({"model": "a"}, a.snapshot()), ({"model": "b"}, b.snapshot())])
    _, samples = parsed(text)
    assert samples["rxdeploy_images_total"] == [({"model": "a"}, 1), ({"model": "b"}, 7)]
    assert [labels["model"] for labels, _ in samples["rxdeploy_run_seconds_bucket"]] == ["a"] * 32 + ["b"] * 32
