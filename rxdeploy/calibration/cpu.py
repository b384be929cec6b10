"""Q/DQ placement for ONNX Runtime on a CPU, whose optimiser makes integer kernels of it (QLinearConv, QLinearAdd ...).

What differs from the placement for TensorRT, and why: activations are uint8, because the integer products of x86 take
one unsigned factor (vpdpbusd, vpmaddubsw); their zero point is 0 behind a ReLU, which the quantiser then replaces, and
free elsewhere. Biases are int32 in units of the accumulator. Scales are float32. Weights have 7 bits where the CPU
sums two products in 16 bits (`weight_bits`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.bench.machine import instruction_sets
from rxdeploy.calibration.qdq import constant, dequantise_constant, quantise_tensor
from rxdeploy.calibration.ranges import Range, Units, units
from rxdeploy.calibration.weights import quantise
from rxdeploy.errors import CheckFailed, InputError

# ONNX Runtime has an integer kernel for each, and together they leave no float tensor between the stem and the logits.
_QUANTISED = ("Conv", "Gemm", "Add", "MaxPool", "GlobalAveragePool")
_WEIGHTED = ("Conv", "Gemm")
_MOVING = ("MaxPool", "Flatten")  # give values of their input: ONNX Runtime fuses them where both scales are the same
_LARGEST_BIAS = 2**30  # of int32's 2^31; products add less than 2^27: 4096 of 255 * 127
_Use = tuple[ir.Node, int]  # a node, and which of its inputs
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


def weight_bits() -> int:
    """The bits of a weight that this CPU multiplies exactly: 8, or 7 on an x86 without VNNI.

    There two products of uint8 and int8 are summed in int16 (vpmaddubsw), which saturates: 2 * 255 * 127 is 64770,
    but 2 * 255 * 63 is 32130.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return 7 if x86 and not set(_VNNI) & set(instruction_sets()) else 8


def place(
    model: ir.Model,
    ranges: Mapping[str, Range],
    weights: Mapping[str, NDArray[np.float32]],
    largest: int,
    keep: Collection[str] = (),
) -> ir.Model:
    """A copy of the float32 `model`, as `build_graph` makes it, with Q/DQ nodes; the model given stays as it is.

    `ranges` are those of its tensors, by name; `weights` holds the scales of each weight, float32 (out,), by the
    weight's name; `largest` is the largest magnitude of a quantised weight, 127 or 63. `keep` names nodes that are
    to compute in float; one without weights does so only beside another that does, since what quantised neighbours
    give and take is integers anyway.

    A tensor ``x`` becomes ``x.quantised`` (uint8) and ``x.dequantised``; the integers of a weight or bias ``w`` are
    ``w.quantised``. InputError when `keep` names no node or a range or scale is missing, CheckFailed for a range or
    a scale that is not finite.
    """
    model = model.clone()
    graph = model.graph
    if unknown := sorted(set(keep) - {node.name or "" for node in graph}):
        raise InputError(f"to be kept in float: the model has no layer {', '.join(unknown)}")
    nodes = _quantised(graph, keep)
    users = _users(nodes)
    found = {value: _units(value, ranges) for value in users}
    for node in nodes:
        if node.op_type in _WEIGHTED:
            _quantise_weights(graph, node, found[_activation(node)], weights, largest)
    for value, uses in users.items():
        _quantise_activation(graph, value, uses, found[value])
    _widen_normalisation(graph)
    return model


def _quantised(graph: ir.Graph, keep: Collection[str]) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    for node in graph:
        wanted = node.op_type in _QUANTISED and node.name not in keep
        if wanted or (node.op_type == "Flatten" and _activation(node).producer() in nodes):
            nodes.append(node)
    return nodes


def _users(nodes: list[ir.Node]) -> dict[ir.Value, list[_Use]]:
    """The activations to be quantised, and who is to read them so."""
    users: dict[ir.Value, list[_Use]] = {}
    results = {_result(node): None for node in nodes}
    for value in [*results, *(value for node in nodes for value in node.inputs)]:
        if value is None or value.const_value is not None:
            continue
        # What an integer kernel gives is read as such by everyone; of a float tensor the others keep the exact one.
        reading = [(node, index) for node, index in value.uses() if value in results or node in nodes]
        if reading:
            users[value] = reading
    return users


