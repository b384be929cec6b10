"""A benchmark for people: text and tables, at most 110 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rxdeploy.bench import machine, measure, statistics
from rxdeploy.bench.benchmark import BatchResult, Benchmark, Series
from rxdeploy.bench.facts import share_of
from rxdeploy.bench.layers import BETWEEN, LayerTimes
from rxdeploy.bench.peaks import Figure
from rxdeploy.bench.statistics import Latency

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH, _NAME = 110, 14  # columns
_UNCERTAIN = 0.1  # how far the interval may reach below the throughput without a remark


def headline(bench: Benchmark) -> str:
    """What was measured, where, and against what."""
    manifest, peaks = bench.bundle.manifest, bench.peaks
    rows = [
        ("model", f"{manifest.model}, {manifest.precision}, weights {manifest.weights.source}"),
        ("device", f"{bench.description}; {_hardware(bench)}"),
        *(("not taken", reason) for reason in bench.passed_over),
        ("counted FLOPs", _counted_text(bench)),
        ("card FLOPs", _card_text(bench)),
        ("peak", _figure(peaks.compute, "FLOP/s")),
        ("bandwidth", _figure(peaks.bandwidth, "B/s")),
        *([("datasheet", _datasheet_text(bench))] if bench.device != "cpu" else []),
    ]
    return "\n".join(_wrapped(f"{name:<{_NAME}} {text}", _NAME + 1) for name, text in rows)


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _hardware(bench: Benchmark) -> str:
    cores = f"{machine.processor()}, {machine.cores()} core(s)"
    return cores if bench.device == "cpu" else f"host: {cores}"


def _counted_text(bench: Benchmark) -> str:
    return (
        f"{scaled(bench.counted_flops)}FLOPs an image: two for each of {bench.counts.multiply_adds:,} multiply-adds, "
        "counted on model.onnx, and the same as the card's architecture gives"
    )


def _card_text(bench: Benchmark) -> str:
    if not bench.card_flops:
        return "none: the card publishes no figure"
    ratio = bench.card_flops / bench.counts.multiply_adds
    return (
        f"{scaled(bench.card_flops)}FLOPs an image, as the card publishes them. That is {ratio:.2f} times the "
        "multiply-adds, so neither those nor two for each, and how it was counted is not known: compare it only with "
        "other cards' (docs/flops.md)"
    )


def _figure(figure: Figure, unit: str) -> str:
    return figure.how if figure.value is None else f"{scaled(figure.value)}{unit} measured here: {figure.how}"


def _datasheet_text(bench: Benchmark) -> str:
    peaks, sheet = bench.peaks, bench.peaks.datasheet
    if sheet is None:
        return "this GPU is not in rxdeploy's list"
    compute, bandwidth = scaled(sheet.peak(peaks.arithmetic)), scaled(sheet.bandwidth)
    return f"{compute}FLOP/s in {peaks.arithmetic} (dense), {bandwidth}B/s: {sheet.source}"


def tables(bench: Benchmark) -> list[Table]:
    """The tables to print."""
    return [
        speed_table(bench),
        flops_table(bench),
        *([layers_table(bench, bench.layers)] if bench.layers else []),
    ]


def speed_table(bench: Benchmark) -> Table:
    """Latency and throughput of each batch size."""
    from rich.table import Table

    table = Table(title="Latency of a call, and throughput")
    table.add_column("batch", justify="right")
    if bench.device != "cpu":
        table.add_column("")
    for percent in statistics.PERCENTILES:
        table.add_column(f"p{percent:g} ms", justify="right")
    for column in ("images/s", "95% interval", "calls"):
        table.add_column(column, justify="right")
    for result in bench.batches:
        rows = list(_speed_rows(result))
        for index, (name, *cells) in enumerate(rows):
            labels = (str(result.batch) if index == 0 else "", *([name] if bench.device != "cpu" else []))
            table.add_row(*labels, *cells, end_section=index == len(rows) - 1 > 0)
    return table


def _speed_rows(result: BatchResult) -> Iterator[tuple[str, ...]]:
    """A name, which a CPU needs none of, and the cells."""
    yield ("with copies", *_series_cells(result.host))
    if result.device:
        yield ("without copies", *_series_cells(result.device))
    for name, latency in (("until enqueued", result.enqueue), ("GPU's own time", result.device_time)):
        if latency:
            yield (name, *_latency_cells(latency), "", "", "")


def _series_cells(series: Series) -> tuple[str, ...]:
    speed = series.throughput
    interval = f"{_number(speed.low)} to {_number(speed.high)}" if speed.low is not None else "-"
    return (*_latency_cells(series.latency), _number(speed.images_per_s), interval, str(series.latency.calls))


def _latency_cells(latency: Latency) -> tuple[str, ...]:
    return tuple("-" if value is None else _number(value * 1e3) for value in latency.percentiles.values())


def _number(value: float | None) -> str:
    """A figure with four digits, never in powers of ten; "any" where an interval has no end."""
    if value is None:
        return "any"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def flops_table(bench: Benchmark) -> Table:
    """Throughput in FLOP/s of both kinds, and against the device's limits."""
    from rich.table import Table

    copies = "" if bench.device == "cpu" else (" (without copies)" if bench.no_device is None else " (with copies)")
    table = Table(title=f"Against the FLOPs and the device's limits{copies}")
    of_datasheet = ("of datasheet",) if bench.peaks.datasheet else ()
    columns = ("card FLOP/s", "counted FLOP/s", "of peak", *of_datasheet, "floor ms", "bound by", "p50 / floor")
    for column in ("batch", *columns):
        table.add_column(column, justify="right")
    for result in bench.batches:
        series, floor, above = result.computing, bench.floor(result), bench.above_floor(result)
        speed, datasheet = series.throughput.images_per_s, bench.peaks.datasheet_compute
        table.add_row(
            str(result.batch),
            f"{scaled(speed * bench.card_flops)}FLOP/s" if bench.card_flops else "-",
            f"{scaled(speed * bench.counted_flops)}FLOP/s",
            _percent(share_of(bench, series, bench.peaks.compute.value)),
            *([_percent(share_of(bench, series, datasheet))] if bench.peaks.datasheet else []),
            _number(floor.seconds * 1e3) if floor else "-",
            floor.bound if floor else "-",
            f"{above:.2f}" if above else "-",
        )
    return table


