"""Placement for ONNX Runtime's integer kernels: that they are used, and what they compute, against NumPy and float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from rxdeploy.bench import machine
from rxdeploy.calibration import cpu
from rxdeploy.calibration.cpu import place, weight_bits
from rxdeploy.calibration.ranges import Range
from rxdeploy.cards import ModelCard
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.graph import InputKind, build_graph, serialise

Weights = dict[str, NDArray[np.float32]]
Ranges = dict[str, Range]
LARGEST = 2 ** (weight_bits() - 1) - 1


@pytest.fixture
def model(card: ModelCard, weights: Weights) -> ir.Model:
    return build_graph(card, weights)


@pytest.fixture
def images(card: ModelCard) -> NDArray[np.uint8]:
    size = card.input.image_size
    return np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)


@pytest.fixture
def ranges(model: ir.Model, images: NDArray[np.uint8]) -> Ranges:
    return spans(model, images)


@pytest.fixture
def scales(model: ir.Model) -> Weights:
    return spread(model)


def spread(model: ir.Model, largest: int = LARGEST) -> Weights:
    """Each output channel's largest weight is `largest` units."""
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    return {
        name: (np.abs(array).reshape(len(array), -1).max(1) / largest).astype(np.float32)
        for name, array in arrays.items()
        if name.endswith(".weight")
    }


def run(model: bytes, feed: NDArray, names: list[str] | None = None, fuse: bool = True) -> list[NDArray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fuse else "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(names, {session.get_inputs()[0].name: feed})


def tapped(model: ir.Model, names: list[str], element: int) -> bytes:
    proto = onnx.load_from_string(serialise(model.clone()))
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, element, None) for name in names)
    return proto.SerializeToString()


def spans(model: ir.Model, feed: NDArray) -> Ranges:
    """The smallest and largest value of every tensor."""
    names = [node.outputs[0].name for node in model.graph if node.outputs[0].name != "logits"]
    found = dict(zip(names, run(tapped(model, names, onnx.TensorProto.FLOAT), feed, names), strict=True))
    if feed.dtype == np.float32:
        found["input"] = feed
    return {name: Range(float(array.min()), float(array.max())) for name, array in found.items()}


