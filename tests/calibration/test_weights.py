"""Weights in eight bits, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from rxdeploy.calibration.weights import dequantise, quantise, scales


def drawn(heavy: bool) -> np.ndarray:
    random = np.random.default_rng(0)
    values = random.standard_t(2.5, (6, 8, 3, 3)) if heavy else random.normal(size=(6, 8, 3, 3))
    return (values * np.array([1, 1e-3, 10, 0.1, 0, 1e-9]).reshape(6, 1, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("largest", [127, 63])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_each_channel_has_its_own_scale(method: str, largest: int) -> None:
    weight = drawn(heavy=False)
    found = scales(weight, largest, method)  # type: ignore[arg-type]
    assert found.dtype == np.float32 and found.shape == (6,)
    assert (found > 0).all()
    np.testing.assert_array_equal(found, found.astype(np.float16))  # a strongly typed graph stores float16
    integers = quantise(weight, found, largest)
    assert integers.dtype == np.int8
    for channel, scale in enumerate(found):
        for value, integer in zip(weight[channel].flat, integers[channel].flat, strict=True):
            assert integer == max(-largest, min(largest, round(float(np.float32(value) / scale))))
    np.testing.assert_array_equal(dequantise(integers, found), integers * found.reshape(6, 1, 1, 1))
    if method == "minmax":
        np.testing.assert_array_equal(np.abs(integers[:4].reshape(4, -1)).max(1), largest)


def test_mse_leaves_no_larger_error_and_less_where_weights_have_outliers() -> None:
    """At 8 bits there is nothing to gain, at 4 there is."""
    for largest in (127, 63, 7):
        weight = drawn(heavy=True)
        errors = {
            method: ((dequantise(quantise(weight, s, largest), s) - weight) ** 2).sum((1, 2, 3))
            for method in ("minmax", "mse")
            for s in [scales(weight, largest, method)]  # type: ignore[arg-type]
        }
        assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()
        if largest == 7:
            assert errors["mse"].sum() < 0.9 * errors["minmax"].sum()


def test_a_classifiers_weight() -> None:
    weight = drawn(heavy=False).reshape(6, -1)
    found = scales(weight, 127, "mse")
    assert quantise(weight, found, 127).shape == weight.shape
