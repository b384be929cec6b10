"""Q/DQ placement for TensorRT: int8 convolutions in a graph that is float16 elsewhere.

What a convolution takes in is quantised once, however many layers read it; of a residual addition the shortcut is
(recipe.py says why). Weights are stored as int8 with a scale for each output channel; biases, pooling and classifier
stay in floating point: the classifier is 0.01 % of the multiply-adds of the large models, and its error is the
logits' own (docs/int8.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.calibration.qdq import dequantise_constant, quantise_tensor
from rxdeploy.calibration.ranges import Range, units
from rxdeploy.calibration.weights import quantise
from rxdeploy.errors import InputError

LARGEST = 127


def place(
    model: ir.Model,
    ranges: Mapping[str, Range],
    weights: Mapping[str, NDArray[np.float32]],
    keep: Collection[str] = (),
) -> ir.Model:
    """A copy of the float32 `model`, as `build_graph` makes it, with Q/DQ nodes; `to_float16` does the rest.

    `ranges` are those of its tensors, by name; `weights` holds the scales of each convolution's weight, float32 (out,),
    by the weight's name. `keep` names convolutions, and blocks whose shortcut, that stay in floating point.
    InputError when `keep` names none or a range is missing.
    """
    model = model.clone()
    graph = model.graph
    convs = [node for node in graph if node.op_type == "Conv"]
    adds = [node for node in graph if node.op_type == "Add"]
    names = {node.name or "" for node in convs} | {_block(node) for node in adds}
    if unknown := sorted(set(keep) - names):
        raise InputError(f"to be kept in float16: the model has no layer {', '.join(unknown)}")
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for conv in convs:
        if conv.name not in keep:
            readers.setdefault(_input(conv, 0), []).append((conv, 0))
            _quantise_weight(graph, conv, weights)
    for add in adds:
        if _block(add) not in keep:
            readers.setdefault(_input(add, 1), []).append((add, 1))  # build_graph puts the shortcut second
    for value, reading in readers.items():
        _quantise_activation(graph, value, reading, ranges)
    return model


def _block(add: ir.Node) -> str:
    return (add.name or "").removesuffix(".add")


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.name} has no input {index}"
    return value


def _quantise_weight(graph: ir.Graph, conv: ir.Node, weights: Mapping[str, NDArray[np.float32]]) -> None:
    weight = _input(conv, 1)
    assert weight.const_value is not None and weight.name is not None
    scale = weights[weight.name]
    integers = quantise(weight.const_value.numpy(), scale, LARGEST)
    dequantise_constant(graph, conv, 1, integers, scale, zero_point=False)


def _quantise_activation(
    graph: ir.Graph, value: ir.Value, reading: list[tuple[ir.Node, int]], ranges: Mapping[str, Range]
) -> None:
    name = value.name or ""
    if name not in ranges:
        raise InputError(f"the calibration has no range of the tensor {name}; calibrate this model again")
    scale = np.asarray(units(ranges[name], symmetric=True).scale, np.float32)
    _, dq = quantise_tensor(graph, value, scale, np.asarray(0, np.int8))
    for node, index in reading:
        node.replace_input_with(index, dq.outputs[0])
