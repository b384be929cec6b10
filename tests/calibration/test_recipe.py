"""What the simulated network computes, against ONNX Runtime on the Q/DQ graph, and where the Q/DQ nodes are."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from rxdeploy.calibration import apply as applying
from rxdeploy.calibration import weights as to_int8
from rxdeploy.calibration.apply import apply
from rxdeploy.calibration.choose import all_ranges
from rxdeploy.calibration.correct import corrections
from rxdeploy.calibration.equalise import factors
from rxdeploy.calibration.gather import Gathered, gather
from rxdeploy.calibration.network import Network, Steps
from rxdeploy.calibration.ranges import Range
from rxdeploy.calibration.recipe import Quantised, Recipe, logits, ranges_as_data, tensors, units
from rxdeploy.datasets import Stream, from_arrays
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.precisions import layer_precisions
from rxdeploy.export.validate import relative_l2
from rxdeploy.runtime.onnxrt import open_session


@pytest.fixture(scope="module")
def network(digits: Any) -> Network:
    return Network(digits.card, digits.weights)


@pytest.fixture(scope="module")
def found(digits: Any, network: Network) -> Gathered:
    data = from_arrays(digits.train, None)
    return gather(network, Stream(data, data.items, 8, digits.card.input))


@pytest.fixture(scope="module")
def recipe(network: Network, found: Gathered) -> Callable[..., Recipe]:
    def make(scheme: Any = "tensorrt", **changes: Any) -> Recipe:
        ranges = all_ranges(found.histograms, scheme == "tensorrt")["mse"]
        used = ranges_as_data({name: ranges[name] for name in tensors(network, scheme)})
        return Recipe(**{"scheme": scheme, "method": "mse", "ranges": used, **changes})

    return make


def run(model: ir.Model, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """On ONNX Runtime, rounding at the Q/DQ nodes and computing in float between them."""
    return open_session(serialise(model), integers=False).run(None, {"image": images})[0]


KEPT = {"tensorrt": ("layer2.0.conv2", "layer3.0", "conv1"), "onnxruntime": ("layer2.0.conv2", "fc", "conv1")}


@pytest.mark.parametrize("scheme", ["tensorrt", "onnxruntime"])
def test_the_simulation_is_the_graph(
    digits: Any, network: Network, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Before float16; a sum in another order moves a value across a rounding border now and then."""
    # On a CPU every tensor is rounded, and each border that is crossed makes others be crossed behind it.
    limit = {"tensorrt": 2e-3, "onnxruntime": 7e-3}[scheme]
    monkeypatch.setattr(applying, "to_float16", lambda model: (model, None))
    graph, exact = build_graph(digits.card, digits.weights), logits(network, Steps(), digits.held_out)
    bias = corrections(network, recipe(scheme), digits.train[:8])
    for changes in ({}, {"keep": KEPT[scheme]}, {"weight_scales": "mse"}, {"keep": KEPT[scheme], "bias": bias}):
        tried = recipe(scheme, **changes)
        simulated = logits(network, Quantised(network, tried), digits.held_out)
        model, _ = apply(graph, network, tried)
        result = run(model, digits.held_out)
        assert relative_l2(result, simulated) < limit
        assert relative_l2(result, exact) == pytest.approx(relative_l2(simulated, exact), rel=0.15)
        assert relative_l2(simulated, exact) > 4e-3  # it is quantised


