"""The constant that is a convolution's weight: float32, float16, or integers behind a DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.errors import CheckFailed

_PASSING = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")  # between a weight and its convolution


def shape(node: ir.Node) -> tuple[int, ...]:
    """(out, in / groups, height, width) of the convolution `node`; CheckFailed when that is not written down."""
    value = _way(node)[-1]
    if value.shape is None or not value.shape.is_static():
        raise CheckFailed(f"{node.name}: its weight {value.name} has no known shape")
    return value.shape.numpy()


def stored(node: ir.Node) -> tuple[NDArray, NDArray]:
    """The weight of the convolution `node` as it is stored, and what stands for zero in it: one number, or one for each
    output channel.

    CheckFailed unless it is a constant that `node` alone reads, with scales that hold for whole output channels: only
    then may what lies within an output channel be moved.
    """
    way = _way(node)
    weight = way[-1]
    if weight.const_value is None or any(len(value.uses()) != 1 for value in way):
        raise CheckFailed(f"{node.name}: its weight {weight.name} is no constant that it alone reads")
    quantisers = [maker for value in way if (maker := value.producer()) and maker.op_type.endswith("Linear")]
    for each in quantisers:
        axis, scale = each.attributes.get("axis"), given(each, 1).const_value
        blocked = scale is not None and len(scale.shape) > 1
        if scale is None or blocked or (scale.size > 1 and (axis is None or axis.as_int() != 0)):
            raise CheckFailed(f"{node.name}: the scales of its weight {weight.name} are not one an output channel")
    array = weight.const_value.numpy()
    first = quantisers[-1] if quantisers else None
    if first is not None and first.op_type == "DequantizeLinear" and len(first.inputs) > 2:
        zero_point = given(first, 2).const_value
        assert zero_point is not None, f"{node.name}: the zero point of its weight is no constant"
        return array, zero_point.numpy()
    return array, np.zeros(1, array.dtype)


def store(node: ir.Node, array: NDArray) -> None:
    """Let `array` be the weight of `node`, as it is stored."""
    way = _way(node)
    way[-1].const_value = ir.tensor(array, name=way[-1].name)
    for value in way:
        if value.shape is not None:
            value.shape = ir.Shape(array.shape)


def given(node: ir.Node, index: int) -> ir.Value:
    """An input that `node` must have."""
    value = node.inputs[index]
    assert value is not None, f"{node.name} has no input {index}"
    return value


def _way(node: ir.Node) -> list[ir.Value]:
    """What `node` reads as its weight, and what that was made from, down to the constant."""
    values = [given(node, 1)]
    while (maker := values[-1].producer()) is not None and maker.op_type in _PASSING:
        values.append(given(maker, 0))
    return values
