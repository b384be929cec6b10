"""Layer by layer: where does the ONNX model depart from the PyTorch module?

Every layer's output is compared in one run of each, which finds the first departure directly; halving the
network would take seven runs and assumes that an error never shrinks on its way, which ReLU does not promise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard
from rxdeploy.engines.bundle import Precision
from rxdeploy.export.float16 import round_everywhere
from rxdeploy.export.graph import Weights
from rxdeploy.export.reference import run_reference
from rxdeploy.export.validate import LIMITS, is_for_tensorrt, load_model, model_input, relative_l2
from rxdeploy.runtime.onnxrt import open_session, run_session

LOGITS = "logits"


@dataclass(frozen=True)
class LayerDeviation:
    """How far one tensor of the ONNX model is from the module's."""

    name: str
    relative_l2: float
    max_abs_error: float
    largest: float  # largest magnitude in the reference
    departs: bool

    def as_facts(self) -> dict[str, Any]:
        return asdict(self)


def compare_layers(
    card: ModelCard, weights: Weights, model: Path, precision: Precision, images: NDArray[np.uint8]
) -> list[LayerDeviation]:
    """Deviation of every tensor that both sides have, in the order of computation.

    `images` is uint8 (n, size, size, 3), n of 4 or less (all activations are held at once).
    """
    expected: dict[str, NDArray[np.float32]] = {}
    logits = run_reference(card, weights, images, lambda name, output: expected.__setitem__(name, output.copy()))
    expected[LOGITS] = logits
    actual = _run_with_taps(card, model, precision, list(expected), images)
    limit = LIMITS[precision].layer_l2
    return [_compare(name, actual[name], array, limit) for name, array in expected.items() if name in actual]


def _run_with_taps(
    card: ModelCard, path: Path, precision: Precision, names: list[str], images: NDArray[np.uint8]
) -> dict[str, NDArray[np.float32]]:
    """The named tensors of the model for `images`: a copy of the graph makes them outputs."""
    # Of a float16 model, what a GPU would compute: ONNX Runtime's CPU kernels do not round in between.
    signed = precision == "int8" and is_for_tensorrt(path)
    model = round_everywhere(load_model(path)) if precision == "fp16" or signed else load_model(path)
    outputs = {value.name: value for node in model.graph for value in node.outputs}
    present = [name for name in names if name in outputs]
    model.graph.outputs.extend(outputs[name] for name in present if name != LOGITS)
    session = open_session(ir.to_proto(model).SerializeToString(), integers=not signed)
    arrays = run_session(session, present, model_input(session, card, images))
    return {name: array.astype(np.float32) for name, array in zip(present, arrays, strict=True)}


def _compare(name: str, actual: NDArray[np.float32], expected: NDArray[np.float32], limit: float) -> LayerDeviation:
    if actual.shape != expected.shape:
        return LayerDeviation(name, float("inf"), float("inf"), float(np.abs(expected).max()), departs=True)
    relative = relative_l2(actual, expected)
    with np.errstate(invalid="ignore"):
        largest_error = float(np.abs(actual - expected).max())
    return LayerDeviation(
        name=name,
        relative_l2=relative,
        max_abs_error=largest_error,
        largest=float(np.abs(expected).max()),
        departs=not relative <= limit,  # NaN departs
    )


def first_departure(layers: list[LayerDeviation]) -> LayerDeviation | None:
    """The first tensor over the limit, or None."""
    return next((layer for layer in layers if layer.departs), None)
