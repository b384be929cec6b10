"""The ONNX graph against the PyTorch module, the graph PyTorch traces from it, and the rules of the format."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.engines.bundle import WeightsOrigin
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.module import ResNeXt

Weights = dict[str, NDArray[np.float32]]

# Summing in another order than PyTorch gives 1e-7 to 1e-6; an epsilon of 1e-4 in batch-norm gives 1e-3.
CLOSE = 1e-5

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "three stages": {},
    "one group": {"cardinality": 1, "base_width": 8, "image_size": 33},
    "wide groups": {"cardinality": 4, "base_width": 16, "channels": [16, 20, 24], "image_size": 50},
    "a group a channel": {"cardinality": 16, "base_width": 4, "channels": [16, 16, 16], "image_size": 64},
    "one stage, no stride": {"layers": [2], "channels": [32], "image_size": 47},
    "stem as wide as the first output": {"stem_width": 64, "num_classes": 1},
    "five stages": {"layers": [1, 1, 2, 1, 1], "channels": [16, 32, 32, 48, 64], "image_size": 75},
}


@pytest.fixture(params=ARCHITECTURES)
def card(request: pytest.FixtureRequest, make_card: Callable[..., ModelCard]) -> ModelCard:
    return make_card(**ARCHITECTURES[request.param])


def pictures(card: ModelCard, count: int) -> NDArray[np.uint8]:
    size = card.input.image_size
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)


def normalised(card: ModelCard, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As the card says it, a channel at a time, in float64."""
    planes = [
        (images[..., channel].astype(np.float64) / 255 - card.input.mean[channel]) / card.input.std[channel]
        for channel in range(3)
    ]
    return np.stack(planes, axis=1).astype(np.float32)


def module_of(card: ModelCard, weights: Weights) -> ResNeXt:
    module = ResNeXt(card)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    return module.eval()


def by_pytorch(card: ModelCard, weights: Weights, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return module_of(card, weights)(torch.from_numpy(normalised(card, images))).numpy()


def relative(actual: NDArray, expected: NDArray) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_module(
    batch: int,
    card: ModelCard,
    random_weights: Callable[..., Weights],
    run_onnx: Callable[..., NDArray[np.float32]],
) -> None:
    weights, images = random_weights(card), pictures(card, batch)
    expected = by_pytorch(card, weights, images)
    assert expected.shape == (batch, card.architecture.num_classes)
    assert relative(run_onnx(serialise(build_graph(card, weights)), images), expected) < CLOSE
    for_float = serialise(build_graph(card, weights, "float32"))
    assert relative(run_onnx(for_float, normalised(card, images)), expected) < CLOSE


@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter warns of itself
def test_equals_the_graph_that_pytorch_traces(
    make_card: Callable[..., ModelCard],
    random_weights: Callable[..., Weights],
    run_onnx: Callable[..., NDArray[np.float32]],
) -> None:
    card = make_card(layers=[1, 1], channels=[16, 32])
    weights, images = random_weights(card), pictures(card, 2)
    x = normalised(card, images)
    program = torch.onnx.export(module_of(card, weights), (torch.from_numpy(x),), dynamo=True, verbose=False)
    assert program is not None
    traced = run_onnx(program.model_proto.SerializeToString(), x)
    assert relative(run_onnx(serialise(build_graph(card, weights, "float32")), x), traced) < CLOSE
    assert relative(run_onnx(serialise(build_graph(card, weights)), images), traced) < CLOSE


@pytest.fixture
def small(make_card: Callable[..., ModelCard], random_weights: Callable[..., Weights]) -> tuple[ModelCard, Weights]:
    card = make_card(
        mean=[0.1, 0.5, 0.9],
        std=[0.2, 0.3, 0.6],
        figures={"flops": 12345},
    )
    return card, random_weights(card)


def test_normalises_every_byte_as_the_card_says(
    small: tuple[ModelCard, Weights], run_onnx: Callable[..., NDArray[np.float32]]
) -> None:
    card, weights = small
    model = onnx.load_from_string(serialise(build_graph(card, weights)))
    # Cut the graph off behind the normalisation.
    last = next(index for index, node in enumerate(model.graph.node) if "input" in node.output)
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, None))
    size = card.input.image_size
    images = np.zeros((1, size, size, 3), np.uint8)
    images.reshape(-1, 3)[:256] = np.arange(256)[:, None]  # every byte in every channel
    images.reshape(-1, 3)[256:512] = np.arange(256)[:, None] * [1, 0, 0] + [0, 7, 77]  # and channels that differ
    np.testing.assert_allclose(
        run_onnx(model.SerializeToString(), images), normalised(card, images), rtol=1e-6, atol=1e-6
    )


def test_any_batch_size_gives_each_image_its_own_logits(
    small: tuple[ModelCard, Weights], run_onnx: Callable[..., NDArray[np.float32]]
) -> None:
    card, weights = small
    model, images = serialise(build_graph(card, weights)), pictures(card, 5)
    alone = np.concatenate([run_onnx(model, images[i : i + 1]) for i in range(5)])
    for batch in (2, 5):
        np.testing.assert_allclose(run_onnx(model, images[:batch]), alone[:batch], rtol=1e-4, atol=1e-5)
    shape = onnx.load_from_string(model).graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, [dim.dim_value for dim in shape[1:]]) == ("batch", [48, 48, 3])


