"""Throughput and latency against the batch size, with the roofline, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rxdeploy import atomic
from rxdeploy.bench.benchmark import BatchResult, Benchmark, Series
from rxdeploy.bench.facts import check_output
from rxdeploy.bench.machine import processor
from rxdeploy.bench.report import scaled
from rxdeploy.errors import InputError, from_os_error, missing_module

_FORMATS = (".png", ".svg")
_INCHES, _DPI = (11, 4.8), 120


def check_plot(destination: Path) -> None:
    """InputError when `destination` is no .png or .svg or cannot be written; EnvironmentLacks without matplotlib."""
    if destination.suffix.lower() not in _FORMATS:
        raise InputError(f"--plot {destination}: the file name must end in {' or '.join(_FORMATS)}")
    check_output(destination, "--plot")
    _matplotlib()


def plot(bench: Benchmark, destination: Path) -> None:
    """Draw the benchmark and write it to `destination`, a .png or .svg, by rename. Errors as for `check_plot`."""
    check_plot(destination)
    save(draw(bench), destination)


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib Figure; EnvironmentLacks without matplotlib."""
    return _matplotlib()(figsize=inches, layout="constrained")


def save(figure: Any, destination: Path) -> None:
    """Write a Figure to `destination`, a .png or .svg, by rename."""
    try:
        with atomic.new_file(destination) as temporary:
            figure.savefig(temporary, format=destination.suffix.lower()[1:], dpi=_DPI)
    except OSError as error:
        raise from_os_error(error, f"--plot {destination}") from None


def draw(bench: Benchmark) -> Any:
    """The benchmark as a matplotlib Figure with two axes: throughput and latency."""
    figure = new_figure(_INCHES)
    speed, latency = figure.subplots(1, 2)
    _draw_throughput(speed, bench)
    _draw_latency(latency, bench)
    for axes, free in ((speed, "lower right"), (latency, "upper left")):
        axes.set_xscale("log", base=2)
        sizes = [result.batch for result in bench.batches]
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("batch size")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc=free)
    manifest = bench.bundle.manifest
    where = f" ({processor()})" if bench.device == "cpu" else ""
    figure.suptitle(f"{manifest.model}, {manifest.precision}: {bench.description}{where}", fontsize="medium")
    return figure


def _draw_throughput(axes: Any, bench: Benchmark) -> None:
    for name, results, series in _curves(bench):
        sizes, speeds = [result.batch for result in results], [one.throughput.images_per_s for one in series]
        errors = [
            [speed - (one.throughput.low or speed) for speed, one in zip(speeds, series, strict=True)],
            [(one.throughput.high or speed) - speed for speed, one in zip(speeds, series, strict=True)],
        ]
        axes.errorbar(sizes, speeds, yerr=errors, marker="o", capsize=3, label=f"{name}, 95% interval")
    if floors := _floors(bench):
        ceiling = [size / seconds for size, seconds in floors]
        axes.plot([size for size, _ in floors], ceiling, "k--", marker="_", label=f"roofline ({_limits(bench)})")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.set_title("throughput", fontsize="medium")
    per_second = axes.secondary_yaxis("right", functions=_counted_scale(bench.counted_flops))
    per_second.set_ylabel("counted GFLOP/s")


def _counted_scale(flops: int) -> tuple[Any, Any]:
    return (lambda images: images * flops / 1e9), (lambda gigaflops: gigaflops * 1e9 / flops)


def _draw_latency(axes: Any, bench: Benchmark) -> None:
    for name, results, series in _curves(bench):
        sizes = [result.batch for result in results]
        axes.plot(sizes, [one.latency.median * 1e3 for one in series], marker="o", label=f"p50, {name}")
        tail = [(size, one.latency.percentiles[99.0]) for size, one in zip(sizes, series, strict=True)]
        known = [(size, value * 1e3) for size, value in tail if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="^", linestyle=":", label=f"p99, {name}")
    if floors := _floors(bench):
        axes.plot(
            [size for size, _ in floors],
            [seconds * 1e3 for _, seconds in floors],
            "k--",
            marker="_",
            label="roofline floor",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("ms a call")
    axes.set_title("latency", fontsize="medium")


def _curves(bench: Benchmark) -> list[tuple[str, Sequence[BatchResult], Sequence[Series]]]:
    """What there is to draw: a name, the batches that have it, and their series."""
    on_host = "arrays in memory" if bench.device == "cpu" else "with copies"
    curves: list[tuple[str, Sequence[BatchResult], Sequence[Series]]] = [
        (on_host, bench.batches, [result.host for result in bench.batches])
    ]
    on_device = [result for result in bench.batches if result.device]
    if on_device:
        curves.append(("without copies", on_device, [result.device for result in on_device if result.device]))
    return curves


def _floors(bench: Benchmark) -> list[tuple[int, float]]:
    """Each batch size with the seconds it takes at least, where that is known."""
    found = ((result.batch, bench.floor(result)) for result in bench.batches)
    return [(size, floor.seconds) for size, floor in found if floor]


def _limits(bench: Benchmark) -> str:
    compute, bandwidth = bench.peaks.compute.value or 0, bench.peaks.bandwidth.value or 0
    return f"{scaled(compute)}FLOP/s, {scaled(bandwidth)}B/s measured"


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _matplotlib() -> Any:
    """Matplotlib's Figure, which draws to files without a display and without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    return Figure
