"""Graph passes: a float32 model to a float16 one that a strongly typed TensorRT (10, 11, RTX) accepts, and what that
one computes as a float32 graph.

Every float32 tensor of a graph as graph.py builds it (weights are initializers, no subgraphs) becomes float16, the
constants rounded to nearest even. What the caller sees keeps its type: a float32 input is cast on entry and a
float32 output on exit. A uint8 input needs no extra cast: its own Cast then goes to float16, exactly, since
float16 holds all integers up to 2048.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from rxdeploy.errors import CheckFailed
from rxdeploy.export.headroom import FLOAT16_MAX

FLOAT16_TINY = 2.0**-24  # the smallest subnormal: half of it and less rounds to zero


@dataclass(frozen=True)
class Rounding:
    """What rounding the constants to float16 did."""

    constants: int  # values rounded
    flushed: int  # non-zero values that became zero


def to_float16(model: ir.Model) -> tuple[ir.Model, Rounding]:
    """A copy of `model` in float16, inputs and outputs unchanged in type; the model given stays as it is.

    CheckFailed names every constant that float16 cannot hold (beyond 65504 in magnitude).
    """
    model = model.clone()
    graph = model.graph
    rounding = _round_constants(graph)
    for node in graph:
        for name, attribute in node.attributes.items():
            if name == "to" and attribute.as_int() == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
        for output in node.outputs:
            if output.dtype in (None, ir.DataType.FLOAT):
                _retype(output, ir.DataType.FLOAT16)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            _cast_input(graph, value)
    for index, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            _cast_output(graph, index)
    return model, rounding


def round_everywhere(model: ir.Model) -> ir.Model:
    """A float32 copy of a float16 `model` that rounds every tensor to float16, as a GPU stores them.

    ONNX Runtime on a CPU runs a float16 graph in float32 and drops most of the casts in between, so it shows
    neither the rounding of activations nor their overflow. Here each cast is a node of its own, which it
    keeps. Products are summed in float32. Tensors keep their names.
    """
    model = ShapeInferencePass()(model.clone()).model  # a file from elsewhere need not say its tensors' types
    graph = model.graph
    for name, value in graph.initializers.items():
        assert value.const_value is not None, f"{name} has no value"
        if value.const_value.dtype == ir.DataType.FLOAT16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
            _retype(value, ir.DataType.FLOAT)
    for node in tuple(graph):
        for name, attribute in node.attributes.items():
            if name == "to" and attribute.as_int() == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT16:
                _round_after(graph, node, output)
    return model


def _round_after(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Put casts to float16 and back behind `output`; what leaves them has its name, itself the suffix ``.exact``."""
    name, users = output.name, tuple(output.uses())
    output.name = f"{name}.exact"
    _retype(output, ir.DataType.FLOAT)
    half = ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT16}, name=f"{name}.half")
    rounded = ir.node("Cast", [half.outputs[0]], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.rounded")
    half.outputs[0].name, rounded.outputs[0].name = half.name, name
    _retype(half.outputs[0], ir.DataType.FLOAT16)
    _retype(rounded.outputs[0], ir.DataType.FLOAT)
    graph.insert_after(node, [half, rounded])
    for user, index in users:
        user.replace_input_with(index, rounded.outputs[0])


def _round_constants(graph: ir.Graph) -> Rounding:
    overflow, constants, flushed = [], 0, 0
    for name, value in graph.initializers.items():
        assert value.const_value is not None, f"{name} has no value"
        if value.const_value.dtype != ir.DataType.FLOAT:
            continue
        array = value.const_value.numpy()
        largest = float(np.abs(array).max(initial=0))
        if not largest <= FLOAT16_MAX:  # also true of NaN
            overflow.append(f"{name} (largest magnitude {largest:g})")
            continue
        half = array.astype(np.float16)
        constants += array.size
        flushed += int(np.count_nonzero(array)) - int(np.count_nonzero(half))
        value.const_value = ir.tensor(half, name=name)
        _retype(value, ir.DataType.FLOAT16)
    if overflow:
        raise CheckFailed(
            f"float16 holds magnitudes up to {FLOAT16_MAX:g}, and these weights are beyond it: {', '.join(overflow)}; "
            "build with --fp32"
        )
    return Rounding(constants, flushed)


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    """Give `value` a type of its own: a clone shares its type objects, which setting `dtype` would change in both."""
    value.type = ir.TensorType(dtype)


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    users = tuple(value.uses())
    node = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16}, name=f"{value.name}.half")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = node.name, ir.DataType.FLOAT16, value.shape
    graph.insert_before(graph[0], node)
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])


def _cast_output(graph: ir.Graph, index: int) -> None:
    """Keep the output's name and float32 type; the float16 tensor behind it gets the suffix ``.half``."""
    half = graph.outputs[index]
    name, half.name = half.name, f"{half.name}.half"
    node = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.float")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, half.shape
    graph.append(node)
    graph.outputs[index] = output
