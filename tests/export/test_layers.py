"""Layer by layer: does the comparison name the one layer that was sabotaged?"""

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
from onnx import numpy_helper

from rxdeploy.cards import ModelCard
from rxdeploy.engines.bundle import Precision
from rxdeploy.export.float16 import to_float16
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.layers import LayerDeviation, compare_layers, first_departure
from rxdeploy.export.module import ResNeXt
from rxdeploy.export.synthetic import synthetic_weights
from rxdeploy.export.validate import LIMITS, validation_samples

Weights = dict[str, NDArray[np.float32]]


@pytest.fixture
def images(card: ModelCard) -> NDArray[np.uint8]:
    return validation_samples(card).images[[0, -1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def model_file(card: ModelCard, weights: Weights, precision: Precision) -> onnx.ModelProto:
    model = build_graph(card, weights)
    return onnx.load_from_string(serialise(model if precision == "fp32" else to_float16(model)[0]))


def scale(model: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), name))


def node_named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def departures(layers: list[LayerDeviation]) -> list[str]:
    return [layer.name for layer in layers if layer.departs]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_good_model_departs_nowhere(
    precision: Precision, card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path
) -> None:
    path.write_bytes(model_file(card, weights, precision).SerializeToString())
    layers = compare_layers(card, weights, path, precision, images)
    assert departures(layers) == [] and first_departure(layers) is None
    # Every batch-norm, every block, the pool and the logits are there, each once.
    modules = dict(ResNeXt(card).named_modules())
    norms = {name for name, module in modules.items() if isinstance(module, torch.nn.BatchNorm2d)}
    blocks = {name for name, module in modules.items() if type(module).__name__ == "Bottleneck"}
    names = [layer.name for layer in layers]
    assert len(names) == len(set(names))
    assert set(names) == norms | blocks | {"maxpool", "logits"}
    assert names[:3] == ["bn1", "maxpool", "layer1.0.bn1"] and names[-2:] == ["layer3.0", "logits"]


def test_figures_of_a_layer_by_hand(card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path) -> None:
    model = model_file(card, weights, "fp32")
    for part in ("weight", "bias"):
        scale(model, f"fc.{part}", 1.5)
    path.write_bytes(model.SerializeToString())
    module = ResNeXt(card)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    x = (images / 255 - np.asarray(card.input.mean)) / np.asarray(card.input.std)
    with torch.inference_mode():
        largest = float(module.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2)).float()).abs().max())
    last = compare_layers(card, weights, path, "fp32", images)[-1]
    assert last.as_facts() == {
        "name": "logits",
        "relative_l2": pytest.approx(0.5, rel=1e-4),
        "max_abs_error": pytest.approx(0.5 * largest, rel=1e-4),
        "largest": pytest.approx(largest, rel=1e-4),
        "departs": True,
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("constant", "tensor"),
    [
        ("conv1.weight", "bn1"),
        ("layer1.0.conv1.bias", "layer1.0.bn1"),
        ("layer2.0.conv2.weight", "layer2.0.bn2"),
        ("layer2.1.conv3.weight", "layer2.1.bn3"),
        ("layer3.0.downsample.0.weight", "layer3.0.downsample.1"),
        ("fc.weight", "logits"),
        ("input.scale", "bn1"),
    ],
)
def test_names_the_sabotaged_layer(
    constant: str,
    tensor: str,
    precision: Precision,
    card: ModelCard,
    weights: Weights,
    images: NDArray[np.uint8],
    path: Path,
) -> None:
    model = model_file(card, weights, precision)
    scale(model, constant, {"fp32": 1.002, "fp16": 3.0}[precision])
    path.write_bytes(model.SerializeToString())
    layers = compare_layers(card, weights, path, precision, images)
    first = first_departure(layers)
    assert first is not None and first.name == tensor == departures(layers)[0]


def subtract(model: onnx.ModelProto) -> None:
    node_named(model, "layer2.1.add").op_type = "Sub"


def shift_pool(model: onnx.ModelProto) -> None:
    next(a.ints for a in node_named(model, "maxpool").attribute if a.name == "pads")[:] = [0, 0, 2, 2]


def no_stride(model: onnx.ModelProto) -> None:
    """In both ways through the block, so that the graph still fits together."""
    del model.graph.value_info[:]
    for name in ("layer3.0.conv2", "layer3.0.downsample.0"):
        next(a.ints for a in node_named(model, name).attribute if a.name == "strides")[:] = [1, 1]


def no_relu(model: onnx.ModelProto) -> None:
    node_named(model, "layer2.0.conv2.relu").op_type = "Identity"


