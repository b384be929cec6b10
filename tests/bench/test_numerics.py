"""NaN, infinity and denormal numbers in a model are found where they were put, and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxdeploy.bench import facts, report
from rxdeploy.bench.benchmark import benchmark
from rxdeploy.bench.numerics import Numerics, examine, try_examine
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, open_bundle

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Bundles = Callable[..., Path]


def altered(source: Path, destination: Path, change: Callable[[Any], None]) -> Bundle:
    """A copy of the bundle with another model in it."""
    model = onnx.load(source / bundles.MODEL)
    change(model)
    manifest = open_bundle(source).manifest
    files: dict[str, Path | bytes] = {bundles.MODEL: model.SerializeToString()}
    return bundles.write_bundle(destination, manifest, files, overwrite=False)


def initializer(model: Any, node: str, place: int) -> tuple[Any, np.ndarray]:
    """A constant of a convolution, for writing, and its values."""
    found = next(each for each in model.graph.node if each.name == node or each.output[0] == node)
    tensor = next(each for each in model.graph.initializer if each.name == found.input[place])
    return tensor, onnx.numpy_helper.to_array(tensor).copy()


def first_convolution(model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == "Conv")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("input_kind", ["uint8", "float32"])
def test_an_ordinary_model_has_none(bundle: Bundles, precision: str, input_kind: str) -> None:
    found = examine(open_bundle(bundle(precision, input_kind)))
    assert found.tensors > 20
    assert (found.not_finite, found.denormal, found.denormal_constants) == ((), {}, {})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named_from_the_first(bundle: Bundles, tmp_path: Path, value: float) -> None:
    names = []

    def change(model: Any) -> None:
        node = first_convolution(model)
        tensor, array = initializer(model, node.output[0], 2)
        array[0] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        names.append(node.output[0])

    found = examine(altered(bundle(), tmp_path / "altered", change))
    assert found.not_finite[0] == names[0]


def test_denormal_numbers_are_counted(bundle: Bundles, tmp_path: Path) -> None:
    names = []

    def change(model: Any) -> None:
        node = first_convolution(model)
        for place in (1, 2):
            tensor, array = initializer(model, node.output[0], place)
            array[:2] = 0  # two of the channels
            array.reshape(len(array), -1)[:2, 0] = 1e-42 if place == 1 else 1e-40
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            names.append((tensor.name, 2 / array.size))
        names.append((node.output[0], 2 / len(array)))

    found = examine(altered(bundle(), tmp_path / "altered", change))
    assert found.not_finite == ()
    assert found.denormal_constants == pytest.approx(dict(names[:2]))
    output, share = names[2]
    # Products with 1e-42 are denormal too, and zero and 1e-40 together: each value of both channels is.
    assert found.denormal[output] == pytest.approx(share)


def test_without_a_way_to_run_it_the_reason_is_given(bundle: Bundles, tmp_path: Path) -> None:
    opened = altered(bundle(), tmp_path / "altered", lambda model: model.graph.node.pop())
    reason = try_examine(opened)
    assert isinstance(reason, str) and "ONNX Runtime cannot load" in reason


@pytest.mark.usefixtures("quick")
def test_a_benchmark_says_it(bundle: Bundles) -> None:
    bench = benchmark(bundle(), "onnxruntime", (1,), 0.01)
    assert isinstance(bench.numerics, Numerics)
    assert facts.as_facts(bench)["numerics"] == {
        "tensors": bench.numerics.tensors,
        "tensors_not_finite": [],
        "denormal_share_by_tensor": {},
        "denormal_share_by_constant": {},
    }

    def told(**changes: Any) -> str:
        return " ".join(" ".join(report.notes(replace(bench, **changes))).split())

    assert "denormal" not in told() and "infinity" not in told()
    wrong = Numerics(40, ("a", "b", "logits"), {"t": 0.25}, {"w": 0.5})
    assert "2 of 40 tensors hold NaN or infinity on an image of noise, a first" in told(numerics=wrong)
    assert "1 tensors and 1 constants hold denormal numbers (below 1.2e-38), w most: 50.00%" in told(numerics=wrong)
    for without in ({"flushes_denormals": True}, {"device": "cuda"}):
        assert "denormal" not in told(numerics=wrong, **without)
    assert told(numerics="no memory") == told()
    assert facts.as_facts(replace(bench, numerics="no memory"))["numerics"] == {"tensors": None, "because": "no memory"}
