"""The precision of every layer of a model, read from its graph: what a strongly typed TensorRT will compute in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Cast")  # between layers, not layers
_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT32: "int32",
}


@dataclass(frozen=True)
class LayerPrecision:
    """What a layer reads and gives; a tensor between Q and DQ nodes counts as its integers."""

    name: str
    op: str
    inputs: tuple[str, ...]  # of its activations, one each
    weights: str | None
    output: str

    def as_facts(self) -> dict[str, Any]:
        return asdict(self)


def layer_precisions(path: Path) -> list[LayerPrecision]:
    """Every layer of the ONNX file at `path`, in order of computation."""
    model = ShapeInferencePass()(ir.load(path)).model
    return [_layer(node) for node in model.graph if node.op_type not in _PLUMBING]


def _layer(node: ir.Node) -> LayerPrecision:
    read = [value for value in node.inputs if value is not None]
    constant = [_source(value).const_value is not None for value in read]
    weights = [_precision(value) for value, is_constant in zip(read, constant, strict=True) if is_constant]
    users = [user for user in node.outputs[0].consumers() if user.op_type == "QuantizeLinear"]
    # Quantised for all its readers: then the integers are what is stored.
    stored = users[0].outputs[0] if users and len(users) == len(node.outputs[0].consumers()) else node.outputs[0]
    return LayerPrecision(
        name=node.name or "?",
        op=node.op_type,
        inputs=tuple(_precision(value) for value, is_constant in zip(read, constant, strict=True) if not is_constant),
        weights=weights[0] if weights else None,
        output=_name(stored),
    )


def _source(value: ir.Value) -> ir.Value:
    producer = value.producer()
    while producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        if "axis" in producer.attributes and producer.inputs[0].const_value is None:
            break  # by channel: cpu.py lets layers that stay in float read through it
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _precision(value: ir.Value) -> str:
    return _name(_source(value))


def _name(value: ir.Value) -> str:
    dtype = value.const_value.dtype if value.const_value is not None else value.dtype
    return _NAMES.get(dtype, str(dtype)) if dtype is not None else "?"
