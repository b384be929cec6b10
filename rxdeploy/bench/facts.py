"""A benchmark for programs: plain values, with the unit in every key. What was not measured is null."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rxdeploy import atomic
from rxdeploy.bench import machine, measure, statistics
from rxdeploy.bench.benchmark import BatchResult, Benchmark, Series
from rxdeploy.bench.layers import LayerTimes
from rxdeploy.bench.numerics import Numerics
from rxdeploy.bench.statistics import Latency
from rxdeploy.errors import InputError, from_os_error

SCHEMA = 1

METHOD = {
    "warm_up": (
        f"calls until the medians of {measure.AGREEING_WINDOWS} successive windows lie within "
        f"{measure.AGREEMENT:.0%} (a window: {measure.WINDOW_CALLS} calls and {measure.WINDOW_SECONDS} s at least), "
        f"for {measure.WARM_UP_SECONDS:g} s at most"
    ),
    "percentiles": "nearest rank: the smallest sample that at least that share of the samples do not exceed; "
    "null where no sample lies beyond it",
    "interval": (
        f"95%, from batch means: up to {statistics.MOST_BLOCKS} blocks of successive calls, Student's t-distribution "
        "over the blocks' mean durations, inverted"
    ),
    "host_arrays": "NumPy arrays in and out, complete on return; on a GPU this includes the copies",
    "device_arrays": "arrays on the GPU in and out, waited for after each call",
    "enqueue": "time for run with a stream to return; device: CUDA events before and after it on that stream",
    "counted_flops": "2 x multiply-adds of convolutions and matrix products, counted on model.onnx",
    "card_flops": "as the model's card publishes them: neither multiply-adds nor twice that; see docs/flops.md",
    "numerics": "one of the images on ONNX Runtime, every float tensor of model.onnx and its float32 constants; "
    "denormal: float32, not zero, magnitude below 2^-126",
    "floor": "max(counted FLOPs / measured peak, (weights once + input + output) / measured bandwidth)",
}


def as_facts(bench: Benchmark) -> dict[str, Any]:
    """The benchmark as plain values; what was not measured is null, with the reason beside it."""
    manifest = bench.bundle.manifest
    return {
        "schema": SCHEMA,
        "machine": machine.facts(),
        "bundle": {
            "path": str(bench.bundle.path),
            "digest": manifest.digest,
            "model": manifest.model,
            "precision": manifest.precision,
            "weights": manifest.weights.source,
            "target": manifest.target.name,
        },
        "device": {
            "kind": bench.device,
            "description": bench.description,
            "passed_over": list(bench.passed_over),
        },
        "seconds_per_batch_size": bench.seconds,
        "counts": {
            "multiply_adds_per_image": bench.counts.multiply_adds,
            "multiply_adds_per_image_by_kind": bench.counts.by_kind(),
            "counted_flops_per_image": bench.counted_flops,
            "card_flops_per_image": bench.card_flops,
            "weight_bytes": bench.counts.weight_bytes,
            "input_bytes_per_image": bench.counts.input_bytes,
            "output_bytes_per_image": bench.counts.output_bytes,
        },
        "peaks": _peak_facts(bench),
        "batches": [_batch_facts(bench, result) for result in bench.batches],
        "failures": [{"what": name, "error": str(error)} for name, error in bench.failures.items()],
        "no_device_arrays_because": bench.no_device,
        "no_enqueue_and_device_time_because": bench.no_enqueue,
        "layers": _layer_facts(bench.layers) if bench.layers else None,
        "numerics": _numerics_facts(bench.numerics),
        "method": METHOD,
    }


def _peak_facts(bench: Benchmark) -> dict[str, Any]:
    peaks, sheet = bench.peaks, bench.peaks.datasheet
    return {
        "arithmetic": peaks.arithmetic,
        "measured_flop_per_s": peaks.compute.value,
        "measured_flop_per_s_how": peaks.compute.how,
        "measured_bandwidth_byte_per_s": peaks.bandwidth.value,
        "measured_bandwidth_byte_per_s_how": peaks.bandwidth.how,
        "datasheet_dense_flop_per_s": peaks.datasheet_compute,
        "datasheet_bandwidth_byte_per_s": sheet.bandwidth if sheet else None,
        "datasheet_source": sheet.source if sheet else None,
    }


def _batch_facts(bench: Benchmark, result: BatchResult) -> dict[str, Any]:
    return {
        "batch": result.batch,
        "warm_up": {
            "stable": result.warm_up.stable,
            "calls": result.warm_up.calls,
            "seconds": result.warm_up.seconds,
        },
        "host_arrays": _series_facts(bench, result.host),
        "device_arrays": _series_facts(bench, result.device) if result.device else None,
        "enqueue": _latency_facts(result.enqueue) if result.enqueue else None,
        "device": _latency_facts(result.device_time) if result.device_time else None,
        "floor": _floor_facts(bench, result),
    }


def _series_facts(bench: Benchmark, series: Series) -> dict[str, Any]:
    speed = series.throughput
    return {
        **_latency_facts(series.latency),
        "images_per_s": speed.images_per_s,
        "images_per_s_95_percent_interval": [speed.low, speed.high],
        "interval_blocks": speed.blocks,
        "card_flop_per_s": _times(speed.images_per_s, bench.card_flops),
        "counted_flop_per_s": speed.images_per_s * bench.counted_flops,
        "share_of_measured_peak": share_of(bench, series, bench.peaks.compute.value),
        "share_of_datasheet_peak": share_of(bench, series, bench.peaks.datasheet_compute),
    }


def _latency_facts(latency: Latency) -> dict[str, Any]:
    return {
        "calls": latency.calls,
        **{f"p{percent:g}_s": seconds for percent, seconds in latency.percentiles.items()},
        "mean_s": latency.mean,
        "fastest_s": latency.fastest,
    }


def _floor_facts(bench: Benchmark, result: BatchResult) -> dict[str, Any] | None:
    floor = bench.floor(result)
    if floor is None:
        return None
    return {
        "seconds": floor.seconds,
        "bound_by": floor.bound,
        "compute_seconds": floor.compute,
        "memory_seconds": floor.memory,
        "median_over_floor": bench.above_floor(result),
    }


def _layer_facts(times: LayerTimes) -> dict[str, Any]:
    return {
        "batch": times.batch,
        "runs": times.runs,
        "method": times.method,
        "seconds_per_run": times.total,
        "kinds": [
            {
                "kind": row,
                "layers": len(layers),
                "seconds": sum(layer.seconds for layer in layers),
                "multiply_adds": sum(layer.multiply_adds for layer in layers),
            }
            for row, layers in times.rows().items()
        ],
        "layers": [
            {
                "name": layer.name,
                "kind": layer.row,
                "nodes": list(layer.nodes),
                "seconds": layer.seconds,
                "multiply_adds": layer.multiply_adds,
            }
            for layer in times.layers
        ],
    }


def _numerics_facts(found: Numerics | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"tensors": None, "because": found}
    return {
        "tensors": found.tensors,
        "tensors_not_finite": list(found.not_finite),
        "denormal_share_by_tensor": found.denormal,
        "denormal_share_by_constant": found.denormal_constants,
    }


def _times(value: float, factor: float | None) -> float | None:
    return value * factor if factor else None


def share_of(bench: Benchmark, series: Series, peak: float | None) -> float | None:
    """The counted FLOP/s of a series as a share of `peak`, in operations a second."""
    return series.throughput.images_per_s * bench.counted_flops / peak if peak else None


def write_json(bench: Benchmark, destination: Path) -> None:
    """Write the benchmark's facts to a file, by rename; InputError or EnvironmentLacks when that fails."""
    # msgspec writes NaN and infinity as null, which JSON has no word for.
    data = msgspec.json.format(msgspec.json.encode(as_facts(bench)), indent=2)
    try:
        atomic.write_bytes(destination, data + b"\n")
    except OSError as error:
        raise from_os_error(error, f"--json {destination}") from None


def check_output(destination: Path, option: str) -> None:
    """InputError when a result could not be written to `destination` in the end."""
    if destination.is_dir():
        raise InputError(f"{option} {destination}: is a folder; give a file name")
    try:
        atomic.check_writable(destination)
    except OSError as error:
        raise from_os_error(error, f"{option} {destination}") from None