def layers_table(bench: Benchmark, times: LayerTimes) -> Table:
    """Time and multiply-adds by kind of layer."""
    from rich.table import Table

    table = Table("kind", title=f"Layers, batch {times.batch}")
    for column in ("layers", "ms", "of time", "of multiply-adds", "counted FLOP/s", "of peak"):
        table.add_column(column, justify="right")
    everything, peak = sum(layer.multiply_adds for layer in times.layers), bench.peaks.compute.value
    for row, layers in times.rows().items():
        seconds, multiply_adds = (
            sum(layer.seconds for layer in layers),
            sum(layer.multiply_adds for layer in layers),
        )
        speed = 2 * multiply_adds / seconds if multiply_adds and seconds else None
        table.add_row(
            row,
            "" if row == BETWEEN else str(len(layers)),
            _number(seconds * 1e3),
            _percent(seconds / times.total),
            _percent(multiply_adds / everything if multiply_adds else None),
            f"{scaled(speed)}FLOP/s" if speed else "-",
            _percent(speed / peak if speed and peak else None),
        )
    table.add_section()
    table.add_row("all", "", _number(times.total * 1e3), "100.0%", "100.0%", "", "")
    table.caption = times.method
    return table


def notes(bench: Benchmark) -> list[str]:
    """What a reader of the tables must know: what is missing and why, and what cannot be trusted."""
    found = []
    unstable = [str(result.batch) for result in bench.batches if not result.warm_up.stable]
    if unstable:
        found.append(
            f"batch {', '.join(unstable)}: the warm-up ended after {measure.WARM_UP_SECONDS:g} s without getting "
            "stable; something else may be running here"
        )
    uncertain = [str(result.batch) for result in bench.batches if _is_uncertain(result)]
    if uncertain:
        found.append(
            f"batch {', '.join(uncertain)}: images/s is uncertain by more than {_UNCERTAIN:.0%}; look at p50, and "
            "measure again when nothing else runs here"
        )
    beaten = [str(result.batch) for result in bench.batches if (bench.above_floor(result) or 1) < 1]
    if beaten:
        found.append(
            f"batch {', '.join(beaten)}: faster than its floor, so the measured peak is too low; measure again when "
            "nothing else runs here"
        )
    scarce = [percent for percent in statistics.PERCENTILES if _is_missing(bench, percent)]
    if scarce:
        needed = round(100 / (100 - scarce[0]))
        found.append(f"-: p{scarce[0]:g} needs at least {needed} calls; a longer --seconds makes more")
    if bench.device != "cpu":
        found += sorted({reason for reason in (bench.no_device, bench.no_enqueue) if reason})
    found += _numerics_notes(bench)
    found += [str(error) for error in bench.failures.values()]
    return [_wrapped(note) for note in found]


def _numerics_notes(bench: Benchmark) -> Iterator[str]:
    numbers = bench.numerics
    if isinstance(numbers, str):
        return
    if hidden := [name for name in numbers.not_finite if name != "logits"]:
        yield (
            f"{len(hidden)} of {numbers.tensors} tensors hold NaN or infinity on an image of noise, {hidden[0]} first; "
            "a ReLU may hide that from the logits: rxdeploy validate compares them with PyTorch's"
        )
    small = numbers.denormal | numbers.denormal_constants
    if small and bench.device == "cpu" and not bench.flushes_denormals:
        most = max(small, key=small.__getitem__)
        yield (
            f"{len(numbers.denormal)} tensors and {len(numbers.denormal_constants)} constants hold denormal numbers "
            f"(below 1.2e-38), {most} most: {small[most]:.2%}. They may slow a CPU down; rxdeploy tune tries to flush "
            "them to zero"
        )


def _is_uncertain(result: BatchResult) -> bool:
    speed = result.computing.throughput
    return speed.low is not None and speed.low < (1 - _UNCERTAIN) * speed.images_per_s


def _is_missing(bench: Benchmark, percent: float) -> bool:
    return any(result.host.latency.percentiles[percent] is None for result in bench.batches)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def scaled(value: float) -> str:
    """A figure with four digits and the prefix that goes with its unit: ``488.2 G``."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{_number(value / limit)} {prefix}"
    return f"{_number(value)} "
