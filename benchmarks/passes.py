"""Graph passes on whole models: what each gains on ONNX Runtime and OpenVINO, in float32 and int8.

A variant is timed against the model without it, by turns, round after round, so that a busy machine slows both; a
figure is the median over the rounds of the ratio of their times, with the extremes beside it. "nothing" is the model
itself once more: what it differs from 1 by is chance. The model without is what a build without --tune gives: in
float32 with its own groups, in int8 (the placement for ONNX Runtime) with groups packed to 32 channels. Synthetic
weights, or the digits model's own; nothing is downloaded.

One thread: a model and itself then differ by 1 %, with a thread on each of the two cores of a virtual machine by 20.

    python benchmarks/passes.py digits_resnext14_8x8d --batch 8 --engine onnxruntime

--save writes results/passes.json; what it had of other models, batches, engines and variants stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from machine import RESULTS, save
from numpy.typing import NDArray
from placement_cpu import placing

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.engines.bundle import CpuSettings, Precision
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.passes import PASSES
from rxdeploy.export.passes.groups import WIDTHS, pack, unpack
from rxdeploy.export.samples import noise, photographs
from rxdeploy.export.validate import relative_l2
from rxdeploy.export.weights import load_weights, resolve_weights
from rxdeploy.runtime.cpu import EngineName
from rxdeploy.runtime.onnxrt import open_session
from rxdeploy.runtime.openvino import Requests, compile_model, of_size, read_model
from rxdeploy.tuning.contest import contest

MODELS = ("digits_resnext14_8x8d", "gluon_resnext50_32x4d", "gluon_resnext101_32x4d", "gluon_resnext101_64x4d")
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")
NOTHING = "nothing"
THREADS = 1
KEY = ("model", "precision", "engine", "batch", "variant")
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def variants() -> dict[str, Callable[[ir.Model], ir.Model]]:
    """What is measured, by name."""
    widths = {f"{width} channels a group": partial(pack, channels=width) for width in WIDTHS}
    return {NOTHING: ir.Model.clone, **PASSES, "own groups": unpack, **widths}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=PRECISIONS)
@click.option("--engine", "engines", multiple=True, type=click.Choice(ENGINES), default=ENGINES)
@click.option(
    "--variant", "wanted", multiple=True, type=click.Choice(list(variants())[1:]), default=list(variants())[1:]
)
@click.option("--rounds", default=9, show_default=True)
@click.option("--save/--no-save", "keep", default=False, help="Write results/passes.json.")
def main(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    precisions: tuple[Precision, ...],
    engines: tuple[EngineName, ...],
    wanted: tuple[str, ...],
    rounds: int,
    keep: bool,
) -> None:
    """Time every variant of MODELS, of all four by default."""
    rows = []
    for name in models or MODELS:
        for precision in precisions:
            for row in measure(find_card(name), precision, engines, batches, wanted, rounds):
                click.echo(
                    "{model} {precision}, {engine}, batch {batch}, {variant}: {gain:.3f} times as fast "
                    "({least:.3f} to {most:.3f}), logits off by {relative_l2:.1e}".format(**row)
                )
                rows.append(row)
    if keep:
        click.echo(f"\nwritten to {save('passes', {'rows': merged(rows)})}", err=True)


def measure(
    card: ModelCard,
    precision: Precision,
    engines: tuple[EngineName, ...],
    batches: tuple[int, ...],
    wanted: tuple[str, ...],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """A row for each engine, batch and variant."""
    images = np.concatenate([photographs(card), noise(card, max(batches))])
    graphs = dict(files(model_of(card, precision, images[:8]), wanted))
    for engine in engines:
        for batch in batches:
            yield from time_on(engine, card, precision, batch, graphs, images[:batch], rounds)


def files(base: ir.Model, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """The model files of the variants that change anything; first that of NOTHING."""
    without = serialise(base.clone())
    yield NOTHING, without
    for name in wanted:
        file = serialise(variants()[name](base))
        if file != without:
            yield name, file


def time_on(
    engine: EngineName,
    card: ModelCard,
    precision: Precision,
    batch: int,
    graphs: Mapping[str, bytes],
    images: NDArray[np.uint8],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """A row for each of `graphs`, NOTHING among them."""
    without = open_on(engine, graphs[NOTHING], batch)
    for variant, file in graphs.items():
        ways = {"without": without, "with": open_on(engine, file, batch)}
        ratio = contest({key: partial(_call, run, images) for key, run in ways.items()}, [batch], rounds)["with"]
        yield {
            "model": card.name, "precision": precision, "engine": engine, "batch": batch, "variant": variant,
            "threads": THREADS, "rounds": rounds,
            "gain": 1 / ratio.median, "least": 1 / ratio.most, "most": 1 / ratio.least,
            "relative_l2": relative_l2(ways["with"](images), ways["without"](images)),
        }  # fmt: skip


def model_of(card: ModelCard, precision: Precision, images: NDArray[np.uint8]) -> ir.Model:
    """The model as it is built untuned; `images` calibrate it."""
    source = resolve_weights(card, None if card.weights.file else "synthetic", Path())
    model = build_graph(card, load_weights(card, source))
    return model if precision == "fp32" else placing(model, images)()


def open_on(engine: EngineName, file: bytes, batch: int) -> Run:
    """What computes logits of `batch` images."""
    settings = CpuSettings(engine=engine, threads=THREADS)
    if engine == "onnxruntime":
        session = open_session(file, settings=settings)
        return lambda images: session.run(None, {"image": images})[0]
    return Requests(compile_model(of_size(read_model(file), batch), settings), 1).run


def _call(run: Run, images: NDArray[np.uint8], batch: int) -> NDArray[np.float32]:
    return run(images)


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` and what results/passes.json has besides, the models in the order of MODELS."""
    path = RESULTS / "passes.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    found = {tuple(row[key] for key in KEY): row for row in (*before, *rows)}
    return sorted(found.values(), key=lambda row: (MODELS.index(row["model"]), *(row[key] for key in KEY[1:4])))


if __name__ == "__main__":
    main()
