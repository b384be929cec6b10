"""Validation: its arithmetic by hand, and whether it tells good models from bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from rxdeploy.cards import ModelCard
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.float16 import to_float16
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.module import ResNeXt
from rxdeploy.export.reference import run_reference
from rxdeploy.export.validate import (
    LIMITS,
    Limits,
    check_interface,
    deviation,
    open_session,
    relative_l2,
    validate_model,
    validation_batches,
    validation_samples,
    within,
)

Weights = dict[str, NDArray[np.float32]]
CPU = "CPUExecutionProvider"


def logits(*rows: list[float]) -> NDArray[np.float32]:
    return np.asarray(rows, np.float32)


REFERENCE = logits([0, 3, 4], [10, 0, 0])  # leads 1 and 10; spreads sqrt(26 / 9) = 1.70 and sqrt(200 / 9) = 4.71


def test_deviation_by_hand() -> None:
    figures = deviation(logits([0, 3, 0], [10, 0, 0]), REFERENCE, tie=0.1)
    assert figures == {
        "images": 2,
        "max_abs_error": 4.0,
        "relative_l2": pytest.approx(4 / 125**0.5),
        "top1_agreement": 0.5,
        "ties": 0,
        "flipped": 1,
    }


def test_a_tie_may_flip() -> None:
    # The lead of 1 is below 0.6 * 1.70, the lead of 10 is not below 0.6 * 4.71.
    figures = deviation(logits([0, 4, 3], [10, 0, 0]), REFERENCE, tie=0.6)
    assert (figures["ties"], figures["flipped"], figures["top1_agreement"]) == (1, 0, 0.5)
    # Each image's own spread counts: 1 is above 0.5 * 1.70, though below 0.5 * 3.58, which both rows together have.
    figures = deviation(logits([0, 4, 3], [10, 0, 0]), REFERENCE, tie=0.5)
    assert (figures["ties"], figures["flipped"]) == (0, 1)
    figures = deviation(logits([0, 3, 4], [0, 10, 0]), REFERENCE, tie=0.6)
    assert (figures["ties"], figures["flipped"], figures["top1_agreement"]) == (1, 1, 0.5)


def test_equal_leaders_are_a_tie_at_any_limit() -> None:
    figures = deviation(logits([0, 1, 2]), logits([0, 2, 2]), tie=0)
    assert (figures["ties"], figures["flipped"]) == (1, 0)


def test_no_deviation() -> None:
    figures = deviation(REFERENCE, REFERENCE.copy(), tie=0.1)
    assert (figures["max_abs_error"], figures["relative_l2"], figures["top1_agreement"]) == (0, 0, 1)
    assert within(figures, Limits(relative_l2=0, layer_l2=0, tie=0.1))


def test_a_single_class_never_flips() -> None:
    figures = deviation(logits([1], [-2]), logits([1], [2]), tie=0.1)
    assert (figures["ties"], figures["flipped"], figures["top1_agreement"]) == (0, 0, 1)
    assert figures["relative_l2"] == pytest.approx(4 / 5**0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_what_is_no_number_is_beyond_every_limit(value: float, place: tuple[int, int]) -> None:
    broken = REFERENCE.copy()
    broken[place] = value
    loose = Limits(relative_l2=1e30, layer_l2=1e30, tie=1e30)
    assert not within(deviation(broken, REFERENCE, loose.tie), loose)
    with np.errstate(invalid="ignore"):
        assert not within(deviation(REFERENCE, broken, 0.1), Limits(relative_l2=0.5, layer_l2=0.5, tie=0.1))


def test_limits_are_inclusive_and_flips_are_not_allowed() -> None:
    limits = Limits(relative_l2=0.25, layer_l2=0.25, tie=0)
    assert within({"relative_l2": 0.25, "flipped": 0}, limits)
    assert not within({"relative_l2": 0.2500001, "flipped": 0}, limits)
    assert not within({"relative_l2": 0.0, "flipped": 1}, limits)


def test_batches() -> None:
    assert validation_batches(1) == (1, 2)
    assert validation_batches(8) == (1, 8, 9)


def test_samples_are_photographs_and_noise(make_card: Callable[..., ModelCard]) -> None:
    card = make_card(image_size=40)
    samples = validation_samples(card)
    assert samples.images.shape == (len(samples.kinds), 40, 40, 3) and samples.images.dtype == np.uint8
    noise = np.asarray(samples.kinds) == "noise"
    assert 0 < noise.sum() < len(noise)
    # Neighbouring pixels of a photograph are alike, those of noise are not.
    steps = np.abs(np.diff(samples.images.astype(int), axis=1)).mean((1, 2, 3))
    assert steps[~noise].max() < 40 < 80 < steps[noise].min()
    assert len({image.tobytes() for image in samples.images}) == len(noise)
    np.testing.assert_array_equal(validation_samples(card).images, samples.images)


@pytest.fixture
def reference(card: ModelCard, weights: Weights) -> NDArray[np.float32]:
    return run_reference(card, weights, validation_samples(card).images)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("count", [1, 4, 6])
def test_reference_is_the_modules_output(count: int, card: ModelCard, weights: Weights) -> None:
    images = validation_samples(card).images[:count]
    module = ResNeXt(card)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    x = (images / 255 - np.asarray(card.input.mean)) / np.asarray(card.input.std)
    with torch.inference_mode():
        expected = module.eval().double()(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(run_reference(card, weights, images), expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_a_good_model_passes(
    kind: Any, card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path
) -> None:
    path.write_bytes(serialise(build_graph(card, weights, kind)))
    check_interface(card, path)
    count = len(reference)
    result = validate_model(card, path, "fp32", reference, (1, 5, 2 * count + 1))
    assert result["passed"] is True
    assert result["limits"] == {"relative_l2": 1e-4, "tie": 1e-3, "flipped": 0}
    figures = result["providers"][CPU]
    assert figures["all"]["images"] == 3 * count
    assert figures["photographs"]["images"] + figures["noise"]["images"] == 3 * count
    assert {batch: part["images"] for batch, part in figures["by_batch"].items()} == {
        "1": count,
        "5": count,
        str(2 * count + 1): count,
    }
    assert figures["all"]["relative_l2"] < 1e-5
    assert figures["all"]["max_abs_error"] < 1e-5 * np.abs(reference).max()


def test_float16_passes_by_its_own_limits_only(
    card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path
) -> None:
    path.write_bytes(serialise(to_float16(build_graph(card, weights))[0]))
    assert validate_model(card, path, "fp16", reference, (1, 3))["passed"] is True
    result = validate_model(card, path, "fp32", reference, (1, 3))
    assert result["passed"] is False
    assert LIMITS["fp32"].relative_l2 < result["providers"][CPU]["all"]["relative_l2"] < LIMITS["fp16"].relative_l2


def node_named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def ints(node: onnx.NodeProto, attribute: str) -> Any:
    return next(entry.ints for entry in node.attribute if entry.name == attribute)


def edit(model: onnx.ModelProto, name: str, change: Callable[[NDArray], NDArray]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def one_weight(model: onnx.ModelProto) -> None:
    def change(array: NDArray) -> NDArray:
        array[0] += 0.1 * np.abs(array).max()
        return array

    edit(model, "layer2.1.conv2.weight", change)


def group_order(model: onnx.ModelProto) -> None:
    edit(model, "layer3.0.conv2.weight", lambda array: np.roll(array, len(array) // 4, axis=0))


def stride_on_conv1(model: onnx.ModelProto) -> None:
    ints(node_named(model, "layer2.0.conv1"), "strides")[:] = [2, 2]
    ints(node_named(model, "layer2.0.conv2"), "strides")[:] = [1, 1]


def padding_below(model: onnx.ModelProto) -> None:
    ints(node_named(model, "layer2.0.conv2"), "pads")[:] = [0, 0, 2, 2]


def pool_padding_below(model: onnx.ModelProto) -> None:
    ints(node_named(model, "maxpool"), "pads")[:] = [0, 0, 2, 2]


def width_and_height(model: onnx.ModelProto) -> None:
    ints(node_named(model, "image.nchw"), "perm")[:] = [0, 3, 2, 1]


def blue_green_red(model: onnx.ModelProto) -> None:
    edit(model, "conv1.weight", lambda array: array[:, ::-1])


def mean_of_other_channels(model: onnx.ModelProto) -> None:
    edit(model, "input.mean", lambda array: array[:, ::-1])


def std_of_other_channels(model: onnx.ModelProto) -> None:
    edit(model, "input.scale", lambda array: array[:, ::-1])


def relu_lost(model: onnx.ModelProto) -> None:
    node_named(model, "layer1.0.conv2.relu").op_type = "Identity"


def bias_lost(model: onnx.ModelProto) -> None:
    edit(model, "layer3.0.downsample.0.bias", np.zeros_like)


def classes_swapped(model: onnx.ModelProto) -> None:
    for name in ("fc.weight", "fc.bias"):
        edit(model, name, lambda array: array[[1, 0, *range(2, len(array))]])


def batch_mixed(model: onnx.ModelProto) -> None:
    """Half of the logits' difference from the batch's mean: right for a batch of one."""
    node_named(model, "fc").output[0] = "own"
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array([0]), "batch_axis"), numpy_helper.from_array(np.float32(2), "two")]
    )
    model.graph.node.extend(
        [
            onnx.helper.make_node("ReduceMean", ["own", "batch_axis"], ["mean"], keepdims=1),
            onnx.helper.make_node("Add", ["own", "mean"], ["both"]),
            onnx.helper.make_node("Div", ["both", "two"], ["logits"]),
        ]
    )


SABOTAGES = [
    one_weight,
    group_order,
    stride_on_conv1,
    padding_below,
    pool_padding_below,
    width_and_height,
    blue_green_red,
    mean_of_other_channels,
    std_of_other_channels,
    relu_lost,
    bias_lost,
    classes_swapped,
]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda function: function.__name__)
def test_a_sabotaged_model_fails(
    sabotage: Callable[[onnx.ModelProto], None],
    card: ModelCard,
    weights: Weights,
    reference: NDArray[np.float32],
    path: Path,
) -> None:
    model = onnx.load_from_string(serialise(build_graph(card, weights)))
    sabotage(model)
    path.write_bytes(model.SerializeToString())
    check_interface(card, path)
    result = validate_model(card, path, "fp32", reference, (1, 3))
    assert result["passed"] is False
    assert result["providers"][CPU]["all"]["relative_l2"] > 10 * LIMITS["fp32"].relative_l2


def test_another_epsilon_fails(card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path) -> None:
    """An epsilon of 1e-3 (Keras' default) instead of 1e-5."""
    other = {name: array + 99e-5 if name.endswith("running_var") else array for name, array in weights.items()}
    path.write_bytes(serialise(build_graph(card, {name: array.astype(np.float32) for name, array in other.items()})))
    assert validate_model(card, path, "fp32", reference, (1,))["passed"] is False


def test_every_batch_size_is_run_as_it_is(
    card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path
) -> None:
    model = onnx.load_from_string(serialise(build_graph(card, weights)))
    batch_mixed(model)
    path.write_bytes(model.SerializeToString())
    assert validate_model(card, path, "fp32", reference, (1,))["passed"] is True
    result = validate_model(card, path, "fp32", reference, (1, 3))
    assert result["passed"] is False
    parts = result["providers"][CPU]["by_batch"]
    assert within(parts["1"], LIMITS["fp32"]) and not within(parts["3"], LIMITS["fp32"])


def test_overflow_that_no_cpu_shows_fails(card: ModelCard, weights: Weights, path: Path) -> None:
    """ONNX Runtime's CPU kernels keep activations in float32, a GPU does not: 1e5 and more in one layer are lost."""
    large = np.float32(2e5)
    for part, value in {"weight": large, "bias": 0, "running_mean": 0, "running_var": 1}.items():
        weights[f"layer2.1.bn1.{part}"][:] = value
    for part, factor in {"running_mean": large, "running_var": large**2}.items():
        weights[f"layer2.1.bn2.{part}"] *= factor
    reference = run_reference(card, weights, validation_samples(card).images)
    model = build_graph(card, weights)
    path.write_bytes(serialise(model))
    assert validate_model(card, path, "fp32", reference, (1,))["passed"] is True
    path.write_bytes(serialise(to_float16(model)[0]))
    assert validate_model(card, path, "fp16", reference, (1,))["passed"] is False


@pytest.mark.parametrize(("image", "kind"), [(0, "photographs"), (-1, "noise")])
def test_images_of_either_kind_count(
    image: int, kind: str, card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path
) -> None:
    path.write_bytes(serialise(build_graph(card, weights)))
    reference[image] *= 1.1
    result = validate_model(card, path, "fp32", reference, (1,))
    assert result["passed"] is False
    figures = result["providers"][CPU]
    assert [name for name in ("photographs", "noise") if not within(figures[name], LIMITS["fp32"])] == [kind]


def test_a_model_of_nans_fails(card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path) -> None:
    weights["fc.bias"] = np.full_like(weights["fc.bias"], np.nan)
    path.write_bytes(serialise(build_graph(card, weights)))
    assert validate_model(card, path, "fp32", reference, (1,))["passed"] is False


def test_session_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="ONNX Runtime cannot load the model") as caught:
        open_session(b"no model")
    assert "\n" not in str(caught.value)


