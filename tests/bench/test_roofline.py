"""The floor, on paper."""

from __future__ import annotations

import pytest

from rxdeploy.bench.counts import GraphCounts, NodeCount
from rxdeploy.bench.roofline import floor

MODEL = GraphCounts(
    (
        NodeCount("conv", "Conv", "stem", 40_000, 900, 0, 0, (), ()),
        NodeCount("fc", "Gemm", "head", 10_000, 100, 0, 0, (), ()),
    ),
    weight_bytes=1000,
    input_bytes=300,
    output_bytes=20,
)


def test_a_device_that_computes_slowly() -> None:
    """2 x 50 000 x 4 operations at 1e6 a second take 0.4 s; 1000 + 4 x 320 bytes at 1e5 a second 0.0228 s."""
    found = floor(MODEL, batch=4, peak=1e6, bandwidth=1e5)
    assert found is not None
    assert (found.compute, found.memory) == pytest.approx((0.4, 0.0228))
    assert (found.seconds, found.bound) == (found.compute, "compute")


def test_a_device_with_slow_memory() -> None:
    found = floor(MODEL, batch=1, peak=1e9, bandwidth=100)
    assert found is not None
    assert (found.seconds, found.bound) == (pytest.approx(13.2), "memory")


def test_weights_pass_once_a_batch() -> None:
    """From batch 1 to 2 only the images' own bytes are added, and all operations double."""
    one, two = floor(MODEL, 1, 1.0, 1.0), floor(MODEL, 2, 1.0, 1.0)
    assert one is not None and two is not None
    assert two.memory - one.memory == 320 and two.compute == 2 * one.compute


def test_no_floor_without_both_limits() -> None:
    assert floor(MODEL, 1, None, 1.0) is None and floor(MODEL, 1, 1.0, None) is None
