"""Many callers with single images: dynamic batching against a lock, a long soak, and what metrics cost.

On the digits model, on ONNX Runtime on the CPU; alternating within one run. Writes results/serving.json.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from machine import save
from numpy.typing import NDArray

import rxdeploy
from rxdeploy.cache import open_cache
from rxdeploy.cards import find_card
from rxdeploy.pipeline import Pipeline, Request
from rxdeploy.runtime import Batching
from rxdeploy.runtime.metrics import Metrics

MODEL = "digits_resnext14_8x8d"
IMAGES = 64  # different ones
CALLERS = 16
BATCHING = Batching(max_batch=8, max_delay_ms=2)  # of 16 callers, a batch for each of two cores
SOAK_CALLERS = 8
TOLERANCE = 1e-4  # relative L2 between a batched and an unbatched result: sums in another order
MEBI = 1 << 20


@click.command()
@click.option("--processes", default=11, show_default=True, help="For the batching.")
@click.option("--rounds", default=3, show_default=True, help="In each process.")
@click.option("--seconds", default=1.0, show_default=True, help="Of each way in each round.")
@click.option("--requests", default=200_000, show_default=True, help="In the soak.")
def main(processes: int, rounds: int, seconds: float, requests: int) -> None:
    """Measure all three."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(Path(folder) / "bundle")
        result = {
            "model": f"{MODEL}, fp32, ONNX Runtime on CPU",
            "batching": batching(bundle, processes, rounds, seconds),
            "metrics": metrics_cost(bundle),
            "soak": soak(bundle, requests),
        }
    for name in ("batching", "metrics", "soak"):
        click.echo(f"{name}: {result[name]}")
    click.echo(save("serving", result))


def build(output: Path) -> Path:
    request = Request(find_card(MODEL), "fp32", "uint8", target="onnxruntime")
    with open_cache() as cache:
        Pipeline(request, cache).build(output)
    return output


def digits(session: rxdeploy.Session) -> NDArray[np.uint8]:
    size = session.bundle.manifest.preprocessing.image_size
    return np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), np.uint8)


def batching(bundle: Path, processes: int, rounds: int, seconds: float) -> dict[str, Any]:
    """16 threads that submit single images, against 16 that call `run` with them behind a lock.

    In several processes: how fast one computes depends on more than the code (where its memory lies, how its
    threads fall into step), so one process says little.
    """
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(processes):
        with context.Pool(1) as pool:
            found.append(pool.apply(alternate, (bundle, rounds, seconds)))
    one = {
        key: {name: [each[key][name] for each in found] for name in found[0][key]}
        for key in ("requests_per_second", "p50_ms", "p99_ms")
    }
    middle = {key: {name: statistics.median(each) for name, each in ways.items()} for key, ways in one.items()}
    ratios = [a / b for a, b in zip(*one["requests_per_second"].values(), strict=True)]
    limits = [BATCHING.max_delay_ms + 2 * each["a_batch_ms"] for each in found]
    return {
        "callers": CALLERS,
        "max_batch": BATCHING.max_batch,
        "max_delay_ms": BATCHING.max_delay_ms,
        **middle,
        "ratio": statistics.median(ratios),
        "ratio_by_process": ratios,
        "requests_per_second_by_process": one["requests_per_second"],
        "p99_ms_by_process": one["p99_ms"],
        "a_batch_ms": statistics.median(each["a_batch_ms"] for each in found),
        "max_delay_and_two_batches_ms": statistics.median(limits),
        "p99_over_that": statistics.median(
            p99 / limit for p99, limit in zip(one["p99_ms"]["submit"], limits, strict=True)
        ),
        "mean_batch": statistics.median(each["mean_batch"] for each in found),
    }


