"""Packed groups compute the same, and unpacking restores them; PyTorch's grouped convolution says what that is.

Where equality is to hold bit for bit in floating point, all values are small integers times powers of two: their sums
are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from rxdeploy.bench.counts import count
from rxdeploy.calibration import cpu, tensorrt
from rxdeploy.calibration.ranges import Range
from rxdeploy.cards import ModelCard
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.float16 import to_float16
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.passes.groups import GROUPS, Grouped, grouped, pack, unpack

Weights = dict[str, NDArray[np.float32]]
often = settings(deadline=None, derandomize=True, max_examples=60)
seldom = settings(deadline=None, derandomize=True, max_examples=25)


@dataclass(frozen=True)
class Layer:
    groups: int
    width: int  # input channels a group
    out: int  # output channels a group
    kernel: int
    stride: int
    padding: int
    size: int
    seed: int

    @property
    def channels(self) -> int:
        return self.groups * self.width

    def integers(self, largest: int, *shape: int) -> NDArray[np.float32]:
        """Not zero, so that nothing that is lost goes unseen."""
        random = np.random.default_rng(self.seed)
        return (random.integers(1, largest, shape) * random.choice([-1, 1], shape)).astype(np.float32)

    def weight(self, largest: int = 9) -> NDArray[np.float32]:
        return self.integers(largest, self.groups * self.out, self.width, self.kernel, self.kernel)

    def feed(self, largest: int = 9) -> NDArray[np.float32]:
        return self.integers(largest, 2, self.channels, self.size, self.size)

    def model(self, weight: NDArray) -> ir.Model:
        """x -> Conv -> Relu -> Conv 1x1 -> y; the first has the weight `w`, the bias `b` and the node name `conv`."""
        element = helper.np_dtype_to_tensor_dtype(weight.dtype)
        out = len(weight)
        constants = {"w": weight, "b": self.integers(9, out), "wt": self.tail(out), "bt": np.zeros(out)}
        constants = {name: array.astype(weight.dtype) for name, array in constants.items()}
        conv = helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["z"],
            "conv",
            group=self.groups,
            pads=[self.padding] * 4,
            strides=[self.stride] * 2,
        )
        tail = helper.make_node("Conv", ["r", "wt", "bt"], ["y"], "tail")
        graph = helper.make_graph(
            [conv, helper.make_node("Relu", ["z"], ["r"], "relu"), tail],
            "layer",
            [helper.make_tensor_value_info("x", element, ["n", self.channels, self.size, self.size])],
            [helper.make_tensor_value_info("y", element, ["n", out, None, None])],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))

    def tail(self, out: int) -> NDArray[np.float32]:
        return np.eye(out, dtype=np.float32)[::-1].reshape(out, out, 1, 1)  # channels the other way round

    def by_pytorch(self, weight: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
        tensors = (torch.from_numpy(a) for a in (x, weight, self.integers(9, len(weight))))
        return torch.conv2d(*tensors, self.stride, self.padding, groups=self.groups).relu().numpy()[:, ::-1]


layers = st.builds(
    Layer,
    groups=st.integers(2, 12),
    width=st.integers(2, 9),
    out=st.integers(1, 5),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    size=st.integers(5, 9),
    seed=st.integers(0, 9),
)
channels = st.sampled_from([1, 4, 8, 12, 16, 20, 32, 64, 1000])


def run(model: ir.Model, x: NDArray, integers: bool = False) -> NDArray:
    """With every node as it stands, or with the optimiser and the integer kernels that it makes of Q/DQ."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not integers:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def in_bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def width_of(model: ir.Model, name: str = "conv") -> int:
    (node,) = (node for node in model.graph if node.name == name)
    weight, reader = node.inputs[1], node
    while weight.producer():  # type: ignore[union-attr]
        reader = weight.producer()
        weight = reader.inputs[0]
    return weight.const_value.shape[1]


def largest_width(layer: Layer, most: int) -> int:
    """Counted out: the widest that `most` allows."""
    widths = [layer.width * k for k in range(1, layer.groups + 1) if layer.groups % k == 0]
    return max([layer.width, *(width for width in widths if width <= most)])


@often
@given(layers, channels)
def test_packed_floats_compute_what_pytorch_computes(layer: Layer, most: int) -> None:
    weight, x = layer.weight(), layer.feed()
    packed = pack(layer.model(weight), most)
    width = width_of(packed)
    assert width == largest_width(layer, most)
    assert packed.graph[0].attributes["group"].as_int() == layer.channels // width
    np.testing.assert_array_equal(run(packed, x), layer.by_pytorch(weight, x))
    random = np.random.default_rng(layer.seed)
    weight, x = (random.normal(size=a.shape).astype(np.float32) for a in (weight, x))
    expected = layer.by_pytorch(weight, x)
    np.testing.assert_allclose(run(pack(layer.model(weight), most), x, integers=True), expected, rtol=1e-5, atol=1e-4)


