"""The network that calibration runs, against ONNX Runtime on the exported graph, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from rxdeploy.calibration.equalise import equalised, factors, pairs
from rxdeploy.calibration.network import FC, LOGITS, Network, Steps
from rxdeploy.cards import ModelCard
from rxdeploy.export.graph import build_graph, serialise

Weights = dict[str, NDArray[np.float32]]


class Watch(Steps):
    def __init__(self) -> None:
        self.seen: dict[str, NDArray] = {}
        self.read: list[tuple[str, str]] = []

    def tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.seen[name] = value.numpy().copy()
        return value

    def taken(self, name: str, value: torch.Tensor, layer: str) -> torch.Tensor:
        self.read.append((layer, name))
        return value


def images(card: ModelCard, count: int = 3) -> NDArray[np.uint8]:
    size = card.input.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def every_tensor(card: ModelCard, weights: Weights, batch: NDArray[np.uint8]) -> dict[str, NDArray]:
    model = onnx.load_from_string(serialise(build_graph(card, weights)))
    names = [output for node in model.graph.node for output in node.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != LOGITS)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": batch}), strict=True))


def test_every_tensor_is_the_exported_graphs(card: ModelCard, weights: Weights) -> None:
    watch, batch = Watch(), images(card)
    logits = Network(card, weights).run(batch, watch)
    expected = every_tensor(card, weights, batch)
    assert {"input", "stem.relu", "maxpool", "layer2.1.conv2.relu", "layer3.0", "pool", "logits"} <= set(watch.seen)
    for name, value in watch.seen.items():
        wanted = expected[name].reshape(value.shape)
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
    np.testing.assert_array_equal(logits, watch.seen[LOGITS])


def test_who_reads_what_is_as_in_the_exported_graph(card: ModelCard, weights: Weights) -> None:
    network, watch = Network(card, weights), Watch()
    network.run(images(card, 1), watch)
    assert sorted(network.inputs().items()) == sorted(watch.read)
    reads = {
        node.name: (node.inputs[0] or node).name for node in build_graph(card, weights).graph if node.op_type == "Conv"
    }
    assert {layer: name for layer, name in watch.read if layer in reads} == reads


@pytest.mark.parametrize("block", [-1, 0, 2, 4])
def test_a_run_may_begin_at_any_block(card: ModelCard, weights: Weights, block: int) -> None:
    network, batch = Network(card, weights), images(card)
    assert len(network.shape.blocks) == 4
    found = network.after(network.upto(batch, Steps(), block), Steps(), block)
    np.testing.assert_array_equal(found, network.run(batch, Steps()))
    assert set(network.block_of()) == set(network.inputs())
    assert network.block_of()[FC] == 4


def test_equalisation_changes_nothing_but_the_ranges(card: ModelCard, weights: Weights) -> None:
    network, watch, batch = Network(card, weights), Watch(), images(card, 4)
    exact = network.run(batch, watch)
    maxima = {name: value.max((0, 2, 3)) for name, value in watch.seen.items() if value.ndim == 4}
    found = factors(network, maxima)
    assert set(found) == {first.name for first, _ in pairs(network)}
    after = Watch()
    after.parameters = lambda layer, own: equalised(network, found)[layer]  # type: ignore[method-assign]
    np.testing.assert_allclose(network.run(batch, after), exact, rtol=1e-3, atol=1e-4)
    for name, factor in found.items():
        before, now = watch.seen[f"{name}.relu"], after.seen[f"{name}.relu"]
        divided = before / np.asarray(factor, np.float32)[:, None, None]
        np.testing.assert_allclose(now, divided, rtol=1e-3, atol=1e-4 * np.abs(divided).max())
        alive = before.max((0, 2, 3)) > 0
        spread = [np.log(each.max((0, 2, 3))[alive]).std() for each in (before, now)]
        assert spread[1] < spread[0]


def test_equalisation_of_a_dead_channel(card: ModelCard, weights: Weights) -> None:
    """Divided by nothing it would be NaN."""
    weights = weights | {"layer1.0.bn1.weight": np.zeros_like(weights["layer1.0.bn1.weight"])}
    weights["layer1.0.bn1.bias"] = np.full_like(weights["layer1.0.bn1.bias"], -1)
    network, watch = Network(card, weights), Watch()
    exact = network.run(images(card), watch)
    maxima = {name: value.max((0, 2, 3)) for name, value in watch.seen.items() if value.ndim == 4}
    assert not maxima["layer1.0.conv1.relu"].any()
    steps = Steps()
    steps.parameters = lambda layer, own: equalised(network, factors(network, maxima))[layer]  # type: ignore[method-assign]
    np.testing.assert_allclose(network.run(images(card), steps), exact, rtol=1e-3, atol=1e-4)


def test_the_normalised_input(card: ModelCard, weights: Weights, run_onnx: Callable[..., NDArray]) -> None:
    """Of a model that is exported for float32 input, calibration sees the same."""
    network, batch = Network(card, weights), images(card)
    model = ir.to_proto(build_graph(card, weights, "float32")).SerializeToString()
    expected = run_onnx(model, network.normalised(batch).contiguous().numpy())
    np.testing.assert_allclose(network.run(batch, Steps()), expected, rtol=1e-3, atol=1e-4)
