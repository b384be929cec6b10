"""What people see: stage lines and progress bars on stderr, tables for stdout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rxdeploy.engines.bundle import Bundle, Manifest, strange_manifest
from rxdeploy.errors import one_line, printable
from rxdeploy.export.headroom import describe as describe_headroom
from rxdeploy.pipeline import Reporter, Stage, size_text
from rxdeploy.runtime import Prediction

PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe


def stdout() -> Console:
    """The console for results."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """The console for progress."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)


class TerminalReporter(Reporter):
    """A line on stderr for each finished stage; on a terminal, a live bar for the one that runs."""

    def __init__(self) -> None:
        self._console = stderr()
        self._announced: set[str] = set()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> TerminalReporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, stage: str) -> None:
        self._clear()
        self._bar.add_task(stage, total=None)

    def finished(self, stage: Stage) -> None:
        self._clear()
        took = "reused" if stage.reused else f"{stage.seconds:.1f} s"
        self._console.print(f"{stage.name:<14} {took:>7}  {escape(stage.detail)}", soft_wrap=True)

    def progress(self, text: str, fraction: float | None) -> None:
        if self._bar.disable and text.startswith("downloading") and text not in self._announced:
            self._announced.add(text)  # no bar without a terminal, but it may take minutes
            self._console.print(f"{text} ...")
        if not self._bar.task_ids:
            self._bar.add_task(text, total=None)
        task = self._bar.task_ids[-1]
        if fraction is None:
            self._bar.update(task, description=text, total=None)
        else:
            self._bar.update(task, description=text, total=1.0, completed=fraction)

    def _clear(self) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)


def stage_facts(stage: Stage) -> dict[str, Any]:
    """A stage for --json."""
    return {"stage": stage.name, "seconds": round(stage.seconds, 3), "reused": stage.reused, "detail": stage.detail}


def describe_bundle(bundle: Bundle, whole: bool = False) -> str:
    """A bundle for people, a fact a line: its main facts, or with `whole` all of them.

    InputError for a manifest that lacks some of them, though it has the right digest: it was not written by rxdeploy.
    """
    try:
        rows = _facts(bundle, whole)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise strange_manifest(bundle.path, error) from None
    return "\n".join(f"{printable(name):<14} {one_line(text)}" for name, text in rows)


