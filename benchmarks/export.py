"""Building the ONNX graph directly against tracing it with torch.onnx.export(dynamo=True).

Both start from the same weights in memory and end with a checked file's bytes; each runs in a fresh process,
imports not counted, direct and traced in turn. The outputs of both are compared on ONNX Runtime.
Run with `make bench` or `python benchmarks/export.py`; writes results/export.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from machine import save

MODELS = ("gluon_resnext50_32x4d", "gluon_resnext101_32x4d", "gluon_resnext101_64x4d")


@click.command()
@click.option("--runs", default=3, show_default=True)
@click.option("--one", nargs=3, hidden=True, help="MODEL METHOD FILE: one export, in this process.")
@click.option("--save/--no-save", "keep", default=True, help="Write results/export.json.")
def main(runs: int, one: tuple[str, str, str] | None, keep: bool) -> None:
    """Measure both ways for every model."""
    if one:
        click.echo(json.dumps(_export(*one)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            files = {method: f"{folder}/{method}.onnx" for method in ("direct", "traced")}
            seconds: dict[str, list[float]] = {"direct": [], "traced": []}
            for _ in range(runs):
                for method, file in files.items():
                    seconds[method].append(_in_new_process(model, method, file))
            direct, traced = (statistics.median(seconds[method]) for method in ("direct", "traced"))
            difference = _difference(model, files["direct"], files["traced"])
            rows.append({"model": model, "seconds": seconds, "ratio": traced / direct, "relative_l2": difference})
            click.echo(
                f"{model}: direct {direct:.2f} s, traced {traced:.2f} s, {traced / direct:.1f} times; "
                f"outputs differ by {difference:.1e} (relative L2)"
            )
    if keep:
        click.echo(f"\nwritten to {save('export', {'rows': rows})}", err=True)


def _in_new_process(model: str, method: str, file: str) -> float:
    command = [sys.executable, __file__, "--one", model, method, file]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])["seconds"]
    )


def _export(model: str, method: str, file: str) -> dict[str, Any]:
    import torch

    from rxdeploy.cards import find_card
    from rxdeploy.export.graph import build_graph, serialise
    from rxdeploy.export.reference import reference_module
    from rxdeploy.export.synthetic import synthetic_weights

    card = find_card(model)
    weights = synthetic_weights(card)
    if method == "direct":
        start = time.perf_counter()
        Path(file).write_bytes(serialise(build_graph(card, weights, "float32")))
    else:
        import onnxscript  # noqa: F401  (imported by the exporter; not part of its time)

        module, size = reference_module(card, weights), card.input.image_size
        start = time.perf_counter()
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, size, size),),
            file,
            dynamo=True,
            external_data=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    return {"seconds": time.perf_counter() - start}


def _difference(model: str, first: str, second: str) -> float:
    from rxdeploy.cards import find_card
    from rxdeploy.export.samples import photographs
    from rxdeploy.export.validate import relative_l2
    from rxdeploy.runtime.onnxrt import open_session
    from rxdeploy.runtime.preprocess import normalise

    card = find_card(model)
    images = normalise(photographs(card), card.input.mean, card.input.std)
    a, b = (open_session(Path(file)).run(["logits"], {"input": images})[0] for file in (first, second))
    return relative_l2(a, b)


if __name__ == "__main__":
    main()