@pytest.mark.parametrize(
    ("sabotage", "tensor"),
    [
        (subtract, "layer2.1"),
        (shift_pool, "maxpool"),
        (no_stride, "layer3.0.bn2"),  # of another shape
        (no_relu, "layer2.0.bn3"),  # the first tensor compared behind it
    ],
)
def test_names_the_layer_computed_wrongly(
    sabotage: Callable[[onnx.ModelProto], None],
    tensor: str,
    card: ModelCard,
    weights: Weights,
    images: NDArray[np.uint8],
    path: Path,
) -> None:
    model = model_file(card, weights, "fp32")
    sabotage(model)
    path.write_bytes(model.SerializeToString())
    first = first_departure(compare_layers(card, weights, path, "fp32", images))
    assert first is not None and first.name == tensor


def test_finds_an_error_that_does_not_reach_the_logits(
    card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path
) -> None:
    """Every value of one channel is far below zero, where float16 has no numbers; ReLU makes it right again."""
    weights["layer2.0.conv2.weight"][0] = -3e4
    for part, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
        weights[f"layer2.0.bn2.{part}"][0] = value
    path.write_bytes(model_file(card, weights, "fp16").SerializeToString())
    layers = compare_layers(card, weights, path, "fp16", images)
    assert departures(layers) == ["layer2.0.bn2"]
    first = first_departure(layers)
    assert first is not None and first.relative_l2 == float("inf") and first.largest > 65504


def test_finds_where_float16_overflows(
    card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path
) -> None:
    """Activations of 1e5 and more in one layer, brought down again by the next: harmless in float32."""
    large = np.float32(2e5)
    for part, value in {"weight": large, "bias": 0, "running_mean": 0, "running_var": 1}.items():
        weights[f"layer2.1.bn1.{part}"][:] = value
    weights["layer2.1.conv2.weight"] /= large
    path.write_bytes(model_file(card, weights, "fp16").SerializeToString())
    first = first_departure(compare_layers(card, weights, path, "fp16", images))
    assert first is not None and first.name == "layer2.1.bn1"
    assert first.relative_l2 == float("inf") and first.largest > 65504
    path.write_bytes(model_file(card, weights, "fp32").SerializeToString())
    assert first_departure(compare_layers(card, weights, path, "fp32", images)) is None


def test_finds_where_nan_begins(card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path) -> None:
    model = model_file(card, weights, "fp32")
    scale(model, "layer2.0.conv2.bias", float("nan"))
    path.write_bytes(model.SerializeToString())
    layers = compare_layers(card, weights, path, "fp32", images)
    assert departures(layers)[0] == "layer2.0.bn2"
    assert np.isnan(next(layer for layer in layers if layer.departs).relative_l2)


def test_a_model_of_other_names_is_compared_where_it_can_be(
    card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path
) -> None:
    model = model_file(card, weights, "fp32")
    del model.graph.value_info[:]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"t.{name}" if name.startswith(("bn", "layer", "maxpool")) else name for name in names]
    for tensor in model.graph.initializer:
        if tensor.name.startswith("layer"):
            tensor.name = f"t.{tensor.name}"
    path.write_bytes(model.SerializeToString())
    assert [layer.name for layer in compare_layers(card, weights, path, "fp32", images)] == ["logits"]


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_either_input(kind: Any, card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path) -> None:
    path.write_bytes(serialise(build_graph(card, weights, kind)))
    assert first_departure(compare_layers(card, weights, path, "fp32", images)) is None


def test_weights_outside_the_file(card: ModelCard, weights: Weights, images: NDArray[np.uint8], path: Path) -> None:
    """What torch.onnx.export writes: the weights in a second file beside the model."""
    ir.save(build_graph(card, weights), path, external_data="model.onnx.data")
    assert first_departure(compare_layers(card, weights, path, "fp32", images)) is None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_departs_in_a_deep_model(make_card: Callable[..., ModelCard], tmp_path: Path, precision: str) -> None:
    """In 33 narrow blocks rounding adds up as far as it does in any of our models."""
    architecture = {"layers": [3, 4, 23, 3], "channels": [16, 32, 48, 64], "cardinality": 4, "base_width": 8}
    card = make_card("deep", **architecture, stem_width=16, image_size=64)
    weights = synthetic_weights(card)
    model = build_graph(card, weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(serialise(model if precision == "fp32" else to_float16(model)[0]))
    layers = compare_layers(card, weights, path, precision, validation_samples(card).images[[0, -1]])
    assert first_departure(layers) is None
    assert layers[-1].name == "logits" and layers[-1].relative_l2 < LIMITS[precision].relative_l2
