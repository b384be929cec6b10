"""Merged groups compute the same; PyTorch's grouped convolution says what that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from rxdeploy.bench.counts import count
from rxdeploy.calibration.groups import merge_groups
from rxdeploy.cards import ModelCard
from rxdeploy.export.graph import build_graph, serialise


def grouped(weight: NDArray[np.float32], groups: int) -> ir.Model:
    channels = weight.shape[1] * groups
    return ir.from_proto(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv", group=groups, pads=[1] * 4)],
                "grouped",
                [onnx.helper.make_tensor_value_info("x", 1, ["n", channels, 5, 5])],
                [onnx.helper.make_tensor_value_info("y", 1, ["n", len(weight), 5, 5])],
                [onnx.numpy_helper.from_array(weight, "w")],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 21)],
            ir_version=10,
        )
    )


@pytest.mark.parametrize(
    ("out", "width", "groups", "channels", "left"),
    [
        (32, 4, 8, 32, 1),
        (64, 4, 16, 32, 2),
        (24, 4, 6, 16, 2),  # four of 4 would fit, but only three divide six
        (20, 8, 5, 32, 5),
        (64, 32, 2, 32, 2),
        (64, 48, 2, 32, 2),
        (16, 1, 16, 32, 16),  # depthwise
        (12, 4, 1, 32, 1),
    ],
)
def test_merged_groups_compute_what_pytorch_computes(
    out: int, width: int, groups: int, channels: int, left: int, run_onnx: Callable[..., NDArray]
) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(out, width, 3, 3)).astype(np.float32)
    x = random.normal(size=(2, width * groups, 5, 5)).astype(np.float32)
    model = merge_groups(grouped(weight, groups), channels)
    (node,) = model.graph
    assert node.attributes["group"].as_int() == left
    assert node.inputs[1].shape == (out, width * groups // left, 3, 3)  # type: ignore[union-attr]
    expected = torch.conv2d(torch.from_numpy(x), torch.from_numpy(weight), padding=1, groups=groups).numpy()
    np.testing.assert_allclose(run_onnx(ir.to_proto(model).SerializeToString(), x), expected, atol=1e-5)


def test_leaves_the_model_given_and_the_layers_named(card: ModelCard, weights: dict[str, NDArray[np.float32]]) -> None:
    model = build_graph(card, weights)
    before = serialise(model)
    merged = merge_groups(model, keep=["layer2.0.conv2"])
    assert serialise(model) == before != serialise(merged)
    groups = {n.name: n.attributes["group"].as_int() for n in merged.graph if n.op_type == "Conv"}
    assert groups["layer2.0.conv2"] == 4 and groups["layer1.0.conv2"] == 1  # 4 groups of 8 channels


def test_multiply_adds_are_counted_without_the_zeros(card: ModelCard, weights: dict, tmp_path: Path) -> None:
    model = build_graph(card, weights)
    paths = [tmp_path / name for name in ("apart.onnx", "merged.onnx")]
    for path, each in zip(paths, (model, merge_groups(model, 64)), strict=True):
        path.write_bytes(serialise(each))
    apart, merged = (count(path) for path in paths)
    assert paths[1].stat().st_size > paths[0].stat().st_size
    assert (merged.multiply_adds, merged.by_kind()) == (apart.multiply_adds, apart.by_kind())
