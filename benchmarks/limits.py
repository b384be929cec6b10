"""What the limits of validation separate: rounding alone, against the mistakes they are there to catch.

For two models with synthetic weights, the relative L2 error of the logits of a correct float32 and float16
model, and of models with one mistake. Run with `make bench` or `python benchmarks/limits.py`; writes
results/limits.json.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import numpy as np
import onnx_ir as ir
from machine import save
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.export import graph
from rxdeploy.export.architecture import ResNeXt
from rxdeploy.export.float16 import round_everywhere, to_float16
from rxdeploy.export.reference import run_reference
from rxdeploy.export.synthetic import synthetic_weights
from rxdeploy.export.validate import model_input, relative_l2, validation_samples
from rxdeploy.runtime.onnxrt import open_session

MODELS = ("gluon_resnext50_32x4d", "gluon_resnext101_64x4d")


@click.command()
@click.option("--save/--no-save", "keep", default=True, help="Write results/limits.json.")
def main(keep: bool) -> None:
    """Measure every variant of every model."""
    rows = []
    for name in MODELS:
        card = find_card(name)
        weights, images = synthetic_weights(card), validation_samples(card).images
        reference = run_reference(card, weights, images)
        for variant, model in _variants(card, weights):
            error = relative_l2(_logits(card, model, images), reference)
            rows.append({"model": name, "variant": variant, "relative_l2": error})
            click.echo(f"{name}: {variant}: {error:.1e}")
    if keep:
        click.echo(f"\nwritten to {save('limits', {'rows': rows})}", err=True)


def _variants(card: ModelCard, weights: dict[str, NDArray[np.float32]]) -> Iterator[tuple[str, ir.Model]]:
    def build() -> ir.Model:
        return graph.build_graph(card, weights)

    yield "float32", build()
    half = to_float16(build())[0]
    graph.serialise(half)  # infers the types that rounding goes by
    yield "float16, every tensor rounded", round_everywhere(half)
    with mock.patch.object(graph, "BN_EPS", 1e-3):
        yield "batch-norm epsilon 1e-3 for 1e-5", build()
    network = graph.resnext(card)
    with mock.patch.object(graph, "resnext", lambda card: _stride_on_conv1(network)):
        yield "stride on conv1 for conv2", build()
    for block in ("layer2.1", "layer4.1"):
        lost = weights | {f"{block}.bn3.weight": np.zeros_like(weights[f"{block}.bn3.weight"])}
        yield f"branch of {block} lost", graph.build_graph(card, lost)


def _stride_on_conv1(network: ResNeXt) -> ResNeXt:
    blocks = []
    for block in network.blocks:
        first, grouped, last = block.convs
        swapped = (dataclasses.replace(first, stride=grouped.stride), dataclasses.replace(grouped, stride=1), last)
        blocks.append(dataclasses.replace(block, convs=swapped))
    return dataclasses.replace(network, blocks=tuple(blocks))


def _logits(card: ModelCard, model: ir.Model, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(graph.serialise(model))
        session = open_session(path)
    return session.run(["logits"], model_input(session, card, images))[0]


if __name__ == "__main__":
    main()
