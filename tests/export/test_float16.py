"""The float16 pass: types by ONNX's own inference; numbers by hand, by PyTorch and against the float32 graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from rxdeploy.cards import ModelCard
from rxdeploy.errors import CheckFailed
from rxdeploy.export.float16 import Rounding, round_everywhere, to_float16
from rxdeploy.export.graph import InputKind, build_graph, serialise

Weights = dict[str, NDArray[np.float32]]

# A float32 input used twice, a constant each of float32 and int64, two outputs.
TWO_USERS = """
<ir_version: 10, opset_import: ["" : 21]>
small (float[n, 2, 3] x) => (float[n, 6] y, float[n, 2, 3] z)
<float[1, 2, 3] factor = {1, 1, 1, 1, 1, 1}, int64[2] to = {0, -1}>
{
    doubled = Add (x, x)
    z = Mul (doubled, factor)
    y = Reshape (doubled, to)
}
"""
# 1 + k / 2048 lies halfway between two float16 where k is odd; of those, the even one is taken. So it is at the lower
# end, where float16 has the multiples of 2^-24 only.
ROUNDED_BY_HAND = [
    (1 + 1 / 2048, 1),
    (1 + 3 / 2048, 1 + 4 / 2048),
    (1 + 1 / 2048 + 2**-20, 1 + 2 / 2048),
    (-1 - 1 / 2048, -1),
    (2049, 2048),
    (2051, 2052),
    (65504, 65504),
    (0.1, 1638 / 16384),
    (2**-24, 2**-24),
    (3 * 2**-25, 2**-23),
]
FLUSHED_BY_HAND = [2**-25, -(2**-25), 1e-8, -1e-30]
NOT_FLUSHED_BY_HAND = [0.0, -0.0, 2**-25 * 1.001, 2**-24, -1.0]


def scaling(values: list[float]) -> ir.Model:
    """x * values + offset."""
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("Mul", ["x", "values"], ["scaled"], "scale"),
                onnx.helper.make_node("Add", ["scaled", "offset"], ["y"], "shift"),
            ],
            "scaling",
            [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(values)])],
            [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(values)])],
            [
                onnx.numpy_helper.from_array(np.asarray(values, np.float32), "values"),
                onnx.numpy_helper.from_array(np.float32(0.5), "offset"),
            ],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return ir.from_proto(model)


def constants(model: ir.Model) -> dict[str, NDArray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in ir.to_proto(model).graph.initializer}


def types_of(model: bytes) -> dict[str, int]:
    """The element type of every tensor: stated for inputs and constants, inferred by ONNX for the rest."""
    proto = onnx.load_from_string(model)
    del proto.graph.value_info[:]  # what the file claims
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    graph = proto.graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    assert {name for node in graph.node for name in node.output} <= set(types)
    return types


def pictures(card: ModelCard, kind: InputKind) -> NDArray:
    size, random = card.input.image_size, np.random.default_rng(0)
    if kind == "uint8":
        return random.integers(0, 256, (3, size, size, 3), np.uint8)
    return random.normal(size=(3, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("reloaded", [False, True], ids=["as built", "read from a file"])
@pytest.mark.parametrize(
    ("kind", "name", "element"), [("uint8", "image", TensorProto.UINT8), ("float32", "input", TensorProto.FLOAT)]
)
def test_everything_but_input_and_logits_is_float16(
    kind: InputKind, name: str, element: int, reloaded: bool, card: ModelCard, weights: Weights
) -> None:
    model = build_graph(card, weights, kind)
    if reloaded:
        model = ir.from_proto(onnx.load_from_string(serialise(model)))
    half = serialise(to_float16(model)[0])
    onnx.checker.check_model(half, full_check=True)
    types = types_of(half)
    assert types.pop(name) == element
    assert types.pop("logits") == TensorProto.FLOAT
    assert types and set(types.values()) == {TensorProto.FLOAT16}
    # What the file claims of its tensors agrees with what ONNX infers.
    stated = {v.name: v.type.tensor_type.elem_type for v in onnx.load_from_string(half).graph.value_info}
    assert stated and set(stated.values()) == {TensorProto.FLOAT16}


def test_bytes_go_to_float16_directly(card: ModelCard, weights: Weights) -> None:
    graph = onnx.load_from_string(serialise(to_float16(build_graph(card, weights))[0])).graph
    casts = [(node.input[0], node.attribute[0].i) for node in graph.node if node.op_type == "Cast"]
    assert casts == [("image", TensorProto.FLOAT16), ("logits.half", TensorProto.FLOAT)]


def test_layers_keep_their_names(card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    before = {name for node in model.graph for name in [node.outputs[0].name]}
    after = {name for node in to_float16(model)[0].graph for name in [node.outputs[0].name]}
    assert before < after and after - before == {"logits.half"}


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_computes_the_same_up_to_rounding(
    kind: InputKind, card: ModelCard, weights: Weights, run_onnx: Callable[..., NDArray[np.float32]]
) -> None:
    model, images = build_graph(card, weights, kind), pictures(card, kind)
    expected = run_onnx(serialise(model), images)
    actual = run_onnx(serialise(to_float16(model)[0]), images)
    assert actual.dtype == np.float32
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    # 13 convolutions one after another, each rounding weights and activations by up to 2^-11.
    assert 2**-15 < error < 12 * 2**-11


@pytest.mark.parametrize("reloaded", [False, True], ids=["as built", "read from a file"])
def test_leaves_the_model_given_as_it_is(reloaded: bool, card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    if reloaded:  # then every tensor has a type
        model = ir.from_proto(onnx.load_from_string(serialise(model)))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    to_float16(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert serialise(model) == serialise(build_graph(card, weights))


def test_same_input_same_bytes(card: ModelCard, weights: Weights) -> None:
    first, second = (serialise(to_float16(build_graph(card, weights))[0]) for _ in range(2))
    assert first == second


def test_keeps_what_the_model_says_of_itself(card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    assert dict(to_float16(model)[0].metadata_props) == dict(model.metadata_props)


def test_input_with_two_users_and_two_outputs(run_onnx: Callable[..., NDArray[np.float32]]) -> None:
    model = ir.from_proto(onnx.parser.parse_model(TWO_USERS))
    half, rounding = to_float16(model)
    assert rounding == Rounding(constants=6, flushed=0)
    types = types_of(serialise(half))
    assert (types.pop("x"), types.pop("y"), types.pop("z"), types.pop("to")) == (1, 1, 1, TensorProto.INT64)
    assert set(types.values()) == {TensorProto.FLOAT16}
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    np.testing.assert_array_equal(run_onnx(serialise(half), x), 2 * x.reshape(2, 6))


def test_rounds_to_nearest_even() -> None:
    values, expected = zip(*ROUNDED_BY_HAND, strict=True)
    half, _ = to_float16(scaling([*values]))
    np.testing.assert_array_equal(constants(half)["values"], np.asarray(expected, np.float64))


def test_rounds_every_weight_as_pytorch_does(card: ModelCard, weights: Weights) -> None:
    model = build_graph(card, weights)
    full, (half, rounding) = constants(model), to_float16(model)
    for name, array in constants(half).items():
        expected = torch.from_numpy(full[name].copy()).half()
        np.testing.assert_array_equal(array, expected.numpy(), err_msg=name)
    assert rounding.constants == sum(array.size for array in full.values())


def test_counts_what_became_zero() -> None:
    values = FLUSHED_BY_HAND + NOT_FLUSHED_BY_HAND
    half, rounding = to_float16(scaling(values))
    assert rounding == Rounding(constants=len(values) + 1, flushed=len(FLUSHED_BY_HAND))
    assert np.count_nonzero(constants(half)["values"]) == len(NOT_FLUSHED_BY_HAND) - 2  # the two zeros


def test_rounding_everywhere_by_hand(run_onnx: Callable[..., NDArray[np.float32]]) -> None:
    """x * values + 0.5 with every step rounded, as NumPy's float16 arithmetic rounds it."""
    values = [1 + 1 / 1024, 0.1, 300.0, -300.0, 1e-4, 3.0]
    x = np.asarray([[1 + 3 / 2048, 0.3, 300.0, 300.0, 1e-4, 2049.0]] * 2, np.float32)
    rounding = round_everywhere(to_float16(scaling(values))[0])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16) * np.asarray(values, np.float16) + np.float16(0.5)
    assert expected[0, 2] == np.inf and expected[0, 3] == -np.inf
    np.testing.assert_array_equal(run_onnx(serialise(rounding), x), expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_rounding_everywhere_reaches_every_layer(kind: InputKind, card: ModelCard, weights: Weights) -> None:
    half = to_float16(build_graph(card, weights, kind))[0]
    before = ir.to_proto(half).SerializeToString(deterministic=True)
    model = onnx.load_from_string(serialise(round_everywhere(half)))
    assert ir.to_proto(half).SerializeToString(deterministic=True) == before, "the model given stays as it is"
    # Every tensor under its old name, in float32, and with float16's values only.
    names = [node.outputs[0].name for node in half.graph if node.outputs[0].name != "logits"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = session.run(names, {session.get_inputs()[0].name: pictures(card, kind)})
    for name, array in zip(names, arrays, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, array.astype(np.float16).astype(np.float32), err_msg=name)


def test_rounding_everywhere_stays_near(
    card: ModelCard, weights: Weights, run_onnx: Callable[..., NDArray[np.float32]]
) -> None:
    model, images = build_graph(card, weights), pictures(card, "uint8")
    expected = run_onnx(serialise(model), images)
    half = to_float16(model)[0]
    coarse, fine = run_onnx(serialise(round_everywhere(half)), images), run_onnx(serialise(half), images)
    assert np.linalg.norm(coarse - expected) / np.linalg.norm(expected) < 13 * 2**-11
    assert not np.array_equal(coarse, fine)


@pytest.mark.parametrize("value", [1e5, -1e5, float("nan"), float("inf"), 65536.0])
def test_names_the_weight_that_float16_cannot_hold(value: float) -> None:
    with pytest.raises(CheckFailed) as caught:
        to_float16(scaling([1.0, value]))
    assert "values (largest magnitude" in str(caught.value)
    assert "offset" not in str(caught.value)
    assert "--fp32" in str(caught.value)


def test_names_every_layer_that_float16_cannot_hold(card: ModelCard, weights: Weights) -> None:
    weights["fc.weight"][0, 0] = 1e5
    weights["layer2.1.conv2.weight"][3] *= 1e7
    with pytest.raises(CheckFailed) as caught:
        to_float16(build_graph(card, weights))
    text = str(caught.value)
    assert "fc.weight (largest magnitude 100000)" in text and "layer2.1.conv2.weight" in text
    assert "layer2.1.conv1" not in text and "fc.bias" not in text
