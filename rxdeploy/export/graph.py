"""Card + weights -> ONNX, built node by node.

The graph is written directly instead of traced: with the architecture known that is several times faster than
`torch.onnx.export(dynamo=True)` (docs/export.md has the measurement), every tensor keeps its name in the
checkpoint, and the same input gives the same bytes. That it computes what the
PyTorch module computes is not assumed: every build validates it, and a test compares it with the traced graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import CheckerPass, ShapeInferencePass, TopologicalSortPass

import rxdeploy
from rxdeploy.cards import ModelCard
from rxdeploy.engines.bundle import InputKind, WeightsOrigin
from rxdeploy.export.architecture import BN_EPS, Conv, ResNeXt, count_multiply_adds, count_parameters, resnext

# Opset 21 is the first with float16 scales in Q/DQ; TensorRT 10, 11 and ONNX Runtime 1.18 and later read it.
OPSET = 21
IR_VERSION = 10

Weights = Mapping[str, NDArray[np.float32]]


def fold_batch_norm(weights: Weights, conv: Conv) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The convolution's weight and bias with its batch-norm folded in, computed in float64.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta, hence weight * s and beta - mean * s with
    s = gamma / sqrt(var + eps).
    """
    gamma, beta, mean, var = (
        weights[f"{conv.bn}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(var + BN_EPS)
    folded = weights[f"{conv.name}.weight"] * scale[:, None, None, None]
    return folded.astype(np.float32), (beta - mean * scale).astype(np.float32)


class _GraphBuilder:
    """Appends nodes whose first output carries the node's name, so that layers can be found by name."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def constant(self, name: str, array: NDArray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self.initializers.append(value)
        return value

    def add(
        self, op: str, inputs: Sequence[ir.Value], name: str, node_name: str = "", **attributes: object
    ) -> ir.Value:
        output = ir.Value(name=name)
        self.nodes.append(
            ir.node(op, inputs, attributes=attributes, outputs=[output], name=node_name or name)  # type: ignore[arg-type]
        )
        return output

    def conv(self, x: ir.Value, weights: Weights, conv: Conv) -> ir.Value:
        weight, bias = fold_batch_norm(weights, conv)
        inputs = [x, self.constant(f"{conv.name}.weight", weight), self.constant(f"{conv.name}.bias", bias)]
        return self.add(
            "Conv",
            inputs,
            conv.bn,  # the tensor is what the batch-norm gives, so it carries the batch-norm's name
            node_name=conv.name,
            kernel_shape=[conv.kernel] * 2,
            strides=[conv.stride] * 2,
            pads=[conv.padding] * 4,
            group=conv.groups,
        )


def _normalised(build: _GraphBuilder, image: ir.Value, card: ModelCard) -> ir.Value:
    """uint8 (N, H, W, 3), RGB 0..255 -> float32 (N, 3, H, W): (x / 255 - mean) / std as one subtraction and product."""
    mean = np.asarray(card.input.mean, np.float64) * 255
    scale = 1 / (np.asarray(card.input.std, np.float64) * 255)
    x = build.add("Cast", [image], "image.float", to=ir.DataType.FLOAT.value)
    x = build.add("Transpose", [x], "image.nchw", perm=[0, 3, 1, 2])
    x = build.add(
        "Sub", [x, build.constant("input.mean", mean.astype(np.float32).reshape(1, 3, 1, 1))], "image.centred"
    )
    return build.add("Mul", [x, build.constant("input.scale", scale.astype(np.float32).reshape(1, 3, 1, 1))], "input")


def build_graph(
    card: ModelCard, weights: Weights, input_kind: InputKind = "uint8", origin: WeightsOrigin | None = None
) -> ir.Model:
    """The float32 model of `card` with batch-norms folded and a dynamic batch.

    `weights` holds the tensors of `ResNeXt.state_shapes`. Input: ``image`` uint8 (batch, size, size, 3) RGB,
    normalised in the graph, or with `input_kind` "float32" ``input`` float32 (batch, 3, size, size), already
    normalised. Output: ``logits`` float32 (batch, num_classes). `origin` is written into the model's metadata.
    """
    network = resnext(card)
    size = network.image_size
    build = _GraphBuilder()
    if input_kind == "uint8":
        graph_input = _typed("image", ir.DataType.UINT8, ("batch", size, size, 3))
        x = _normalised(build, graph_input, card)
    else:
        graph_input = x = _typed("input", ir.DataType.FLOAT, ("batch", 3, size, size))

    x = build.add("Relu", [build.conv(x, weights, network.stem)], "stem.relu")
    x = build.add("MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for block in network.blocks:
        out = x
        for conv in block.convs[:-1]:
            out = build.add("Relu", [build.conv(out, weights, conv)], f"{conv.name}.relu")
        out = build.conv(out, weights, block.convs[-1])
        shortcut = build.conv(x, weights, block.downsample) if block.downsample else x
        x = build.add("Relu", [build.add("Add", [out, shortcut], f"{block.name}.add")], block.name)
    x = build.add("Flatten", [build.add("GlobalAveragePool", [x], "pool")], "features")
    fc = [build.constant(f"fc.{part}", weights[f"fc.{part}"]) for part in ("weight", "bias")]
    logits = build.add("Gemm", [x, *fc], "logits", node_name="fc", transB=1)
    logits.shape, logits.dtype = ir.Shape(("batch", network.num_classes)), ir.DataType.FLOAT

    graph = ir.Graph(
        [graph_input],
        [logits],
        nodes=build.nodes,
        initializers=build.initializers,
        opset_imports={"": OPSET},
        name=card.name,
    )
    model = ir.Model(
        graph, ir_version=IR_VERSION, producer_name="rxdeploy", producer_version=rxdeploy.__version__, domain="rxdeploy"
    )
    model.metadata_props.update(_identity(card, network, origin))
    return model


def _typed(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _identity(card: ModelCard, network: ResNeXt, origin: WeightsOrigin | None) -> dict[str, str]:
    """What the model file says of itself: enough to tell which card and which weights it came from."""
    identity = {
        "rxdeploy.model": card.name,
        "rxdeploy.card_sha256": card.digest,
        "rxdeploy.parameters": str(count_parameters(network)),
        "rxdeploy.multiply_adds": str(count_multiply_adds(network)),
    }
    if card.figures.flops:
        identity["rxdeploy.card_flops"] = str(card.figures.flops)
    if origin:
        identity["rxdeploy.weights"] = f"{origin.kind}: {origin.source}"
        if origin.sha256:
            identity["rxdeploy.weights_sha256"] = origin.sha256
        if origin.licence:
            identity["rxdeploy.weights_licence"] = origin.licence
    return identity


def serialise(model: ir.Model) -> bytes:
    """The model as a checked, topologically sorted ONNX file; the same model gives the same bytes."""
    # onnx-ir's passes hand onnx's own inference and checker the graph without its weights, which saves copying them.
    passes = ir.passes.Sequential(
        TopologicalSortPass(), ShapeInferencePass(check_type=True, strict_mode=True), CheckerPass(full_check=True)
    )
    proto = ir.to_proto(passes(model).model)
    return proto.SerializeToString(deterministic=True)
