"""The stem on blocks of the image computes the same; PyTorch's convolution of the pixels says what that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from rxdeploy.bench.counts import count
from rxdeploy.calibration import cpu, tensorrt
from rxdeploy.calibration.ranges import Range
from rxdeploy.cards import ModelCard
from rxdeploy.errors import CheckFailed
from rxdeploy.export.float16 import to_float16
from rxdeploy.export.graph import InputKind, build_graph, serialise
from rxdeploy.export.layers import compare_layers
from rxdeploy.export.passes import PASSES
from rxdeploy.export.passes.groups import pack
from rxdeploy.export.passes.stem import space_to_depth

Weights = dict[str, NDArray[np.float32]]
KINDS: tuple[InputKind, ...] = ("uint8", "float32")
PRECISIONS = ("fp32", "fp16", "onnxruntime", "tensorrt")


def in_precision(model: ir.Model, precision: str) -> ir.Model:
    """The float32 model in one of PRECISIONS; the last two are int8, with weights of 7 bits that saturate nowhere."""
    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_float16(model)[0]
    tensors = {v.name or "": Range(-4, 4) for node in model.graph for v in node.outputs} | {"input": Range(-2.2, 2.7)}
    scales = {n: np.full(v.shape[0], 0.01, np.float32) for n, v in model.graph.initializers.items() if v.shape}
    if precision == "onnxruntime":
        return cpu.place(model, tensors, scales, 63)
    return to_float16(tensorrt.place(model, tensors, scales))[0]


def feed(card: ModelCard, kind: InputKind) -> NDArray:
    random, size = np.random.default_rng(0), card.input.image_size
    if kind == "uint8":
        return random.integers(0, 256, (3, size, size, 3), np.uint8)
    return random.normal(size=(3, 3, size, size)).astype(np.float32)


def run(model: ir.Model, x: NDArray, integers: bool = True) -> NDArray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "0" if integers else "1")
    session = onnxruntime.InferenceSession(serialise(model.clone()), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_models_compute_the_same(precision: str, kind: InputKind, card: ModelCard, weights: Weights) -> None:
    """Integers bit for bit; floats are summed in another order."""
    model, x = in_precision(build_graph(card, weights, kind), precision), feed(card, kind)
    before = serialise(model.clone())
    changed, integers = space_to_depth(model), precision == "onnxruntime"
    assert serialise(model) == before != serialise(changed)
    expected, result = run(model, x, integers), run(changed, x, integers)
    if integers:
        np.testing.assert_array_equal(result, expected)
    limit = 1e-5 if precision == "fp32" else 5e-3  # where float16 is summed as such
    assert np.linalg.norm(result - expected) <= limit * np.linalg.norm(expected)

    from_file = ir.from_proto(onnx.load_from_string(before))  # with the shapes of all tensors written down
    np.testing.assert_array_equal(run(space_to_depth(from_file), x, integers), result)
    if precision == "onnxruntime" and kind == "uint8":
        # Repeated for each column, or ONNX Runtime is slow (calibration/cpu.py).
        assert changed.graph.initializers["input.mean"].shape == (1, 12, 1, 24)
    assert {v.name for n in model.graph for v in n.outputs} <= {v.name for n in changed.graph for v in n.outputs}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 34, 38])
def test_the_stem_computes_what_pytorch_computes(
    size: int, kind: InputKind, make_card: Callable[..., ModelCard], random_weights: Callable[..., Weights]
) -> None:
    """In small integers, whose sums are exact, at the border too: there the image is continued with its mean."""
    mean = [20, 130, 250]
    card = make_card(image_size=size, mean=[each / 255 for each in mean], std=[0.5 / 255, 1 / 255, 0.25 / 255])
    model, random = build_graph(card, random_weights(card), kind), np.random.default_rng(size)
    weight = random.integers(-9, 10, (16, 3, 7, 7)).astype(np.float32)
    bias = random.integers(-9, 10, 16).astype(np.float32)
    for name, array in {"conv1.weight": weight, "conv1.bias": bias}.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    x = feed(card, kind).round()
    normalised = x
    if kind == "uint8":
        normalised = ((x.astype(np.float32) - np.float32(mean)) * np.float32([2, 1, 4])).transpose(0, 3, 1, 2)
    expected = torch.conv2d(*(torch.from_numpy(array) for array in (normalised, weight, bias)), stride=2, padding=3)
    np.testing.assert_array_equal(run(only_stem(space_to_depth(model)), x), expected.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_float16_may_come_after(kind: InputKind, card: ModelCard, weights: Weights) -> None:
    model, x = build_graph(card, weights, kind), feed(card, kind)
    expected = run(space_to_depth(to_float16(model)[0]), x)
    np.testing.assert_array_equal(run(to_float16(space_to_depth(model))[0], x), expected)


def only_stem(model: ir.Model) -> ir.Model:
    """Up to the tensor bn1, its output then."""
    proto = ir.to_proto(model)
    last = next(index for index, node in enumerate(proto.graph.node) if node.output[0] == "bn1")
    del proto.graph.node[last + 1 :], proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("bn1", onnx.TensorProto.FLOAT, None))
    read = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return ir.from_proto(proto)


def test_leaves_what_it_cannot_change(make_card: Callable[..., ModelCard], random_weights: Callable) -> None:
    odd, even = make_card("odd", image_size=47), make_card("even", image_size=48)
    model = build_graph(odd, random_weights(odd))
    assert serialise(space_to_depth(model)) == serialise(model)

    model = build_graph(even, random_weights(even))
    changed = space_to_depth(model)
    assert serialise(space_to_depth(changed)) == serialise(changed)

    (stem,) = (node for node in model.graph if node.name == "conv1")
    other = model.clone()
    (other_stem,) = (node for node in other.graph if node.name == "conv1")
    other_stem.attributes["strides"] = ir.AttrInt64s("strides", [1, 1])
    assert serialise(space_to_depth(other)) == serialise(other)

    seen = ir.node("Relu", [stem.inputs[0]], name="seen")  # somebody else reads the normalised image
    model.graph.insert_before(stem, seen)
    assert serialise(space_to_depth(model)) == serialise(model)


def test_a_scale_an_input_channel_is_left_alone(card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    (stem,) = (node for node in model.graph if node.name == "conv1")
    names = {"s": np.ones(3, np.float32), "z": np.zeros(3, np.uint8)}
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in names.items()]
    for value in values:
        model.graph.register_initializer(value)
    quantise = ir.node("QuantizeLinear", [stem.inputs[0], *values], {"axis": 1}, name="q")
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], *values], {"axis": 1}, name="dq")
    model.graph.insert_before(stem, [quantise, dequantise])
    stem.replace_input_with(0, dequantise.outputs[0])
    assert serialise(space_to_depth(model)) == serialise(model)


def test_a_weight_that_is_no_constant_is_refused(card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    (stem,) = (node for node in model.graph if node.name == "conv1")
    model.graph.append(ir.node("Relu", [stem.inputs[1]], name="seen"))
    with pytest.raises(CheckFailed, match=r"conv1: its weight conv1\.weight is no constant that it alone reads"):
        space_to_depth(model)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_pass_leaves_layers_comparable_and_counts(
    precision: str, card: ModelCard, weights: Weights, tmp_path: Path
) -> None:
    model = in_precision(build_graph(card, weights), precision)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    before.write_bytes(serialise(model.clone()))
    for run_pass in PASSES.values():
        model = run_pass(model)
    after.write_bytes(serialise(pack(model, 8)))
    counts = [count(path) for path in (before, after)]
    assert counts[0].multiply_adds == counts[1].multiply_adds and counts[0].by_kind() == counts[1].by_kind()
    if precision == "fp32":
        layers = compare_layers(card, weights, after, "fp32", feed(card, "uint8"))
        assert len(layers) > 20 and not [layer.name for layer in layers if layer.departs]