def complaint(card: ModelCard, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_interface(card, path)
    text = str(caught.value)
    assert text.startswith(f"ONNX file {path}: ") and "\n" not in text
    return text


def test_interface_of_no_model(card: ModelCard, weights: Weights, tmp_path: Path, path: Path) -> None:
    assert "no such file" in complaint(card, tmp_path / "nowhere.onnx")
    assert "not a plain file" in complaint(card, tmp_path)
    whole = serialise(build_graph(card, weights))
    for content in (b"", b"no model", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "ONNX Runtime cannot load" in complaint(card, path)


def interface(inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, list[Any]]) -> onnx.ModelProto:
    """A model that gives zeros, whatever its inputs."""
    zeros = [onnx.helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], f"zeros {name}") for name in outputs]
    shapes = [
        numpy_helper.from_array(np.array([1 if isinstance(n, str) else n for n in shape]), f"{name}.shape")
        for name, shape in outputs.items()
    ]
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            zeros,
            "zeros",
            [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            shapes,
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )


IMAGE = {"image": (TensorProto.UINT8, ["batch", 48, 48, 3])}
LOGITS: dict[str, list[Any]] = {"logits": ["batch", 7]}
INTERFACES: dict[str, tuple[Any, Any, str]] = {
    "another size": ({"image": (TensorProto.UINT8, ["batch", 32, 32, 3])}, LOGITS, "image tensor(uint8)"),
    "channels first": ({"image": (TensorProto.UINT8, ["batch", 3, 48, 48])}, LOGITS, "3, 48, 48"),
    "another type": ({"image": (TensorProto.FLOAT, ["batch", 48, 48, 3])}, LOGITS, "tensor(float)"),
    "another name": ({"pixels": (TensorProto.UINT8, ["batch", 48, 48, 3])}, LOGITS, "pixels"),
    "two inputs": ({**IMAGE, "mask": (TensorProto.UINT8, ["batch", 1])}, LOGITS, "mask"),
    "no input": ({}, LOGITS, "logits"),
    "another output": (IMAGE, {"probabilities": ["batch", 7]}, "probabilities"),
}


