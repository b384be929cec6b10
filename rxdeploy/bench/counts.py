"""What one image costs, node by node, counted on the ONNX graph itself.

Multiply-adds are those of convolutions and matrix products, the usual count; everything else has none. A node's kind
follows from what it is and where it stands, not from its name, so any ResNeXt's graph can be read: float32, float16,
with either input, or with Q/DQ nodes around its convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rxdeploy.errors import CheckFailed, first_line, missing_module

Kind = Literal["stem", "1x1", "grouped 3x3", "downsample", "head", "preprocessing", "pooling", "elementwise", "other"]
KINDS: tuple[Kind, ...] = (
    "stem",
    "1x1",
    "grouped 3x3",
    "downsample",
    "head",
    "preprocessing",
    "pooling",
    "elementwise",
    "other",
)

_PRODUCTS = ("Gemm", "MatMul")
_POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Squeeze")
_ELEMENTWISE = ("Add", "Relu", "Clip")
# What leaves values as they are, up to rounding: a weight or a branch is followed through them.
_PASSING = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class NodeCount:
    """One node of the graph, for one image.

    `input_bytes` and `output_bytes` are activations; `weight_bytes` are the constants it reads, as stored, those
    behind a DequantizeLinear included. `inputs` and `outputs` are tensor names.
    """

    name: str
    op: str
    kind: Kind
    multiply_adds: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class GraphCounts:
    """A whole graph: its nodes, in order, and what must pass the memory whatever the engine does.

    `weight_bytes` are all constants, once; `input_bytes` and `output_bytes` are the graph's own, for one image.
    """

    nodes: tuple[NodeCount, ...]
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        return sum(node.multiply_adds for node in self.nodes)

    def by_kind(self) -> dict[Kind, int]:
        """Multiply-adds of each kind that has any node, in the order of KINDS."""
        found = {kind: [node.multiply_adds for node in self.nodes if node.kind == kind] for kind in KINDS}
        return {kind: sum(counts) for kind, counts in found.items() if counts}


def count(model: Path) -> GraphCounts:
    """The counts of an ONNX file whose first dimension is the batch.

    EnvironmentLacks when onnx is not installed; CheckFailed when the graph's shapes cannot be told.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    try:
        proto = onnx.shape_inference.infer_shapes(_of_one_image(onnx.load(model)), strict_mode=True)
    except Exception as error:  # protobuf's and onnx's errors share no base
        raise CheckFailed(f"{model}: its shapes cannot be inferred: {first_line(error)}") from None
    return _count(proto.graph)


def check(counts: GraphCounts, expected: int, bundle: Path) -> None:
    """CheckFailed unless the graph has the multiply-adds that the manifest's own count, from the card, gives."""
    if counts.multiply_adds != expected:
        raise CheckFailed(
            f"bundle {bundle}: its model.onnx has {counts.multiply_adds:,} multiply-adds an image, its manifest says "
            f"{expected:,}; build the bundle again"
        )


def _of_one_image(proto: Any) -> Any:
    """The model with its batch set to 1 and no shapes but those of its inputs and constants."""
    for tensor in proto.graph.input:
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    for tensor in proto.graph.output:
        tensor.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    return proto


def _count(graph: Any) -> GraphCounts:
    reading = _Reading(graph)
    inputs = [tensor.name for tensor in graph.input if tensor.name not in reading.constants]
    return GraphCounts(
        tuple(reading.count(node) for node in graph.node),
        weight_bytes=sum(reading.sizes[name] for name in reading.constants),
        input_bytes=sum(reading.sizes[name] for name in inputs),
        output_bytes=sum(reading.sizes[tensor.name] for tensor in graph.output),
    )