def _units(value: ir.Value, ranges: Mapping[str, Range]) -> Units:
    """The units of an activation: those of the tensor whose values it has."""
    while (producer := value.producer()) and producer.op_type in _MOVING:
        value = _activation(producer)
    if (found := ranges.get(value.name or "")) is None:
        raise InputError(f"the calibration has no range of the tensor {value.name}; calibrate this model again")
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low <= found.high):
        raise CheckFailed(
            f"tensor {value.name}: its range is {found.low:g} to {found.high:g}, so the calibration images or the "
            "weights gave values that are not finite"
        )
    relu = producer is not None and producer.op_type == "Relu"
    return units(Range(0.0, found.high) if relu else found, symmetric=False)


def _activation(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, f"{node.name} has no input"
    return value


def _result(node: ir.Node) -> ir.Value:
    """What a quantised node gives: its output, or that of the ReLU behind it."""
    users = tuple(node.outputs[0].consumers())
    if len(users) == 1 and users[0].op_type == "Relu":
        return users[0].outputs[0]
    return node.outputs[0]


def _quantise_weights(
    graph: ir.Graph, node: ir.Node, own: Units, weights: Mapping[str, NDArray[np.float32]], largest: int
) -> None:
    """Make constants of `node`'s weight and bias: int8, and int32 in units of the accumulator."""
    weight, bias = node.inputs[1:3]
    assert weight is not None and bias is not None, f"{node.name} has no weight or bias"
    array, shift = _array(weight), _array(bias)
    if (scale := weights.get(weight.name or "")) is None:
        raise InputError(f"the calibration has no scales of the weight {weight.name}; calibrate this model again")
    if scale.shape != (len(array),) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise CheckFailed(
            f"weight {weight.name}: needs {len(array)} scales, positive and finite, one an output channel"
        )
    # A channel of next to nothing but its bias, whose tiny scale would take the bias beyond int32.
    scale = np.maximum(scale, np.abs(shift) / (np.float32(own.scale) * np.float32(_LARGEST_BIAS))).astype(np.float32)
    accumulator = np.float32(own.scale) * scale
    integers = np.rint(shift / accumulator.astype(np.float64)).astype(np.int32)
    dequantise_constant(graph, node, 1, quantise(array, scale, largest), scale, zero_point=True)
    dequantise_constant(graph, node, 2, integers, accumulator, zero_point=True)


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None, f"{value.name} is no constant"
    return value.const_value.numpy()


def _quantise_activation(graph: ir.Graph, value: ir.Value, uses: list[_Use], own: Units) -> None:
    """Let `uses` read `value` through a pair of Q/DQ."""
    scale, zero_point = np.asarray(own.scale, np.float32), np.asarray(own.zero_point, np.uint8)
    q, dq = quantise_tensor(graph, value, scale, zero_point)
    for user, index in uses:
        kept = user.op_type in _WEIGHTED and _is_float(user)
        user.replace_input_with(index, _by_channel(graph, user, q, own) if kept else dq.outputs[0])
    if not dq.outputs[0].uses():
        graph.remove(dq, safe=True)


def _is_float(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.const_value is not None


def _by_channel(graph: ir.Graph, user: ir.Node, q: ir.Node, own: Units) -> ir.Value:
    """The tensor that `q` quantised, for a layer kept in float: its scale repeated for every channel.

    Between a DequantizeLinear of one scale and a QuantizeLinear, ONNX Runtime quantises a float weight by itself, per
    tensor (WeightBiasQuantization, seen in 1.32). It leaves a layer alone that reads one with a scale a channel.
    """
    weight, group = user.inputs[1], user.attributes.get("group")
    assert weight is not None
    channels = _array(weight).shape[1] * (group.as_int() if group else 1)
    name = f"{user.name}.input.dequantised"
    parameters = [
        constant(graph, f"{name}.scale", np.full(channels, own.scale, np.float32)),
        constant(graph, f"{name}.zero_point", np.full(channels, own.zero_point, np.uint8)),
    ]
    dq = ir.node("DequantizeLinear", [q.outputs[0], *parameters], attributes={"axis": 1}, name=name)
    dq.outputs[0].name = name
    graph.insert_before(user, dq)
    return dq.outputs[0]


def _widen_normalisation(graph: ir.Graph) -> None:
    """Repeat the constants of the normalisation along the image's width.

    ONNX Runtime computes it where the channels are last, and a constant of 3 numbers is then met 3 numbers at a time:
    a third of the digits model's time in int8. The result is the same.
    """
    for name in ("input.mean", "input.scale"):
        if (value := graph.initializers.get(name)) is not None:
            width = graph.inputs[0].shape[2]  # type: ignore[index]
            array = np.repeat(_array(value), int(width), axis=3)  # type: ignore[arg-type]
            value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)