def fused(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime's optimiser makes of the model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4  # it warns that the file is for this machine
    onnxruntime.InferenceSession(serialise(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def relative(result: NDArray, reference: NDArray) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_every_layer_becomes_an_integer_kernel(
    kind: InputKind, card: ModelCard, weights: Weights, tmp_path: Path
) -> None:
    model = build_graph(card, weights, kind)
    before = Counter(node.op_type for node in model.graph)
    size = card.input.image_size
    feed = np.zeros((1, size, size, 3), np.uint8) if kind == "uint8" else np.zeros((1, 3, size, size), np.float32)
    after = fused(place(model, spans(model, feed), spread(model), LARGEST), tmp_path)
    assert after["QLinearConv"] == before["Conv"] == 1 + 3 * 4 + 3
    assert after["QLinearAdd"] == before["Add"] == 4
    assert after["QLinearGlobalAveragePool"] == after["QGemm"] == after["QuantizeLinear"] == 1
    left = {"Conv", "FusedConv", "Add", "Relu", "Gemm", "GlobalAveragePool", "MaxPool", "DequantizeLinear"}
    assert not left & set(after), after


def test_fused_model_agrees_with_its_float_arithmetic(
    model: ir.Model, images: NDArray[np.uint8], ranges: Ranges, scales: Weights, run_onnx: Callable[..., NDArray]
) -> None:
    """Tensor by tensor: they may differ where a value lies halfway between two integers."""
    placed = place(model, ranges, scales, LARGEST)
    names = [str(node.name) for node in placed.graph if node.op_type == "QuantizeLinear"]
    assert len(names) == 1 + 2 + 3 * 4 + 3 + 4 + 2  # input, stem; blocks' convolutions, shortcuts and sums; head
    data = tapped(placed, names, onnx.TensorProto.UINT8)
    integer, exact = (run(data, images, ["logits", *names], fuse) for fuse in (True, False))
    for name, got, expected in zip(names, integer[1:], exact[1:], strict=True):
        difference = np.abs(got.astype(int) - expected.astype(int))
        assert difference.max() <= 1 and difference.mean() < 0.01, name
        assert len(np.unique(expected)) > 40, f"{name}: not much of its range is used"
    float32 = run_onnx(serialise(model), images)
    assert not np.array_equal(integer[0], exact[0]), "the same kernels ran"
    assert relative(integer[0], exact[0]) < 1e-3
    # Uniform rounding to 8 bits at 16 layers: 2^-9 of the range each, a range being some 3 to 6 standard deviations.
    assert 1e-3 < relative(integer[0], float32) < 0.04


@pytest.mark.parametrize(("conv", "source", "relu"), [
    ("conv1", "input", True),
    ("layer2.0.conv2", "layer2.0.conv1.relu", True),  # grouped, stride 2
    ("layer2.0.downsample.0", "layer1.0", False),
])  # fmt: skip
def test_a_convolution_by_hand(
    conv: str, source: str, relu: bool, model: ir.Model, images: NDArray[np.uint8], ranges: Ranges, scales: Weights
) -> None:
    """Integers of the convolution's input to those of its output, from the ranges and the float32 model alone."""
    (node,) = (node for node in model.graph if node.name == conv)
    output = str(node.outputs[0].name)
    result = f"{conv}.relu" if relu else output
    result = "stem.relu" if conv == "conv1" else result
    names = [f"{source}.quantised", f"{result}.quantised"]
    x, got = run(tapped(place(model, ranges, scales, LARGEST), names, onnx.TensorProto.UINT8), images, names)

    sx, zx = units(ranges[source])
    sy, zy = units(Range(0, ranges[result].high) if relu else ranges[result])
    weight, bias = (node.inputs[i].const_value.numpy() for i in (1, 2))
    sw = scales[f"{conv}.weight"]
    w = np.rint(weight / sw[:, None, None, None])
    b = np.rint(bias.astype(np.float64) / (sx * sw.astype(np.float64)))
    assert np.abs(w).max() == LARGEST
    attributes = {name: node.attributes[name].as_ints()[0] for name in ("strides", "pads")}
    sums = torch.conv2d(
        torch.from_numpy(x.astype(np.float64) - zx),
        torch.from_numpy(w.astype(np.float64)),
        torch.from_numpy(b),
        attributes["strides"],
        attributes["pads"],
        groups=node.attributes["group"].as_int(),
    ).numpy()
    expected = np.clip(np.rint(sums * (sx * sw.astype(np.float64) / sy)[:, None, None]) + zy, 0, 255)
    difference = np.abs(got - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert (got.min() == 0 or not relu) and len(np.unique(got)) > 100


def units(span: Range) -> tuple[float, int]:
    """Scale and zero point of uint8 for a span that holds 0."""
    scale = (span.high - span.low) / 255
    return scale, round(-span.low / scale)


def test_no_product_saturates_on_this_machine(card: ModelCard, weights: Weights, images: NDArray[np.uint8]) -> None:
    """White images, and a stem of the largest weights of one sign: sums of two products beyond int16 for 8 bits."""
    weights["conv1.weight"] = np.full_like(weights["conv1.weight"], 0.5)
    weights |= {"bn1.weight": np.ones(16, np.float32), "bn1.running_mean": np.zeros(16, np.float32)}
    weights |= {"bn1.bias": np.zeros(16, np.float32), "bn1.running_var": np.full(16, 1 - 1e-5, np.float32)}
    model = build_graph(card, weights)
    white = np.full_like(images, 255)
    name = "stem.relu.quantised"
    data = tapped(place(model, spans(model, white), spread(model), LARGEST), [name], onnx.TensorProto.UINT8)
    integer, exact = (run(data, white, [name], fuse)[0] for fuse in (True, False))
    assert exact.max() == 255
    np.testing.assert_allclose(integer.astype(int), exact.astype(int), atol=1)


def test_seven_bits_for_an_x86_without_vnni(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def bits(flags: str, architecture: str = "x86_64") -> int:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : some\nflags : {flags}\n")
        monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(cpu.platform, "machine", lambda: architecture)
        return weight_bits()

    assert bits("fpu sse2 avx2") == 7
    assert bits("fpu avx2 avx512f avx512bw") == 7
    assert bits("fpu avx2 avx512f avx512_vnni") == 8
    assert bits("fpu avx2 avx_vnni") == 8
    assert bits("", "AMD64") == 7
    assert bits("", "aarch64") == 8


def test_seven_bit_weights_stay_below_saturation(model: ir.Model, ranges: Ranges) -> None:
    graph = place(model, ranges, spread(model, 63), 63).graph
    integers = [v.const_value.numpy() for k, v in graph.initializers.items() if k.endswith(".weight.quantised")]
    assert len(integers) == 17 and {array.dtype for array in integers} == {np.dtype(np.int8)}
    assert max(int(np.abs(array.astype(int)).max()) for array in integers) == 63
    assert 2 * 255 * 63 < 2**15


def test_units_of_every_tensor(model: ir.Model, ranges: Ranges, scales: Weights) -> None:
    """zero_point 0 behind a ReLU, 0 exactly an integer elsewhere; pools and flattening leave the units as they are."""
    moved = {"maxpool": Range(0, 1e-3), "features": Range(0, 1e-3)}  # of no account
    placed = place(model, ranges | moved, scales, LARGEST)
    constants = {k: v.const_value.numpy() for k, v in placed.graph.initializers.items()}
    rectified = {str(n.outputs[0].name) for n in model.graph if n.op_type == "Relu"}
    same_as = {"maxpool": "stem.relu", "features": "pool"}
    tensors = [str(n.inputs[0].name) for n in placed.graph if n.op_type == "QuantizeLinear"]
    assert rectified < set(tensors)
    for name in tensors:
        scale, zero = constants[f"{name}.quantised.scale"], constants[f"{name}.quantised.zero_point"]
        span = ranges[same_as.get(name, name)]
        assert (scale.dtype, zero.dtype, scale.shape, zero.shape) == (np.float32, np.uint8, (), ())
        low = min(0.0, span.low)
        assert scale == pytest.approx((span.high - low) / 255, rel=1e-6)
        assert zero == round(-low / float(scale))
        if name in rectified:
            assert zero == 0
    for layer, source in (("layer1.0.conv3", "layer1.0.conv2.relu"), ("fc", "features")):
        np.testing.assert_allclose(
            constants[f"{layer}.bias.quantised.scale"],
            constants[f"{source}.quantised.scale"] * scales[f"{layer}.weight"],
            rtol=1e-6,
        )
        assert constants[f"{layer}.bias.quantised"].dtype == np.int32


@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv1", "layer2.0.conv2", "layer1.0.conv3", "fc"])
def test_a_layer_kept_computes_in_float(
    layer: str, model: ir.Model, images: NDArray[np.uint8], ranges: Ranges, scales: Weights, tmp_path: Path
) -> None:
    """Its weights as they were, groups and all, and a float kernel: ONNX Runtime would quantise it by itself."""
    placed, full = (place(model, ranges, scales, LARGEST, keep=names) for names in ([layer], []))
    (before,), (after,) = ([n for n in m.graph if n.name == layer] for m in (model, placed))
    for old, new in zip(before.inputs[1:], after.inputs[1:], strict=True):
        np.testing.assert_array_equal(new.const_value.numpy(), old.const_value.numpy())  # type: ignore[union-attr]
    mixed, integer = fused(placed, tmp_path), fused(full, tmp_path)
    kernel = "QGemm" if layer == "fc" else "QLinearConv"
    assert mixed[kernel] == integer[kernel] - 1
    floats = {"Conv", "FusedConv", "Gemm", "FusedGemm"}
    assert sum(mixed[name] for name in floats) == 1 and not floats & set(integer)

    # Only its own rounding is gone, so that the two models differ, by less than quantisation does.
    reference, kept, rounded = (run(serialise(m), images)[0] for m in (model, placed, full))
    assert 0 < relative(kept, rounded) < 0.04 and relative(kept, reference) < 0.04


def test_a_head_and_sums_kept_compute_in_float(
    model: ir.Model, images: NDArray[np.uint8], ranges: Ranges, scales: Weights, tmp_path: Path
) -> None:
    sums = [str(node.name) for node in model.graph if node.op_type == "Add"]
    placed = place(model, ranges, scales, LARGEST, keep=[*sums, "pool", "fc"])
    kernels = fused(placed, tmp_path)
    assert kernels["GlobalAveragePool"] == kernels["Flatten"] == 1 and "QGemm" not in kernels
    assert kernels["QLinearAdd"] < len(sums)
    assert not {"pool.quantised", "features.quantised"} & {node.name for node in placed.graph}
    assert relative(run(serialise(placed), images)[0], run(serialise(model), images)[0]) < 0.04


def test_everything_kept_is_the_float_model(
    model: ir.Model, images: NDArray[np.uint8], run_onnx: Callable[..., NDArray]
) -> None:
    placed = place(model, {}, {}, LARGEST, keep=[str(node.name) for node in model.graph])
    np.testing.assert_array_equal(run_onnx(serialise(placed), images), run_onnx(serialise(model), images))


def test_a_float_neighbour_reads_the_exact_tensor(model: ir.Model, ranges: Ranges, scales: Weights) -> None:
    """layer2.0's first convolution and shortcut share a tensor; where its producer is float, only one is rounded."""
    graph = place(model, ranges, scales, LARGEST, keep=["layer1.0.add", "layer2.0.conv1"]).graph
    nodes = {node.name: node for node in graph}
    assert nodes["layer2.0.conv1"].inputs[0].name == "layer1.0"  # type: ignore[union-attr]
    assert nodes["layer2.0.downsample.0"].inputs[0].name == "layer1.0.dequantised"  # type: ignore[union-attr]


def test_leaves_the_model_given_and_gives_the_same_bytes_again(
    model: ir.Model, ranges: Ranges, scales: Weights
) -> None:
    before = serialise(model)
    first, second = (serialise(place(model, ranges, scales, LARGEST)) for _ in range(2))
    assert first == second and serialise(model) == before
    assert dict(ir.from_proto(onnx.load_from_string(first)).metadata_props) == dict(model.metadata_props)


def test_a_channel_of_nothing_but_its_bias(
    card: ModelCard, weights: Weights, images: NDArray[np.uint8], run_onnx: Callable[..., NDArray]
) -> None:
    """Its scale would take the bias beyond int32."""
    weights["layer1.0.bn1.weight"][5] = 1e-9
    weights["layer1.0.bn1.bias"][5] = 3.0
    model = build_graph(card, weights)
    placed = place(model, spans(model, images), spread(model), LARGEST)
    integers = placed.graph.initializers["layer1.0.conv1.bias.quantised"].const_value.numpy()  # type: ignore[union-attr]
    assert 2**29 < integers[5] <= 2**30 + 2**8
    assert relative(run_onnx(serialise(placed), images), run_onnx(serialise(model), images)) < 0.04


def test_a_dead_layer_stays_finite(card: ModelCard, weights: Weights, images: NDArray[np.uint8]) -> None:
    """A ReLU that gives zeros only, and weights that are zeros."""
    weights["layer1.0.bn2.bias"][:] = -1e4
    weights["layer2.1.bn3.weight"][:] = 0
    model = build_graph(card, weights)
    ranges = spans(model, images)
    assert ranges["layer1.0.conv2.relu"] == Range(0, 0)
    scales = {name: np.maximum(scale, np.float32(2**-20)) for name, scale in spread(model).items()}
    (logits,) = run(serialise(place(model, ranges, scales, LARGEST)), images)
    assert relative(logits, run(serialise(model), images)[0]) < 0.04


@pytest.mark.parametrize("span", [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_names_the_tensor_of_an_impossible_range(
    span: tuple[float, float], model: ir.Model, ranges: Ranges, scales: Weights
) -> None:
    with pytest.raises(CheckFailed, match=r"tensor layer2.0.bn3: its range is"):
        place(model, ranges | {"layer2.0.bn3": Range(*span)}, scales, LARGEST)


def test_names_what_is_missing(model: ir.Model, ranges: Ranges, scales: Weights) -> None:
    def without(table: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: value for key, value in table.items() if key != name}

    with pytest.raises(InputError, match=r"no range of the tensor layer1.0.bn3"):
        place(model, without(ranges, "layer1.0.bn3"), scales, LARGEST)
    with pytest.raises(InputError, match=r"no scales of the weight fc.weight"):
        place(model, ranges, without(scales, "fc.weight"), LARGEST)
    with pytest.raises(InputError, match=r"no layer layer9.0.conv1"):
        place(model, ranges, scales, LARGEST, keep=["fc", "layer9.0.conv1"])


@pytest.mark.parametrize("wrong", [np.ones(3, np.float32), np.zeros(7, np.float32), np.full(7, np.nan, np.float32)])
def test_refuses_impossible_scales(
    wrong: NDArray[np.float32], model: ir.Model, ranges: Ranges, scales: Weights
) -> None:
    with pytest.raises(CheckFailed, match=r"weight fc.weight: needs 7 scales"):
        place(model, ranges, scales | {"fc.weight": wrong}, LARGEST)