class _Reading:
    """The graph with its tensors' shapes and sizes, and who makes and uses what."""

    def __init__(self, graph: Any) -> None:
        self.constants = {tensor.name for tensor in graph.initializer}
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.sizes = {
            tensor.name: math.prod(tensor.dims) * _item_bytes(tensor.data_type) for tensor in graph.initializer
        }
        for tensor in (*graph.input, *graph.value_info, *graph.output):
            self.shapes[tensor.name] = shape = _shape(tensor)
            self.sizes.setdefault(tensor.name, math.prod(shape) * _item_bytes(tensor.type.tensor_type.elem_type))
        self.makers = {output: node for node in graph.node for output in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.depths = self._depths(graph)

    def _depths(self, graph: Any) -> dict[str, int]:
        """For each tensor, the most convolutions on a way from the input to it; nodes are in topological order."""
        depths: dict[str, int] = {}
        for node in graph.node:
            depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.op_type == "Conv")
            depths.update(dict.fromkeys(node.output, depth))
        return depths

    def count(self, node: Any) -> NodeCount:
        activations = {name for name in node.input if name and not self._is_constant(name)}
        return NodeCount(
            name=node.name or node.output[0],
            op=node.op_type,
            kind=self._kind(node),
            multiply_adds=self._multiply_adds(node),
            weight_bytes=sum(self.sizes[name] for name in self._constants_of(node)) if activations else 0,
            input_bytes=sum(self.sizes[name] for name in activations),
            output_bytes=sum(self.sizes[name] for name in node.output) if activations else 0,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
        )

    def _is_constant(self, name: str) -> bool:
        """Whether a tensor is a constant, or made from one by nodes that pass it on."""
        maker = self.makers.get(name)
        return name in self.constants or (
            maker is not None and maker.op_type in _PASSING and self._is_constant(maker.input[0])
        )

    def _constants_of(self, node: Any) -> set[str]:
        """The constants that `node` reads, itself or through nodes that pass them on, scales included."""
        found: set[str] = set()
        for name in node.input:
            if name in self.constants:
                found.add(name)
            elif name and self._is_constant(name):
                found |= self._constants_of(self.makers[name])
        return found

    def _multiply_adds(self, node: Any) -> int:
        """Elements of the output times the length of the sum behind each."""
        outputs = math.prod(self.shapes[node.output[0]])
        if node.op_type == "Conv":
            # What the model itself multiplies, without the zeros that a pass put there.
            packed = _groups(node) // _attribute(node, "group", 1)
            terms = math.prod(self.shapes[node.input[1]][1:]) // packed
            return outputs * int(_noted(node, "rxdeploy.terms") or terms)
        if node.op_type not in _PRODUCTS:
            return 0
        first = self.shapes[node.input[0]]
        return outputs * (first[0] if _attribute(node, "transA", 0) else first[-1])

    def _kind(self, node: Any) -> Kind:
        if node.op_type == "Conv":
            return self._conv_kind(node)
        if node.op_type in _PRODUCTS:
            return "head"
        if self._is_constant(node.output[0]):
            return "other"
        if self.depths[node.output[0]] == 0:
            return "preprocessing"
        if node.op_type in _POOLING:
            return "pooling"
        return "elementwise" if node.op_type in _ELEMENTWISE else "other"

    def _conv_kind(self, node: Any) -> Kind:
        depth = self.depths[node.output[0]]
        kernel = self.shapes[node.input[1]][2:]
        if depth == 1:
            return "stem"
        if kernel == (3, 3) and _groups(node) > 1:
            return "grouped 3x3"
        if kernel != (1, 1):
            return "other"
        return "downsample" if self._is_shortcut(node) else "1x1"

    def _is_shortcut(self, node: Any) -> bool:
        """Whether a block's other branch, which its output is added to, went through more convolutions."""
        depth = self.depths[node.output[0]]
        sums = [user for user in self._users_behind(node.output[0]) if user.op_type == "Add"]
        return any(self.depths[name] > depth for user in sums for name in user.input if not self._is_constant(name))

    def _users_behind(self, name: str) -> Iterator[Any]:
        for user in self.users.get(name, ()):
            if user.op_type in _PASSING:
                yield from self._users_behind(user.output[0])
            else:
                yield user


def _groups(node: Any) -> int:
    """The groups of a convolution in the model: also where export/passes/groups.py packed them."""
    return int(_noted(node, "rxdeploy.groups") or _attribute(node, "group", 1))


def _noted(node: Any, key: str) -> str | None:
    """What a graph pass (export/passes) wrote down of the node as it was."""
    return next((each.value for each in node.metadata_props if each.key == key), None)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _shape(tensor: Any) -> tuple[int, ...]:
    dimensions: Iterable[Any] = tensor.type.tensor_type.shape.dim
    shape = tuple(dimension.dim_value for dimension in dimensions)
    if not all(shape):
        raise CheckFailed(f"the shape of tensor {tensor.name} cannot be told for a batch of one image")
    return shape


def _item_bytes(data_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