def test_says_which_card_and_weights_it_came_from(small: tuple[ModelCard, Weights]) -> None:
    card, weights = small
    origin = WeightsOrigin(kind="file", source="x.pth", sha256="0" * 64, licence="CC-BY-4.0")
    model = onnx.load_from_string(serialise(build_graph(card, weights, origin=origin)))
    said = {entry.key: entry.value for entry in model.metadata_props}
    module = ResNeXt(card)
    assert said.pop("rxdeploy.multiply_adds").isdigit()  # test_architecture.py says which number
    assert said == {
        "rxdeploy.model": "small",
        "rxdeploy.card_sha256": card.digest,
        "rxdeploy.parameters": str(sum(parameter.numel() for parameter in module.parameters())),
        "rxdeploy.card_flops": "12345",
        "rxdeploy.weights": "file: x.pth",
        "rxdeploy.weights_sha256": "0" * 64,
        "rxdeploy.weights_licence": "CC-BY-4.0",
    }
    assert model.producer_name == "rxdeploy"
    assert model.graph.name == "small"


def test_follows_the_format(card: ModelCard, random_weights: Callable[..., Weights]) -> None:
    model = onnx.load_from_string(serialise(build_graph(card, random_weights(card))))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    known = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        assert set(node.input) <= known, f"{node.name} is before what it needs"
        assert not known & set(node.output), f"{node.name} computes what is there"
        known |= set(node.output)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_sorts_what_a_pass_left_in_disorder(
    small: tuple[ModelCard, Weights], run_onnx: Callable[..., NDArray[np.float32]]
) -> None:
    card, weights = small
    model, images = build_graph(card, weights), pictures(card, 1)
    expected = run_onnx(serialise(model), images)
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    sorted_again = serialise(model)
    onnx.checker.check_model(sorted_again, full_check=True)
    np.testing.assert_array_equal(run_onnx(sorted_again, images), expected)


def test_keeps_the_names_of_the_checkpoint(card: ModelCard, random_weights: Callable[..., Weights]) -> None:
    model = onnx.load_from_string(serialise(build_graph(card, random_weights(card))))
    operators = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in operators
    modules = dict(ResNeXt(card).named_modules())
    made = {node.output[0]: node for node in model.graph.node}
    for name, module in modules.items():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert made[name].op_type == "Conv", name
        if type(module).__name__ == "Bottleneck":
            assert made[name].op_type == "Relu", name
    convolutions = {name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d)}
    assert {node.name for node in model.graph.node if node.op_type == "Conv"} == convolutions
    assert made["maxpool"].op_type == "MaxPool"
    stored = {tensor.name for tensor in model.graph.initializer}
    assert {f"{name}.weight" for name in [*convolutions, "fc"]} <= stored
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_input_of_float32_is_named_input(small: tuple[ModelCard, Weights]) -> None:
    model = onnx.load_from_string(serialise(build_graph(*small, "float32")))
    (value,) = model.graph.input
    assert (value.name, value.type.tensor_type.elem_type) == ("input", onnx.TensorProto.FLOAT)
    assert [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]] == [3, 48, 48]


BUILD = """
import hashlib, sys
import numpy as np
from pathlib import Path
from rxdeploy.cards import load_card
from rxdeploy.export.graph import build_graph, serialise
weights = dict(np.load(sys.argv[2]))
print(hashlib.sha256(serialise(build_graph(load_card(Path(sys.argv[1])), weights))).hexdigest())
"""


def test_same_input_same_bytes(small: tuple[ModelCard, Weights], tmp_path: Path) -> None:
    card, weights = small
    model = serialise(build_graph(card, weights))
    assert serialise(build_graph(card, weights)) == model
    backwards = dict(reversed(weights.items()))
    assert serialise(build_graph(card, backwards)) == model
    np.savez(tmp_path / "weights.npz", **weights)
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", BUILD, str(card.path), str(tmp_path / "weights.npz")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == hashlib.sha256(model).hexdigest()


def test_does_not_touch_the_weights_given(small: tuple[ModelCard, Weights]) -> None:
    card, weights = small
    before = {name: array.copy() for name, array in weights.items()}
    serialise(build_graph(card, weights))
    assert all(np.array_equal(weights[name], array) for name, array in before.items())


def test_trained_model_gives_pytorchs_logits(run_onnx: Callable[..., NDArray[np.float32]]) -> None:
    """With weights as training leaves them, not as we draw them."""
    from safetensors.numpy import load_file

    card = find_card("digits_resnext14_8x8d")
    assert card.weights.file is not None
    weights = load_file(card.beside(card.weights.file))
    images = pictures(card, 2)
    assert relative(run_onnx(serialise(build_graph(card, weights)), images), by_pytorch(card, weights, images)) < CLOSE