@often
@given(layers, channels)
def test_packed_float16_computes_what_pytorch_computes(layer: Layer, most: int) -> None:
    weight, x = layer.weight(4), layer.feed(4)
    model = layer.model(weight.astype(np.float16))
    expected = layer.by_pytorch(weight, x)
    np.testing.assert_array_equal(run(pack(model, most), x.astype(np.float16)), expected.astype(np.float16))


def quantised(layer: Layer, scheme: str, exact: bool) -> tuple[ir.Model, NDArray]:
    """A layer with Q/DQ nodes around it, groups its own, and what to feed it.

    Weights have 7 bits, with which no kernel of any CPU saturates. With `exact`, scales are powers of two.
    """
    weight, random = layer.weight(64), np.random.default_rng(layer.seed)
    steps = 2.0 ** random.integers(-3, 1, len(weight)) if exact else random.uniform(0.1, 1, len(weight))
    scale = steps.astype(np.float32)
    model = layer.model(weight * scale[:, None, None, None])
    scales = {"w": scale, "wt": np.ones(len(weight), np.float32)}
    reach = layer.width * layer.kernel**2 * 16 * 64 * float(scale.max())
    if scheme == "onnxruntime":
        low, top = (-64 * 0.25, 191 * 0.25) if exact else (-20.0, 70.0)
        model = unpack(cpu.place(model, {"x": Range(low, top), "r": Range(0, reach)}, scales, 63))
    else:
        top = 127 * 0.25 if exact else 30.0
        model = tensorrt.place(model, {"x": Range(-top, top), "r": Range(0, reach)}, scales)
    return model, layer.feed(int(top) // 4) if exact else random.uniform(-top, top, layer.feed().shape).astype("f4")


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
@seldom
@given(layers, channels, st.booleans())
def test_packed_integers_give_the_same_bits(scheme: str, layer: Layer, most: int, integers: bool) -> None:
    """In ONNX Runtime's integer kernels with any scales, in float arithmetic with those that it represents exactly."""
    model, x = quantised(layer, scheme, exact=scheme == "tensorrt" or not integers)
    packed, expected = pack(model, most), run(model, x, integers)
    assert width_of(packed) == largest_width(layer, most)
    assert expected.any()
    np.testing.assert_array_equal(run(packed, x, integers), expected)


@seldom
@given(layers, channels)
def test_packed_integers_give_the_same_bits_in_float16(layer: Layer, most: int) -> None:
    layer = Layer(**{**vars(layer), "kernel": 1})  # sums within float16's range
    model, x = quantised(layer, "tensorrt", exact=True)
    half, _ = to_float16(model)
    expected = run(half, x)
    assert np.isfinite(expected).all() and expected.any()
    np.testing.assert_array_equal(run(pack(half, most), x), expected)


@pytest.mark.parametrize("scheme", ["float32", "float16", "onnxruntime", "tensorrt"])
@seldom
@given(layers, channels, channels)
def test_unpacking_restores_every_byte(scheme: str, layer: Layer, most: int, other: int) -> None:
    if scheme.startswith("float"):
        model = layer.model(layer.weight().astype(scheme))
    else:
        model, _ = quantised(layer, scheme, exact=False)
    before, packed = in_bytes(model), pack(model, most)
    assert in_bytes(model) == before
    assert in_bytes(unpack(packed)) == before
    assert in_bytes(pack(packed, other)) == in_bytes(pack(model, other))
    files = [onnx.load_from_string(serialise(each)) for each in (model, packed)]  # all shapes are written down there
    own, again = files[0], ir.to_proto(unpack(ir.from_proto(files[1])))
    for part in ("node", "initializer", "value_info"):  # onnx-ir puts constants of more than 1000 bytes last
        assert {v.name: v for v in getattr(again.graph, part)} == {v.name: v for v in getattr(own.graph, part)}


def test_integers_with_a_zero_point_of_their_own() -> None:
    """As other quantisers write weights: the channels between the groups must be the zero point, not 0."""
    layer = Layer(groups=6, width=2, out=3, kernel=3, stride=1, padding=1, size=6, seed=0)
    weight, x = layer.weight(), layer.feed()
    model = layer.model(weight)
    stored, zero_point = (weight + 100).astype(np.uint8), np.full(len(weight), 100, np.uint8)
    graph, conv = model.graph, model.graph[0]
    values = [ir.Value(name=n, const_value=ir.tensor(a)) for n, a in (("q", stored), ("z8", zero_point))]
    values.append(ir.Value(name="s", const_value=ir.tensor(np.ones(len(weight), np.float32))))
    for value in values:
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype  # type: ignore[union-attr]
        graph.register_initializer(value)
    dequantise = ir.node("DequantizeLinear", [values[0], values[2], values[1]], attributes={"axis": 0}, name="dq")
    graph.insert_before(conv, dequantise)
    conv.replace_input_with(1, dequantise.outputs[0])
    del graph.initializers["w"]
    expected = layer.by_pytorch(weight, x)
    for most in (2, 4, 12):
        np.testing.assert_array_equal(run(pack(model, most), x), expected)

    dequantise.attributes["axis"] = ir.AttrInt64("axis", 1)
    with pytest.raises(CheckFailed, match="conv: the scales of its weight q are not one an output channel"):
        pack(model, 4)

    in_blocks = np.ones((len(weight) // 3, *weight.shape[1:]), np.float32)  # of three output channels
    values[2].const_value, values[2].shape = ir.tensor(in_blocks, name="s"), ir.Shape(in_blocks.shape)
    dequantise.attributes["axis"] = ir.AttrInt64("axis", 0)
    dequantise.attributes["block_size"] = ir.AttrInt64("block_size", 3)
    with pytest.raises(CheckFailed, match="conv: the scales of its weight q are not one an output channel"):
        pack(model, 4)


def test_a_weight_that_two_read_is_refused() -> None:
    layer = Layer(groups=4, width=4, out=4, kernel=3, stride=1, padding=1, size=6, seed=0)
    model = layer.model(layer.weight())
    conv, relu, _ = model.graph
    again = ir.node("Conv", [conv.outputs[0], conv.inputs[1]], attributes={"group": 4, "pads": [1] * 4}, name="again")
    model.graph.insert_after(conv, again)
    relu.replace_input_with(0, again.outputs[0])
    with pytest.raises(CheckFailed, match="conv: its weight w is no constant that it alone reads"):
        pack(model, 8)


@pytest.mark.parametrize(
    ("groups", "width", "expected"),
    [
        (32, 4, (4, 8, 16, 32, 64, 128)),  # ResNeXt-50's first stage
        (32, 32, (32, 64, 1024)),  # and its last
        (64, 4, (4, 8, 16, 32, 64, 256)),
        (8, 8, (8, 16, 32, 64)),  # here 64 is dense
        (6, 4, (4, 8, 24)),  # four of 4 would fit 16, but four does not divide six
        (5, 12, (12, 60)),
        (16, 1, (1, 8, 16)),
        (2, 64, (64, 128)),
    ],
)
def test_which_widths_a_layer_can_have(groups: int, width: int, expected: tuple[int, ...]) -> None:
    layer = Layer(groups, width, out=1, kernel=1, stride=1, padding=0, size=5, seed=0)
    model = layer.model(layer.weight())
    own = {"conv": Grouped(groups, width, groups * width, expected)}
    assert grouped(model) == own
    for each in expected:
        packed = pack(model, {"conv": each})
        assert width_of(packed) == each and grouped(packed) == own
        assert grouped(ir.from_proto(onnx.load_from_string(serialise(packed)))) == own


def test_each_layer_by_its_name(card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    assert list(grouped(model)) == ["layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2", "layer3.0.conv2"]

    def groups(model: ir.Model) -> dict[str, int]:
        return {
            name: node.attributes["group"].as_int() for node in model.graph if (name := node.name) in grouped(model)
        }

    first = pack(model, {"layer1.0.conv2": 4, "layer2.0.conv2": 8})
    assert list(groups(first).values()) == [2, 2, 4, 4]
    second = pack(first, {"layer2.0.conv2": 4, "layer3.0.conv2": 24})
    assert list(groups(second).values()) == [2, 4, 4, 1]
    noted = [node.metadata_props.get(GROUPS) for node in second.graph if node.name in grouped(model)]
    assert noted == ["4", None, None, "4"]
    assert serialise(pack(second, 1)) == serialise(unpack(second)) == serialise(model)
    with pytest.raises(InputError, match=r"no grouped convolution layer1\.0\.conv1, layer9"):
        pack(model, {"layer9": 8, "layer1.0.conv1": 8})
    with pytest.raises(InputError, match=r"layer1\.0\.conv2 cannot have 0 channels"):
        pack(model, {"layer1.0.conv2": 0})


def test_depthwise_layers_are_packed_by_name_only() -> None:
    layer = Layer(groups=8, width=1, out=2, kernel=3, stride=1, padding=1, size=6, seed=0)
    weight, x = layer.weight(), layer.feed()
    model = layer.model(weight)
    by_name = pack(model, {"conv": 4})
    assert (width_of(pack(model, 64)), width_of(by_name), width_of(pack(by_name, 64))) == (1, 4, 1)
    np.testing.assert_array_equal(run(by_name, x), layer.by_pytorch(weight, x))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_multiply_adds_are_counted_without_the_zeros(
    precision: str, card: ModelCard, weights: Weights, tmp_path: Path, run_onnx: Callable[..., NDArray]
) -> None:
    model = build_graph(card, weights)
    if precision == "fp16":
        model, _ = to_float16(model)
    if precision == "int8":
        tensors = {v.name or "": Range(-4, 4) for node in model.graph for v in node.outputs}
        scales = {n: np.full(v.shape[0], 0.02, np.float32) for n, v in model.graph.initializers.items() if v.shape}
        model = unpack(cpu.place(model, tensors, scales, 63))
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    path, found = tmp_path / "model.onnx", []
    for most in (1, 8, 16, 32, 64, 1024):
        path.write_bytes(serialise(pack(model, most)))
        counts = count(path)
        found.append((counts.multiply_adds, counts.by_kind()))
        if precision == "int8":
            np.testing.assert_array_equal(run_onnx(path.read_bytes(), images), run_onnx(serialise(model), images))
    assert found == found[:1] * len(found)