@pytest.mark.parametrize("what", INTERFACES)
def test_interface_that_does_not_fit(what: str, card: ModelCard, path: Path) -> None:
    inputs, outputs, named = INTERFACES[what]
    path.write_bytes(interface(inputs, outputs).SerializeToString())
    text = complaint(card, path)
    assert named in text
    assert "small needs `image` uint8 (batch, 48, 48, 3) or `input` float32 (batch, 3, 48, 48), and `logits`" in text


def test_interface_that_fits(card: ModelCard, path: Path) -> None:
    for inputs in (IMAGE, {"input": (TensorProto.FLOAT, [None, 3, 48, 48])}):
        path.write_bytes(interface(inputs, {**LOGITS, "features": ["batch", 9]}).SerializeToString())
        check_interface(card, path)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(IMAGE, {"logits": ["batch", 5]}), ({"image": (TensorProto.UINT8, [1, 48, 48, 3])}, LOGITS)],
    ids=["another class count", "a batch of one only"],
)
def test_interface_that_validation_cannot_use(inputs: Any, outputs: Any, card: ModelCard, path: Path) -> None:
    path.write_bytes(interface(inputs, outputs).SerializeToString())
    complaint(card, path)


def test_files_with_weights_outside_are_read(
    card: ModelCard, weights: Weights, reference: NDArray[np.float32], path: Path
) -> None:
    """What torch.onnx.export writes by default for large models: the weights in a second file."""
    model = build_graph(card, weights)
    ir.save(model, path, external_data="model.onnx.data")
    assert path.with_name("model.onnx.data").is_file()
    check_interface(card, path)
    assert validate_model(card, path, "fp32", reference, (1,))["passed"] is True


def test_relative_l2_of_nothing() -> None:
    nothing, something = np.zeros((2, 3)), np.ones((2, 3))
    assert relative_l2(nothing, nothing) == 0
    assert relative_l2(something, nothing) == 1
    assert relative_l2(2 * something, something) == 1
    assert np.isnan(relative_l2(something * np.nan, something))


def test_what_is_validated_does_not_grow_with_the_batch() -> None:
    assert validation_batches(8) == (1, 8, 9)
    assert validation_batches(4096) == (1, 64, 65)
