"""Q/DQ nodes in a graph: what the placements for TensorRT and for a CPU have in common.

A tensor ``x`` becomes ``x.quantised`` and ``x.dequantised``; the integers of a constant ``w`` are ``w.quantised``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant(graph: ir.Graph, name: str, array: NDArray) -> ir.Value:
    """A new initializer."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def quantise_tensor(graph: ir.Graph, value: ir.Value, scale: NDArray, zero_point: NDArray) -> tuple[ir.Node, ir.Node]:
    """A pair of Q and DQ behind `value`, for its readers to be moved to; `scale` and `zero_point` are scalars."""
    name = f"{value.name}.quantised"
    parameters = [constant(graph, f"{name}.scale", scale), constant(graph, f"{name}.zero_point", zero_point)]
    q = ir.node("QuantizeLinear", [value, *parameters], name=name)
    dq = ir.node("DequantizeLinear", [q.outputs[0], *parameters], name=f"{value.name}.dequantised")
    q.outputs[0].name, dq.outputs[0].name = q.name, dq.name
    q.outputs[0].dtype = ir.DataType.from_numpy(zero_point.dtype)
    if producer := value.producer():
        graph.insert_after(producer, [q, dq])
    else:
        graph.insert_before(graph[0], [q, dq])
    return q, dq


def dequantise_constant(
    graph: ir.Graph, node: ir.Node, index: int, integers: NDArray, scale: NDArray[np.float32], zero_point: bool
) -> None:
    """Give `node` the `integers`, by channel, with a DQ as its input `index`, in place of the float constant there.

    With `zero_point` the zeros are written out, which ONNX Runtime's integer kernels want; TensorRT needs none.
    """
    value = node.inputs[index]
    assert value is not None and value.name is not None and len(value.uses()) == 1
    name = f"{value.name}.quantised"
    inputs = [constant(graph, name, integers), constant(graph, f"{name}.scale", scale)]
    if zero_point:
        inputs.append(constant(graph, f"{name}.zero_point", np.zeros(len(scale), integers.dtype)))
    dequantise = ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{value.name}.dequantised")
    dequantise.outputs[0].name = dequantise.name
    graph.insert_before(node, dequantise)
    node.replace_input_with(index, dequantise.outputs[0])
    del graph.initializers[value.name]
