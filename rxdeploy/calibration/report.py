"""What people see of a calibration: what was tried, and what each layer pays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rxdeploy.calibration.sensitivity import Sensitivity

_CLIPPED = 5  # tensors that are shown


def trials_table(record: dict[str, Any], scheme: str) -> Table:
    """Everything that was tried, with its error on the held-out images."""
    table = Table("tried", "relative L2 error of the logits", "taken")
    for trial in record["trials"].get(scheme, ()):
        table.add_row(trial["what"], f"{trial['error']:.3g}", "yes" if trial["taken"] else "")
    return table


def clipped_table(record: dict[str, Any], scheme: str) -> Table:
    """The tensors of whose values the ranges cut off most, on the images they were found on."""
    clipped = record.get("clipped", {}).get(scheme, {})
    table = Table("tensor", "extremes", "range", "values beyond it")
    for name in sorted(clipped, key=lambda each: -clipped[each])[:_CLIPPED]:
        facts, (low, high) = record["tensors"][name], record["recipes"][scheme]["ranges"][name]
        table.add_row(
            name, f"{facts['low']:.4g} to {facts['high']:.4g}", f"{low:.4g} to {high:.4g}", f"{clipped[name]:.3%}"
        )
    return table


def sensitivity_table(layers: Sequence[Sensitivity]) -> Table:
    """The layers, most damaging first; shares are of the sum of squares, as errors of layers add up like noise."""
    total = sum(layer.only**2 for layer in layers)
    table = Table("layer", "kind", "only it quantised", "share", "all but it", "all", "multiply-adds")
    for layer in sorted(layers, key=lambda each: -each.only):
        table.add_row(
            layer.layer,
            layer.kind,
            f"{layer.only:.3g}",
            f"{layer.only**2 / total:.1%}" if total else "-",
            f"{layer.without:.3g}",
            f"{layer.all:.3g}",
            f"{layer.multiply_adds / 1e6:.1f} M",
        )
    return table


def plot_sensitivity(layers: Sequence[Sensitivity], title: str, path: Path) -> None:
    """Draw both errors of every layer, in order of computation, to a .png or .svg, by rename."""
    from rxdeploy.bench.plot import new_figure, save

    figure = new_figure((max(6.0, 0.16 * len(layers)), 4.5))
    axes = figure.subplots()
    places = range(len(layers))
    axes.bar(places, [layer.only for layer in layers], color="tab:blue", label="only this layer quantised")
    axes.plot(places, [layer.without for layer in layers], ".", color="tab:orange", label="all but this layer")
    if layers:
        axes.axhline(layers[0].all, color="grey", linewidth=0.8, label="all quantised")
    axes.set_xticks(list(places), [layer.layer for layer in layers], rotation=90, fontsize=6)
    axes.set_ylabel("relative L2 error of the logits")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    save(figure, path)