def alternate(bundle: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Both ways by turns, in this process: medians of the rounds."""
    with rxdeploy.load(bundle, "cpu", batching=BATCHING) as session, rxdeploy.load(bundle, "cpu") as alone:
        images, lock = digits(session), threading.Lock()

        def locked(image: NDArray[np.uint8]) -> None:
            with lock:
                alone.run(image[None])

        ways: dict[str, Callable[[NDArray[np.uint8]], Any]] = {
            "submit": lambda image: session.submit(image).result(),
            "run behind a lock": locked,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        latencies: dict[str, list[list[float]]] = {name: [] for name in ways}
        for round_ in range(rounds + 1):
            for name, way in ways.items():
                taken, elapsed = hammer(way, images, seconds if round_ else 0.2)
                if round_:
                    rates[name].append(len(taken) / elapsed)
                    latencies[name].append(taken)
        snapshot = session.metrics.snapshot()

    def percentile(percent: float) -> dict[str, float]:
        return {
            name: statistics.median(float(np.percentile(each, percent)) for each in found) * 1000
            for name, found in latencies.items()
        }

    sizes = snapshot.batches
    return {
        "requests_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "p50_ms": percentile(50),
        "p99_ms": percentile(99),
        "a_batch_ms": snapshot.runs.p50 * 1000,
        "mean_batch": sum(size * count for size, count in sizes.items()) / sum(sizes.values()),
    }


def hammer(
    way: Callable[[NDArray[np.uint8]], Any], images: NDArray[np.uint8], seconds: float
) -> tuple[list[float], float]:
    """Each request's time, of 16 threads that send the next when they have the last one's result; the whole time."""
    taken: list[list[float]] = [[] for _ in range(CALLERS)]
    stop = threading.Event()

    def caller(number: int) -> None:
        index = number
        while not stop.is_set():
            begin = time.perf_counter()
            way(images[index % IMAGES])
            taken[number].append(time.perf_counter() - begin)
            index += CALLERS

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return [each for found in taken for each in found], time.perf_counter() - begin


def metrics_cost(bundle: Path) -> dict[str, Any]:
    """`run` on one image with its metrics, over `run` with metrics that count nothing."""

    class Nothing(Metrics):
        def record_run(self, images: int, seconds: float | None) -> None:
            pass

    with rxdeploy.load(bundle, "cpu") as session:
        image, real, nothing = digits(session)[:1], session.metrics, Nothing()
        times: dict[str, list[float]] = {"counted": [], "not counted": []}
        for _ in range(2000):
            for name, metrics in (("counted", real), ("not counted", nothing)):
                session.metrics = metrics
                begin = time.perf_counter()
                session.run(image)
                times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(found) * 1e6 for name, found in times.items()}
    return {"run_us": median, "ratio": median["counted"] / median["not counted"]}


def soak(bundle: Path, requests: int) -> dict[str, Any]:
    """Requests from 8 threads: every result against the single-threaded one, and memory over time."""
    process = psutil.Process()
    with rxdeploy.load(bundle, "cpu", batching=Batching(max_batch=8, max_delay_ms=1)) as session:
        images = digits(session)
        expected = np.concatenate([session.run(image[None]) for image in images])
        results, wrong, memory = [0] * SOAK_CALLERS, [0] * SOAK_CALLERS, []
        worst = [0.0] * SOAK_CALLERS

        def caller(number: int) -> None:
            rng = np.random.default_rng(number)
            for _ in range(requests // SOAK_CALLERS):
                index = int(rng.integers(IMAGES))
                found, right = session.submit(images[index]).result(), expected[index]
                error = float(np.linalg.norm(found - right) / np.linalg.norm(right))
                worst[number] = max(worst[number], error)
                wrong[number] += int(error > TOLERANCE or found.argmax() != right.argmax())
                results[number] += 1

        threads = [threading.Thread(target=caller, args=(number,)) for number in range(SOAK_CALLERS)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append((sum(results), process.memory_info().rss))
            time.sleep(0.1)
        elapsed = time.perf_counter() - begin
        gc.collect()
        snapshot = session.metrics.snapshot()
    quarters = [
        statistics.median(rss for done, rss in memory if quarter <= done / requests * 4 < quarter + 1) / MEBI
        for quarter in range(4)
    ]
    return {
        "requests": requests,
        "callers": SOAK_CALLERS,
        "seconds": elapsed,
        "results": sum(results),
        "counted_by_metrics": snapshot.requests.count,
        "in_batches": sum(size * count for size, count in snapshot.batches.items()),
        "wrong": sum(wrong),
        "largest_relative_l2_to_single_threaded": max(worst),
        "rss_mib_by_quarter": quarters,
        "last_over_second_quarter": quarters[3] / quarters[1],
    }


if __name__ == "__main__":
    main()
