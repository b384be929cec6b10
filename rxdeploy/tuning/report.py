"""What tuning found, for people: what each choice gained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from rxdeploy.engines.bundle import Tuning


def tables(tuning: Tuning) -> Iterator[Table]:
    """For each engine its grouped layers and what was tried on whole models; then engines and settings."""
    report = tuning.report
    sizes = ", ".join(map(str, tuning.batch))
    for engine, found in report["engines"].items():
        yield _layers(engine, found["layers"], sizes)
        yield _steps(f"tried on {engine}", found["steps"])
    yield _steps("engines, against the first", report["engine"])
    yield _steps("settings", report["settings"])


def _layers(engine: str, layers: dict[str, Any], sizes: str) -> Table:
    widths = sorted({int(width) for layer in layers.values() for width in layer["seconds"]})
    table = Table(
        "layer",
        "chosen",
        *(f"{width} channels" for width in widths),
        title=f"{engine}: grouped layers, ms at batch {sizes}",
    )
    for name, layer in layers.items():
        times = [layer["seconds"].get(str(width)) for width in widths]
        chosen = f"{layer['own']} -> {layer['chosen']}" if layer["own"] != layer["chosen"] else str(layer["own"])
        table.add_row(name, chosen, *(_milliseconds(each) for each in times))
    return table


def _milliseconds(seconds: list[float] | None) -> str:
    return " ".join(f"{1e3 * each:.3g}" for each in seconds) if seconds else "-"


def _steps(title: str, steps: list[dict[str, Any]]) -> Table:
    table = Table("tried", "times as fast as before", "by round", "kept", title=title)
    for step in steps:
        ratio = step["seconds_over_before"]
        rounds = f"{1 / ratio['most']:.3f} to {1 / ratio['least']:.3f}"
        table.add_row(step["what"], f"{1 / ratio['median']:.3f}", rounds, "yes" if step["kept"] else "no")
    return table
