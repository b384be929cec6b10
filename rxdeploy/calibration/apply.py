"""A recipe worked into the exported model: what comes out is what TensorRT or ONNX Runtime compiles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.calibration import cpu, tensorrt
from rxdeploy.calibration import weights as to_int8
from rxdeploy.calibration.equalise import equalised
from rxdeploy.calibration.network import FC, Network
from rxdeploy.calibration.recipe import Recipe
from rxdeploy.export.float16 import Rounding, to_float16


def apply(model: ir.Model, network: Network, recipe: Recipe) -> tuple[ir.Model, Rounding | None]:
    """`model`, the exported float32 graph of `network`, quantised by `recipe`; and what float16 rounded, for TensorRT.

    The model given stays as it is.
    """
    model = model.clone()
    parameters = equalised(network, recipe.equalisation)
    scales: dict[str, NDArray[np.float32]] = {}
    for layer, own in parameters.items():
        weight = np.ascontiguousarray(own.weight.numpy())
        shift = recipe.bias.get(layer) if layer not in recipe.keep else None
        bias = own.bias.numpy() if shift is None else own.bias.numpy() + np.asarray(shift, np.float32)
        if own is not network.parameters[layer] or shift is not None:
            _replace(model.graph, f"{layer}.weight", weight)
            _replace(model.graph, f"{layer}.bias", bias)
        if layer not in recipe.keep and not (layer == FC and recipe.symmetric):
            scales[f"{layer}.weight"] = to_int8.scales(weight, recipe.largest, recipe.weight_scales)
    ranges = {name: recipe.range(name) for name in recipe.ranges}
    if recipe.scheme == "onnxruntime":
        return cpu.place(model, ranges, scales, recipe.largest, recipe.keep), None
    return to_float16(tensorrt.place(model, ranges, scales, recipe.keep))


def _replace(graph: ir.Graph, name: str, array: NDArray) -> None:
    graph.initializers[name].const_value = ir.tensor(array, name=name)
