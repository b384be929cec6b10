"""Where a float16 model ends: every tensor's largest magnitude, against NumPy on the float32 model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from rxdeploy.cards import ModelCard
from rxdeploy.export.float16 import to_float16
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.headroom import describe, headroom
from rxdeploy.export.reference import run_reference
from rxdeploy.export.validate import LIMITS, validate_model, validation_samples, within
from rxdeploy.runtime.onnxrt import open_session, run_session

Weights = dict[str, Any]
END = 65504.0


@pytest.fixture
def card(make_card: Callable[..., ModelCard]) -> ModelCard:
    return make_card()


@pytest.fixture
def weights(card: ModelCard, random_weights: Callable[..., Weights]) -> Weights:
    return random_weights(card)


def validated(card: ModelCard, weights: Weights, path: Path) -> dict[str, Any]:
    path.write_bytes(serialise(to_float16(build_graph(card, weights))[0]))
    reference = run_reference(card, weights, validation_samples(card).images)
    return validate_model(card, path, "fp16", reference, (1,))


def magnitudes(card: ModelCard, weights: Weights) -> dict[str, float]:
    """Of every tensor of the float32 model."""
    model = build_graph(card, weights)
    model.graph.outputs.extend(value for node in model.graph for value in node.outputs if value.name != "logits")
    names = [value.name for value in model.graph.outputs]
    session = open_session(ir.to_proto(model).SerializeToString())
    arrays = run_session(session, names, {"image": validation_samples(card).images})
    floats = {name: array for name, array in zip(names, arrays, strict=True) if array.dtype == np.float32}
    return {name: float(np.abs(array).max()) for name, array in floats.items()}


def grow(weights: Weights, layer: str, behind: str, factor: float) -> None:
    """The same network, but for a tensor that is `factor` times as large."""
    for part in ("weight", "bias"):
        weights[f"{layer}.{part}"] *= np.float32(factor)
    weights[f"{behind}.running_mean"] *= np.float32(factor)
    weights[f"{behind}.running_var"] *= np.float32(factor**2)


def test_the_largest_magnitudes_and_how_far_they_are_from_the_end(
    card: ModelCard, weights: Weights, tmp_path: Path
) -> None:
    grow(weights, "layer2.1.bn1", "layer2.1.bn2", 500)
    expected = sorted(magnitudes(card, weights).items(), key=lambda item: -item[1])
    facts = validated(card, weights, tmp_path / "model.onnx")
    assert facts["passed"] is True
    found = facts["float16"]
    # float16 rounds to 2^-11, which adds up.
    np.testing.assert_allclose(
        [each["largest"] for each in found["nearest"]], [value for _, value in expected[:5]], rtol=0.02
    )
    assert found["nearest"][0]["tensor"] in [name for name, _ in expected[:2]]  # ReLU may leave the largest as it is
    assert found["headroom"] == pytest.approx(END / expected[0][1], rel=0.02)
    assert found["overflowed"] == []
    assert found["tensors"] >= len(expected)


def test_an_overflow_that_the_logits_do_not_show_fails(card: ModelCard, weights: Weights, tmp_path: Path) -> None:
    """Minus infinity before a ReLU, which makes zero of it: every logit is right."""
    weights["layer2.1.conv1.weight"][0] = np.abs(weights["layer2.1.conv1.weight"][0])  # of inputs that are not negative
    for part, value in {"weight": -3e4, "bias": -6e4, "running_mean": 0, "running_var": 1}.items():
        weights[f"layer2.1.bn1.{part}"][0] = value
    facts = validated(card, weights, tmp_path / "model.onnx")
    assert all(within(figures["all"], LIMITS["fp16"]) for figures in facts["providers"].values())
    assert [each["tensor"] for each in facts["float16"]["overflowed"]] == ["layer2.1.bn1"]
    assert facts["passed"] is False


def test_the_first_that_overflows_is_exact_and_named(card: ModelCard, weights: Weights, tmp_path: Path) -> None:
    grow(weights, "layer2.1.bn1", "layer2.1.bn2", 5e4)
    expected = magnitudes(card, weights)
    facts = validated(card, weights, tmp_path / "model.onnx")
    assert facts["passed"] is False
    first = facts["float16"]["overflowed"][0]
    assert first["tensor"] == "layer2.1.bn1"
    assert first["largest"] == pytest.approx(expected["layer2.1.bn1"], rel=0.02)
    assert describe(facts["float16"]).startswith("layer2.1.bn1 overflows: it reaches ")


def test_a_float32_model_has_no_such_figures(card: ModelCard, weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(serialise(build_graph(card, weights)))
    reference = run_reference(card, weights, validation_samples(card).images)
    assert "float16" not in validate_model(card, tmp_path / "model.onnx", "fp32", reference, (1,))


def figures(**values: float) -> dict[str, Any]:
    return headroom({name: np.float32(value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("value", "overflows"),
    [(65504, False), (65519.99, False), (65520, True), (float("inf"), True), (float("nan"), True)],
)
def test_the_end_is_where_rounding_gives_infinity(value: float, overflows: bool) -> None:
    with np.errstate(over="ignore"):
        assert bool(np.isfinite(np.float16(np.float32(value)))) is not overflows
    assert bool(figures(a=1, b=value)["overflowed"]) is overflows


def test_figures_by_hand() -> None:
    found = figures(a=2, b=655.04, c=0, d=1, e=3, f=4, g=5)
    assert found["headroom"] == pytest.approx(100)
    assert [each["tensor"] for each in found["nearest"]] == ["b", "g", "f", "e", "a"]
    assert (found["tensors"], found["overflowed"], found["limit"]) == (7, [], END)
    assert describe(found) == "float16 ends 100 times beyond the largest magnitude, 655 in b"
    found = figures(a=1, b=float("nan"), c=1e9)
    assert [each["tensor"] for each in found["overflowed"]] == ["b", "c"]
    assert found["overflowed"][0]["largest"] is None
    assert describe(found) == "b overflows: it reaches what is no number, float16 ends at 65504"
    assert figures(a=0)["headroom"] is None
    assert describe(figures(a=0)) == "every tensor is zero"