def _facts(bundle: Bundle, whole: bool) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    rows: list[tuple[str, str]] = [
        ("bundle", str(bundle.path)),
        ("model", f"{manifest.model}, {manifest.precision}"),
        ("weights", _weights(manifest)),
        ("engine", _engine(manifest)),
        ("input", _tensors(manifest.inputs)),
        ("output", _tensors(manifest.outputs)),
        *_quantisation(manifest),
        *_tuning(manifest),
        *_validation(manifest),
        (
            "counted",
            f"{manifest.counts.parameters:,} parameters, {manifest.counts.multiply_adds:,} multiply-adds an image",
        ),
    ]
    if manifest.engine:
        rows += [("chosen", manifest.target.reason)]
    if whole:
        rows += _claims(manifest)
        rows += [("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))]
        rows += [("command", shlex.join(manifest.command))]
    rows += [
        (name, f"{size_text(file.bytes)}, sha256 {file.sha256 if whole else file.sha256[:8]}")
        for name, file in manifest.files.items()
    ]
    return rows


def _claims(manifest: Manifest) -> list[tuple[str, str]]:
    card, inputs = manifest.card, manifest.preprocessing
    rows = [
        (
            "preprocessing",
            f"shorter side to {int(inputs.image_size / inputs.crop_pct)}, {inputs.interpolation}, centre crop "
            f"{inputs.image_size}; mean {list(inputs.mean)}, std {list(inputs.std)} "
            + ("in the graph" if manifest.normalisation_in_graph else "before the graph"),
        )
    ]
    if card.figures.flops:
        rows.append(("card FLOPs", f"{card.figures.flops:,} (the card's own unit, see docs/flops.md)"))
    if card.accuracy:
        top5 = f", top-5 {card.accuracy.top5:g}%" if card.accuracy.top5 is not None else ""
        rows.append(
            (
                "card accuracy",
                f"top-1 {card.accuracy.top1:g}%{top5} on {card.accuracy.dataset}, of the published weights",
            )
        )
    return rows


def _weights(manifest: Manifest) -> str:
    weights = manifest.weights
    if weights.kind == "synthetic":
        return f"SYNTHETIC ({weights.source}): made up, not trained"
    licence = f", licence {weights.licence}" if weights.licence else ""
    return f"{weights.kind}: {weights.source}, sha256 {(weights.sha256 or '')[:8]}{licence}"


def _engine(manifest: Manifest) -> str:
    target = manifest.target
    if manifest.engine is None:
        return f"none; model.onnx runs on ONNX Runtime ({target.reason})"
    profiles = "; ".join(
        f"{p['opt']}" if p["min"] == p["max"] else f"{p['min']} to {p['max']}, best at {p['opt']}"
        for p in manifest.engine["profiles"]
    )
    return f"{target.name} {target.version} (batch {profiles})"


def _tensors(tensors: Sequence[Any]) -> str:
    return "; ".join(
        f"{t.name}: {t.dtype} {t.layout} ({', '.join('batch' if size is None else str(size) for size in t.shape)})"
        for t in tensors
    )


def _quantisation(manifest: Manifest) -> list[tuple[str, str]]:
    facts = manifest.quantisation
    if facts is None:
        return []
    others = f" ({', '.join(sorted(set(facts['other_methods'].values())))} for some)" if facts["other_methods"] else ""
    found = f", SQNR {facts['sqnr_db']:.1f} dB on images held out" if facts["sqnr_db"] is not None else ""
    rows = [
        (
            "quantised",
            f"for {facts['scheme']}: {facts['weight_bits']}-bit weights, {facts['method']} ranges{others} from "
            f"{facts['images']} images{found}",
        )
    ]
    if facts["keep"]:
        rows.append(("in float", ", ".join(facts["keep"])))
    if mixed := facts["mixed_precision"]:
        rows.append(
            (
                "mixed",
                f"for {mixed['target']}: from {mixed['before']:.4g} to {mixed['after']:.4g}; predicted cost: "
                f"{mixed['float16_share']:.1%} more arithmetic time, where int8 is twice as fast as floating point",
            )
        )
    return rows


def _tuning(manifest: Manifest) -> list[tuple[str, str]]:
    from rxdeploy.tuning.describe import describe

    return [("tuning", describe(manifest.tuning))] if manifest.tuning else []


def precision_table(layers: Sequence[Any]) -> Table:
    """The precision of every layer of a model."""
    table = Table("layer", "operation", "reads", "weights", "gives")
    for layer in layers:
        cells = (layer.name, layer.op, ", ".join(layer.inputs), layer.weights or "-", layer.output)
        table.add_row(*(escape(printable(cell)) for cell in cells))  # the names are the file's
    return table


def _validation(manifest: Manifest) -> list[tuple[str, str]]:
    rows = []
    for provider, figures in manifest.validation["providers"].items():
        overall = figures["all"]
        rows.append(
            (
                "validated",
                f"on {provider.removesuffix('ExecutionProvider')} against {manifest.validation['reference']}: "
                f"relative L2 {overall['relative_l2']:.1e}, max error {overall['max_abs_error']:.2g}, "
                f"{overall['flipped']} of {overall['images']} images change class",
            )
        )
    if half := manifest.validation.get("float16"):
        rows.append(("float16", describe_headroom(half)))
    if manifest.engine:
        rows.append(("not run", "engine.plan: what was validated is model.onnx, which it was built from"))
    return rows


def validation_table(facts: dict[str, Any]) -> Table:
    """Deviations of a validation, by provider, kind of image and batch size."""
    table = Table("provider", "images", "max abs error", "relative L2", "top-1 agreement", "ties", "flipped")
    for provider, figures in facts["providers"].items():
        groups = {name: group for name, group in figures.items() if name != "by_batch"}
        groups |= {f"batch {size}": group for size, group in figures["by_batch"].items()}
        for name, group in groups.items():
            table.add_row(
                provider.removesuffix("ExecutionProvider"),
                f"{name} ({group['images']})",
                f"{group['max_abs_error']:.3g}",
                f"{group['relative_l2']:.3g}",
                f"{group['top1_agreement']:.1%}",
                str(group["ties"]),
                str(group["flipped"]),
            )
    table.caption = f"limits: relative L2 {facts['limits']['relative_l2']:g}, flipped 0"
    if half := facts.get("float16"):
        table.caption += f"; {escape(printable(describe_headroom(half)))}"
    return table


def layer_table(layers: Sequence[Any]) -> Table:
    """Every layer's deviation; those beyond the limit are marked."""
    table = Table("tensor", "largest", "max abs error", "relative L2", "")
    for layer in layers:
        mark = "[red]departs[/]" if layer.departs else ""
        name = escape(printable(layer.name))
        table.add_row(name, f"{layer.largest:.3g}", f"{layer.max_abs_error:.3g}", f"{layer.relative_l2:.3g}", mark)
    return table


def classification_table(results: Sequence[tuple[Path, Sequence[Prediction]]], ran_on: str) -> Table:
    """The best classes of each image."""
    table = Table("image", "rank", "class", "name", "probability", caption=escape(ran_on), caption_justify="left")
    for path, predictions in results:
        for rank, p in enumerate(predictions, start=1):
            name = escape(printable(str(path))) if rank == 1 else ""
            table.add_row(name, str(rank), str(p.index), escape(printable(p.label or "-")), f"{p.probability:.2%}")
    return table
