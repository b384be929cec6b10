"""Graph pass: the stem on the image's 2x2 blocks, 12 channels of half the size, instead of its pixels.

A 7x7 convolution of stride 2 is one of 8x8 with zeros in front, and that is one of 4x4 and stride 1 on the blocks.
ONNX Runtime's fast integer kernel wants channels in fours, which 3 are not: the stem is a third of the digits model's
time in int8, and half of that with blocks. In float32 it gains nothing, since the zeros are 30 % more multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.export.passes import weights
from rxdeploy.export.passes.weights import given

TERMS = "rxdeploy.terms"  # in the stem's metadata: the products behind each output in the model itself
_COLOURS, _KERNEL = 3, 7
_BETWEEN = ("Cast", "Transpose", "Sub", "Mul", "QuantizeLinear", "DequantizeLinear")


def space_to_depth(model: ir.Model) -> ir.Model:
    """A copy of `model` whose stem is a 4x4 convolution of the image's 2x2 blocks, with zeros in its weight.

    For all graphs of build_graph, float16 and quantised ones too; a quantised stem gives the same integers. Unchanged
    where height or width is odd, or the first convolution is no 7x7 one of stride 2 on the 3 channels of the input.

    A uint8 image is taken apart before its Cast, so that the tensors from ``image.float`` to ``input`` keep their names
    and have 12 channels: row in the block, column, colour. A float32 ``input`` is followed by ``input.blocks``.
    CheckFailed for a weight that is no constant of the stem alone.
    """
    model = model.clone()
    graph, image = model.graph, model.graph.inputs[0]
    stem = next((node for node in graph if node.op_type == "Conv"), None)
    if stem is None or not _is_stem(stem) or (between := _between(image, stem)) is None or image.shape is None:
        return model
    height, width = image.shape[1:3] if image.dtype == ir.DataType.UINT8 else image.shape[2:4]
    if not isinstance(height, int) or not isinstance(width, int) or height % 2 or width % 2:
        return model
    _take_kernel_apart(stem)
    for node in between:
        node.outputs[0].shape = None
        if node.op_type in ("Sub", "Mul"):
            _repeat(given(node, 1))
    ((user, index),) = image.uses()
    blocks = _of_bytes(graph, image, height, width) if image.dtype == ir.DataType.UINT8 else _of_floats(graph, image)
    user.replace_input_with(index, blocks)
    return model


def _is_stem(node: ir.Node) -> bool:
    wanted = {"kernel_shape": (_KERNEL,) * 2, "strides": (2, 2), "pads": (3,) * 4}
    found = {name: tuple(node.attributes[name].as_ints()) for name in wanted if name in node.attributes}
    return found == wanted and weights.shape(node)[1] == _COLOURS


def _between(image: ir.Value, stem: ir.Node) -> list[ir.Node] | None:
    """What makes the stem's input of the image, if that treats all pixels alike and nobody else reads it."""
    nodes: list[ir.Node] = []
    value = given(stem, 0)
    while value is not image:
        node = value.producer()
        if node is None or node.op_type not in _BETWEEN or len(value.uses()) != 1:
            return None
        if node.op_type.endswith("Linear") and ((scale := given(node, 1).const_value) is None or scale.size > 1):
            return None
        nodes.append(node)
        value = given(node, 0)
    return nodes if len(image.uses()) == 1 else None


def _take_kernel_apart(stem: ir.Node) -> None:
    weight, zero = weights.stored(stem)
    out, half = len(weight), (_KERNEL + 1) // 2
    wide = np.empty((out, _COLOURS, 2 * half, 2 * half), weight.dtype)
    wide[:] = zero.reshape(-1, 1, 1, 1)
    wide[:, :, 1:, 1:] = weight
    blocks = wide.reshape(out, _COLOURS, half, 2, half, 2).transpose(0, 3, 5, 1, 2, 4)
    weights.store(stem, np.ascontiguousarray(blocks.reshape(out, 4 * _COLOURS, half, half)))
    # Around an output's own row, the rows -3 to 3 were read, now -4 to 3: two blocks before its own, one behind.
    for name, value in {"kernel_shape": (half, half), "strides": (1, 1), "pads": (2, 2, 1, 1)}.items():
        stem.attributes[name] = ir.AttrInt64s(name, value)
    stem.metadata_props[TERMS] = str(_COLOURS * _KERNEL**2)


def _repeat(value: ir.Value) -> None:
    """Let a constant of the normalisation, one number a channel or repeated for each column, be one for blocks."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    columns = array.shape[3] // 2 or 1
    array = np.tile(array[..., :columns], (1, 4, 1, 1))
    value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)


def _of_bytes(graph: ir.Graph, image: ir.Value, height: int, width: int) -> ir.Value:
    """uint8 (N, height, width, 3) as (N, height / 2, width / 2, 12).

    The columns of a block lie side by side already. Two rows put together take ONNX Runtime a third of the time of a
    Transpose, which copies 6 bytes at a time.
    """
    pairs = _constant(graph, "image.pairs.shape", (0, height // 2, 2, width // 2, 2 * _COLOURS))
    blocks = _constant(graph, "image.blocks.shape", (0, height // 2, width // 2, 4 * _COLOURS))
    first = graph[0]
    paired = _insert(first, "Reshape", [image, pairs], "image.pairs")
    rows = _insert(first, "Split", paired, "image.rows", outputs=2, axis=2, num_outputs=2)
    together = _insert(first, "Concat", rows, "image.together", axis=4)
    return _insert(first, "Reshape", [*together, blocks], "image.blocks")[0]


def _of_floats(graph: ir.Graph, image: ir.Value) -> ir.Value:
    """float32 (N, 3, height, width) as (N, 12, height / 2, width / 2)."""
    return _insert(graph[0], "SpaceToDepth", [image], f"{image.name}.blocks", blocksize=2)[0]


def _insert(
    before: ir.Node, op: str, inputs: Sequence[ir.Value], name: str, outputs: int = 1, **attributes: int
) -> Sequence[ir.Value]:
    """The outputs of a new node, of the type of its first input."""
    node = ir.node(op, inputs, attributes, num_outputs=outputs, name=name)
    dtype = inputs[0].dtype
    for index, value in enumerate(node.outputs):
        value.name = name if outputs == 1 else f"{name}.{index}"
        value.type = ir.TensorType(dtype) if dtype is not None else None
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs


def _constant(graph: ir.Graph, name: str, numbers: tuple[int, ...]) -> ir.Value:
    array: NDArray[np.int64] = np.asarray(numbers, np.int64)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.INT64
    graph.register_initializer(value)
    return value
