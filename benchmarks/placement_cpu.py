"""What to quantise for ONNX Runtime on a CPU: the variants that rxdeploy/calibration/cpu.py chose from, in one run.

Every variant is timed in turn, round after round, so that a busy machine slows all alike; the figure is the median,
beside it the fastest. Synthetic weights, or the digits model's own. Run with `python benchmarks/placement_cpu.py
MODEL ...`; --save writes results/placement_cpu.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import numpy as np
import onnx_ir as ir
from machine import save
from numpy.typing import NDArray

from rxdeploy.calibration import cpu
from rxdeploy.calibration.ranges import Range
from rxdeploy.calibration.weights import scales
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.passes.groups import grouped, pack, unpack
from rxdeploy.export.samples import noise, photographs
from rxdeploy.export.validate import relative_l2
from rxdeploy.export.weights import load_weights, resolve_weights
from rxdeploy.runtime.onnxrt import open_session
from rxdeploy.tuning.rules import rule

MODELS = ("digits_resnext14_8x8d", "gluon_resnext50_32x4d")
WIDTHS = (8, 16, 32, 64)
CHANNELS = rule("onnxruntime", "int8").channels


@click.command()
@click.argument("models", nargs=-1)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--save/--no-save", "keep", default=False, help="Write results/placement_cpu.json.")
def main(models: tuple[str, ...], batches: tuple[int, ...], rounds: int, keep: bool) -> None:
    """Time every variant of every model."""
    rows = []
    for name in models or MODELS:
        card = find_card(name)
        images = np.concatenate([photographs(card), noise(card, max(batches))])
        graphs = dict(_variants(card, images))
        sessions = {variant: open_session(serialise(graph)) for variant, graph in graphs.items()}
        logits = {variant: session.run(None, {"image": images})[0] for variant, session in sessions.items()}
        for batch in batches:
            times: dict[str, list[float]] = {variant: [] for variant in sessions}
            for _ in range(rounds):
                for variant, session in sessions.items():
                    begin = time.perf_counter()
                    session.run(None, {"image": images[:batch]})
                    times[variant].append(time.perf_counter() - begin)
            for variant, seconds in times.items():
                middle, least = (1e3 * f(seconds) for f in (statistics.median, min))
                speedup = 1e3 * statistics.median(times["fp32"]) / middle
                error = relative_l2(logits[variant], logits["fp32"])
                rows.append(
                    {"model": name, "batch": batch, "variant": variant, "median_ms": middle, "least_ms": least,
                     "speedup": speedup, "relative_l2": error}
                )  # fmt: skip
                click.echo(
                    f"{name}, batch {batch}, {variant}: {middle:.2f} ms (fastest {least:.2f}), {speedup:.2f} times "
                    f"fp32, logits off by {error:.4f}"
                )
    if keep:
        click.echo(f"\nwritten to {save('placement_cpu', {'rows': rows})}", err=True)


def _variants(card: ModelCard, images: NDArray[np.uint8]) -> Iterator[tuple[str, ir.Model]]:
    source = resolve_weights(card, None if card.weights.file else "synthetic", Path())  # nothing is downloaded
    model = build_graph(card, load_weights(card, source))
    place = placing(model, images[:8])
    yield "fp32", model
    yield "chosen", place()
    for width in WIDTHS:
        if width != CHANNELS:
            yield f"groups of {width} channels", pack(place(), width)
    yield "groups as they are", unpack(place())
    with mock.patch.object(cpu, "_widen_normalisation", lambda graph: None):
        yield "normalisation by 3 numbers", place()
    yield "stem float", place("conv1")
    yield "stem and max-pool float", place("conv1", "maxpool")
    yield "average pool float", place("pool")
    yield "fc float", place("fc")
    yield "average pool and fc float", place("pool", "fc")
    yield "sums float", place(*(str(node.name) for node in model.graph if node.op_type == "Add"))


def placing(model: ir.Model, images: NDArray[np.uint8]) -> Callable[..., ir.Model]:
    """Gives the float32 `model` in int8, the layers kept in float that it is given, in groups of CHANNELS channels."""
    largest = 2 ** (cpu.weight_bits() - 1) - 1
    ranges = _ranges(model, images)
    weights = {
        name: scales(value.const_value.numpy(), largest, "minmax")
        for name, value in model.graph.initializers.items()
        if name.endswith(".weight") and value.const_value is not None
    }

    def place(*keep: str) -> ir.Model:
        layers = [name for name in grouped(model) if name not in keep]
        return pack(cpu.place(model, ranges, weights, largest, keep), dict.fromkeys(layers, CHANNELS))

    return place


def _ranges(model: ir.Model, images: NDArray[np.uint8]) -> dict[str, Range]:
    """Smallest and largest value of every tensor."""
    model = model.clone()
    outputs = {str(v.name): v for node in model.graph for v in node.outputs if v not in model.graph.outputs}
    model.graph.outputs.extend(outputs.values())
    arrays = open_session(ir.to_proto(model).SerializeToString()).run([*outputs], {"image": images})
    return {name: Range(float(a.min()), float(a.max())) for name, a in zip(outputs, arrays, strict=True)}


if __name__ == "__main__":
    main()