def test_equalisation_and_bias_correction_reach_the_graph(
    digits: Any,
    network: Network,
    found: Gathered,
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(applying, "to_float16", lambda model: (model, None))
    tried = recipe(equalisation=factors(network, found.maxima))
    tried = msgspec.structs.replace(tried, bias=corrections(network, tried, digits.train[:16]))
    assert len(tried.bias) == 17
    model, _ = apply(build_graph(digits.card, digits.weights), network, tried)
    simulated = logits(network, Quantised(network, tried), digits.held_out)
    assert relative_l2(run(model, digits.held_out), simulated) < 2e-3


def test_bias_correction_corrects_means(digits: Any, network: Network, recipe: Callable[..., Recipe]) -> None:
    """With weights of three bits there is something to correct."""

    class Means(Quantised):
        means: dict[str, NDArray]

        def output(self, layer: str, value: Any) -> Any:
            self.means[layer] = value.mean((0, 2, 3)).numpy()
            return value

    class Exact(Means):
        def __init__(self) -> None: ...

        def taken(self, name: str, value: Any, layer: str) -> Any:
            return value

        def tensor(self, name: str, value: Any) -> Any:
            return value

        def parameters(self, layer: str, own: Any) -> Any:
            return own

    plain = recipe(weight_bits=3)
    fixed = msgspec.structs.replace(plain, bias=corrections(network, plain, digits.train[:16]))
    exact = Exact()
    exact.means = {}
    network.run(digits.train[:16], exact)
    off = []
    for tried in (plain, fixed):
        steps = Means(network, tried)
        steps.means = {}
        network.run(digits.train[:16], steps)
        off.append(max(np.abs(steps.means[layer] - exact.means[layer]).max() for layer in exact.means))
    assert off[1] < 0.01 * off[0]


def test_units() -> None:
    signed = units(Range(-2.54, 1.0), symmetric=True)
    assert (signed.zero_point, signed.least, signed.most) == (0, -128, 127)
    assert signed.scale == float(np.float16(2.54 / 127))
    unsigned = units(Range(-1.0, 3.0), symmetric=False)
    assert (unsigned.scale, unsigned.zero_point) == (pytest.approx(4 / 255), 64)
    assert units(Range(0, 5.1), symmetric=False).zero_point == 0
    for symmetric in (True, False):
        assert units(Range(0, 0), symmetric).scale > 0


# Placement for TensorRT


def test_every_convolution_takes_integers_and_nothing_is_float32(
    digits: Any, network: Network, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model, rounding = apply(build_graph(digits.card, digits.weights), network, recipe())
    assert rounding is not None and rounding.constants
    path = tmp_path / "model.onnx"
    path.write_bytes(serialise(model))
    layers = {layer.name: layer for layer in layer_precisions(path)}
    convolutions = [layer for layer in layers.values() if layer.op == "Conv"]
    assert len(convolutions) == 17
    for layer in convolutions:
        assert (layer.inputs, layer.weights) == (("int8",), "int8")
    for layer in layers.values():
        assert "float32" not in (*layer.inputs, layer.weights, layer.output)
    assert layers["layer1.0.add"].inputs == ("float16", "int8")
    assert layers["fc"].inputs == ("float16",)


def test_a_tensor_is_quantised_once_and_only_what_is_read(
    digits: Any, network: Network, recipe: Callable[..., Recipe]
) -> None:
    model, _ = apply(build_graph(digits.card, digits.weights), network, recipe())
    proto = onnx.load_from_string(serialise(model))
    quantised = Counter(node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear")
    wanted = {tensor for layer, tensor in network.inputs().items() if layer != "fc"}
    assert set(quantised) == wanted and set(quantised.values()) == {1}
    # Between a convolution and the addition there is nothing, so that TensorRT makes one kernel of them.
    adds = {node.name: list(node.input) for node in proto.graph.node if node.op_type == "Add"}
    assert adds["layer2.0.add"] == ["layer2.0.bn3", "layer2.0.downsample.1.dequantised"]
    values = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[1]].dtype == np.float16
            assert len(node.input) < 3 or not values[node.input[2]].any()
    biases = [values[node.input[2]] for node in proto.graph.node if node.op_type == "Conv"]
    assert {bias.dtype for bias in biases} == {np.dtype(np.float16)}


def test_layers_that_are_kept(digits: Any, network: Network, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    keep = ("layer2.0.conv2", "layer3.0")
    model, _ = apply(build_graph(digits.card, digits.weights), network, recipe(keep=keep))
    path = tmp_path / "model.onnx"
    path.write_bytes(serialise(model))
    layers = {layer.name: layer for layer in layer_precisions(path)}
    assert layers["layer2.0.conv2"].inputs == ("float16",)
    assert layers["layer3.0.add"].inputs == ("float16", "float16")
    assert layers["layer2.0.add"].inputs == ("float16", "int8")
    for scheme in ("tensorrt", "onnxruntime"):
        with pytest.raises(InputError, match=r"the model has no layer layer9\.0"):
            apply(build_graph(digits.card, digits.weights), network, recipe(scheme, keep=("layer9.0",)))


def test_ranges_that_are_missing(digits: Any, network: Network, recipe: Callable[..., Recipe]) -> None:
    for scheme in ("tensorrt", "onnxruntime"):
        whole = recipe(scheme)
        part = {name: ends for name, ends in whole.ranges.items() if name != "layer2.0"}
        with pytest.raises((InputError, CheckFailed), match=r"has no range of the tensor layer2\.0"):
            apply(build_graph(digits.card, digits.weights), network, msgspec.structs.replace(whole, ranges=part))


def test_the_graph_that_is_given_stays_as_it_is(digits: Any, network: Network, recipe: Callable[..., Recipe]) -> None:
    graph = build_graph(digits.card, digits.weights)
    before = serialise(graph.clone())
    for scheme in ("tensorrt", "onnxruntime"):
        apply(graph, network, recipe(scheme))
    assert serialise(graph) == before


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_tensorrt_rtx_builds_it(digits: Any, network: Network, recipe: Callable[..., Recipe]) -> None:
    from rxdeploy.engines.builder import build_plan
    from rxdeploy.engines.flavours import TENSORRT_RTX
    from rxdeploy.engines.options import EngineOptions

    for keep in ((), ("layer1.0.conv2", "layer3.0")):
        model, _ = apply(build_graph(digits.card, digits.weights), network, recipe(keep=keep))
        assert build_plan(serialise(model), TENSORRT_RTX, EngineOptions()).data


# Accuracy


@pytest.mark.parametrize("scheme", ["tensorrt", "onnxruntime"])
def test_a_trained_model_keeps_its_answers(
    digits: Any, network: Network, recipe: Callable[..., Recipe], scheme: str
) -> None:
    model, _ = apply(build_graph(digits.card, digits.weights), network, recipe(scheme))
    exact, result = logits(network, Steps(), digits.held_out), run(model, digits.held_out)
    assert relative_l2(result, exact) < 0.02
    np.testing.assert_array_equal(result.argmax(1), exact.argmax(1))


def test_an_onnx_runtime_that_truncates_is_corrected(
    digits: Any, network: Network, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it truncates indeed (before 1.30), the test above tells. Where it rounds, the correction does no harm."""
    model, _ = apply(build_graph(digits.card, digits.weights), network, recipe())
    exact, right = logits(network, Steps(), digits.held_out), run(model, digits.held_out)
    given: list[bytes] = []
    create = onnxruntime.InferenceSession

    def listed(source: bytes, *rest: Any, **named: Any) -> Any:
        given.append(source)
        return create(source, *rest, **named)

    monkeypatch.setattr(onnxruntime, "__version__", "1.29.1")
    monkeypatch.setattr(onnxruntime, "InferenceSession", listed)
    corrected = run(model, digits.held_out)
    # A cast to float32 meets the one that ONNX Runtime puts there itself, and with both goes a rounding to float16.
    assert relative_l2(corrected, right) < 0.02
    assert relative_l2(corrected, exact) == pytest.approx(relative_l2(right, exact), rel=0.15)
    proto = onnx.load_from_string(given[0])
    onnx.checker.check_model(proto)
    counts = Counter(node.op_type for node in proto.graph.node)
    assert counts["Round"] == counts["Clip"] > 15
    assert not counts["QuantizeLinear"]
    with pytest.raises(CheckFailed, match="cannot load"):
        open_session(b"no model", integers=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EnvironmentLacks, match=r"1\.29\.1 truncates .* pip install onnx"):
        open_session(serialise(model), integers=False)


def test_wrong_scales_are_seen(
    digits: Any, network: Network, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that calibration judges by rises with each of the usual mistakes."""
    exact = logits(network, Steps(), digits.held_out)

    def error(tried: Recipe) -> float:
        return relative_l2(logits(network, Quantised(network, tried), digits.held_out), exact)

    right = recipe()
    before = error(right)
    assert before < 0.015
    for factor in (0.25, 4):
        scaled = {name: (low * factor, high * factor) for name, (low, high) in right.ranges.items()}
        assert error(msgspec.structs.replace(right, ranges=scaled)) > 3 * before
    ranked = sorted(right.ranges, key=lambda name: right.ranges[name][1])
    swapped = right.ranges | {ranked[0]: right.ranges[ranked[-1]], ranked[-1]: right.ranges[ranked[0]]}
    assert error(msgspec.structs.replace(right, ranges=swapped)) > 2 * before
    real = to_int8.scales
    monkeypatch.setattr(to_int8, "scales", lambda *arguments: np.full_like(s := real(*arguments), s.max()))
    assert error(msgspec.structs.replace(right)) > 1.2 * before
