"""Counting on the ONNX graph, against PyTorch's own layers, formulas on paper, and the graph in other guises."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxdeploy.bench import counts as counting
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.errors import CheckFailed

onnx = pytest.importorskip("onnx", reason="counting reads the model with onnx")

Models = Callable[..., tuple[ModelCard, bytes]]
GUISES = [("fp32", "uint8"), ("fp16", "uint8"), ("fp32", "float32"), ("fp16", "float32")]


@pytest.fixture
def count(tmp_path: Path) -> Callable[[Any], counting.GraphCounts]:
    """The counts of a serialised model or a ModelProto."""

    def of(model: Any) -> counting.GraphCounts:
        path = tmp_path / "counted.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return counting.count(path)

    return of


def multiply_adds_in_pytorch(card: ModelCard) -> int:
    """From the shapes that the PyTorch module's layers see: elements out, times the length of each one's sum."""
    torch = pytest.importorskip("torch")
    from rxdeploy.export.module import ResNeXt

    found: list[int] = []

    def note(module: Any, _: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Conv2d):
            length = module.in_channels // module.groups * math.prod(module.kernel_size)
        elif isinstance(module, torch.nn.Linear):
            length = module.in_features
        else:
            return
        found.append(output.numel() * length)

    network = ResNeXt(card).eval()
    for part in network.modules():
        part.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, card.input.image_size, card.input.image_size))
    return sum(found)


@pytest.mark.parametrize(("precision", "input_kind"), GUISES)
def test_as_many_as_pytorch_computes(model: Models, count: Callable, precision: str, input_kind: str) -> None:
    card, proto = model(precision, input_kind)
    assert count(proto).multiply_adds == multiply_adds_in_pytorch(card)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 33, "num_classes": 3},  # sizes that do not halve evenly
        {"layers": [2], "channels": [8], "cardinality": 2, "base_width": 16},
        {"cardinality": 8, "base_width": 4, "stem_width": 24},
    ],
)
def test_other_cards(model: Models, count: Callable, changes: dict[str, Any]) -> None:
    card, proto = model(**changes)
    assert count(proto).multiply_adds == multiply_adds_in_pytorch(card)


# What shared/DESIGN.md gives, counted when the project began.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gluon_resnext50_32x4d", 4_230_479_872),
        ("gluon_resnext101_32x4d", 7_969_996_800),
        ("gluon_resnext101_64x4d", 15_460_270_080),
    ],
)
def test_the_published_models(count: Callable, name: str, expected: int) -> None:
    ir = pytest.importorskip("onnx_ir")
    from rxdeploy.export.architecture import resnext
    from rxdeploy.export.graph import build_graph

    card = find_card(name)
    shapes = resnext(card).state_shapes()
    proto = ir.to_proto(build_graph(card, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}))
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")  # shapes are all that counts
    assert count(proto).multiply_adds == expected


def test_the_kinds_on_paper(model: Models, count: Callable) -> None:
    """A single block: the stem sees 48 x 48 pixels, the block 12 x 12 after stem and pooling."""
    _, proto = model(layers=[1], channels=[16], cardinality=4, base_width=8, stem_width=16, num_classes=7)
    width, out, pixels = 16 * 8 // 64 * 4, 16 * 4, 12 * 12
    assert count(proto).by_kind() == {
        "stem": 24 * 24 * 16 * 3 * 49,
        "1x1": pixels * (16 * width + width * out),
        "grouped 3x3": pixels * width * (width // 4) * 9,
        "downsample": pixels * 16 * out,
        "head": out * 7,
        "preprocessing": 0,
        "pooling": 0,
        "elementwise": 0,
    }


def test_a_block_without_downsample_has_none(model: Models, count: Callable) -> None:
    _, proto = model(layers=[3], channels=[16])
    kinds = {node.name: node.kind for node in count(proto).nodes if node.op == "Conv"}
    assert [name for name, kind in kinds.items() if kind == "downsample"] == ["layer1.0.downsample.0"]
    assert {kinds[f"layer1.{block}.conv{conv}"] for block in range(3) for conv in (1, 3)} == {"1x1"}
    assert {kinds[f"layer1.{block}.conv2"] for block in range(3)} == {"grouped 3x3"}


@pytest.mark.parametrize(("precision", "input_kind"), GUISES)
def test_names_make_no_difference(model: Models, count: Callable, precision: str, input_kind: str) -> None:
    proto = onnx.load_from_string(model(precision, input_kind)[1])
    before = count(proto)
    renamed = {
        name: f"t{i}" for i, name in enumerate(dict.fromkeys(n for node in proto.graph.node for n in node.output))
    }
    renamed = {name: new for name, new in renamed.items() if name != "logits"}
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    del proto.graph.value_info[:]
    after = count(proto)
    assert [(n.op, n.kind, n.multiply_adds) for n in after.nodes] == [
        (n.op, n.kind, n.multiply_adds) for n in before.nodes
    ]


def test_bytes_are_those_of_the_constants_and_tensors(model: Models, count: Callable) -> None:
    for precision, size in (("fp32", 4), ("fp16", 2)):
        _, data = model(precision, "uint8")
        counts, graph = count(data), onnx.load_from_string(data).graph
        constants = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
        assert counts.weight_bytes == constants == sum(node.weight_bytes for node in counts.nodes)
        assert (counts.input_bytes, counts.output_bytes) == (48 * 48 * 3, 7 * 4)
        stem = next(node for node in counts.nodes if node.kind == "stem")
        assert stem.input_bytes == 48 * 48 * 3 * size
        assert stem.output_bytes == 24 * 24 * 16 * size
        assert stem.weight_bytes == (16 * 3 * 49 + 16) * size


def quantised(proto: Any) -> Any:
    """The graph with Q/DQ around every convolution: int8 weights with a scale for each channel, int8 activations."""
    helper, to_tensor = onnx.helper, onnx.numpy_helper.from_array
    nodes, constants = [], {tensor.name: tensor for tensor in proto.graph.initializer}
    added = [to_tensor(np.float32(0.1), "a.scale"), to_tensor(np.int8(0), "a.zero")]
    for node in proto.graph.node:
        if node.op_type == "Conv":
            x, w = node.input[0], node.input[1]
            weight = onnx.numpy_helper.to_array(constants.pop(w))
            added += [
                to_tensor(np.clip(weight * 100, -127, 127).astype(np.int8), f"{w}.int8"),
                to_tensor(np.full(len(weight), 0.01, np.float32), f"{w}.scale"),
                to_tensor(np.zeros(len(weight), np.int8), f"{w}.zero"),
            ]
            nodes += [
                helper.make_node("QuantizeLinear", [x, "a.scale", "a.zero"], [f"{w}.xq"], name=f"{w}.q"),
                helper.make_node("DequantizeLinear", [f"{w}.xq", "a.scale", "a.zero"], [f"{w}.x"], name=f"{w}.dq"),
                helper.make_node(
                    "DequantizeLinear",
                    [f"{w}.int8", f"{w}.scale", f"{w}.zero"],
                    [f"{w}.w"],
                    name=f"{w}.weight_dq",
                    axis=0,
                ),
            ]
            node.input[0], node.input[1] = f"{w}.x", f"{w}.w"
        nodes.append(node)
    graph = helper.make_graph(nodes, "quantised", proto.graph.input, proto.graph.output, [*constants.values(), *added])
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def test_a_quantised_graph_counts_alike(model: Models, count: Callable) -> None:
    proto = onnx.load_from_string(model()[1])
    plain, found = count(proto), count(quantised(proto))
    assert found.by_kind() == plain.by_kind() | {"other": 0}
    products = {node.name: node for node in found.nodes if node.multiply_adds}
    for node in plain.nodes:
        if node.multiply_adds:
            assert products[node.name].kind == node.kind
    stem = next(node for node in found.nodes if node.kind == "stem")
    assert stem.weight_bytes == 16 * 3 * 49 + 16 + (16 + 16) * 4  # int8 weights and zeros, scales, a float32 bias
    assert all(node.weight_bytes == 0 for node in found.nodes if node.name.endswith(".weight_dq"))


def test_what_the_manifest_says_is_checked(model: Models, count: Callable, tmp_path: Path) -> None:
    counts = count(model()[1])
    counting.check(counts, counts.multiply_adds, tmp_path)
    with pytest.raises(CheckFailed, match=r"bundle .*: its model.onnx has [\d,]+ multiply-adds an image, its manifest"):
        counting.check(counts, counts.multiply_adds + 1, tmp_path)


def test_what_is_no_model_or_has_no_shapes(model: Models, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(CheckFailed, match="cannot be inferred"):
        counting.count(path)
    proto = onnx.load_from_string(model()[1])
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match="shape"):
        counting.count(path)
