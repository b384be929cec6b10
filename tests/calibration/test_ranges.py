"""Histograms against NumPy on all values, and each method's range against a search done otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rxdeploy.calibration.gather import Gathered
from rxdeploy.calibration.histogram import Histogram
from rxdeploy.calibration.methods import find_range
from rxdeploy.calibration.options import METHODS

Draw = Callable[[np.random.Generator], NDArray[np.float32]]
DRAWS: dict[str, Draw] = {
    "relu": lambda r: np.maximum(r.normal(size=(4, 8, 32, 32)), 0),
    "normal": lambda r: r.normal(1, 3, size=(4, 8, 32, 32)),
    "heavy": lambda r: r.standard_t(3, size=(4, 8, 32, 32)),
    "exponential": lambda r: r.exponential(1e-3, size=(4, 8, 32, 32)),
    "negative": lambda r: -r.exponential(5, size=(4, 8, 32, 32)),
}


def draw(kind: str, seed: int = 0) -> NDArray[np.float32]:
    return DRAWS[kind](np.random.default_rng(seed)).astype(np.float32)


def tensor(values: NDArray[np.float32]) -> torch.Tensor:
    found = torch.from_numpy(values)
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found


def histogram(*batches: NDArray[np.float32]) -> Histogram:
    found = Histogram()
    for batch in batches:
        found.add(tensor(batch))
    return found


@pytest.mark.parametrize("kind", DRAWS)
def test_a_histogram_has_the_distribution(kind: str) -> None:
    values = draw(kind)
    found = histogram(values)
    assert (found.low, found.high) == (values.min(), values.max())
    centres, counts = found.values()
    assert (np.diff(centres) > 0).all()
    assert counts.sum() == values.size  # this small, every value is counted
    for share in (0.1, 0.5, 0.9, 0.99):
        place = np.searchsorted(np.cumsum(counts), share * counts.sum())
        np.testing.assert_allclose(centres[place], np.quantile(values, share), rtol=5e-3, atol=1e-6)
    np.testing.assert_allclose((centres * counts).sum() / counts.sum(), values.mean(), rtol=3e-3)


def test_of_large_tensors_a_part_is_counted_evenly() -> None:
    values = np.broadcast_to(np.arange(1, 65, dtype=np.float32)[:, None, None], (2, 64, 56, 56)).copy()
    found = histogram(values)
    centres, counts = found.values()
    assert len(centres) == 64  # every channel had its turn
    assert counts.sum() < values.size / 5
    assert counts.max() / counts.min() < 1.05


def test_zero_is_exact_and_extremes_too() -> None:
    found = histogram(np.array([[0, 0, 0, 1e-30, 3.7, -2.2]], np.float32))
    centres, counts = found.values()
    assert counts[centres == 0].sum() >= 3
    np.testing.assert_allclose((centres.min(), centres.max()), (found.low, found.high), rtol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_none(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram(np.array([[1, bad, 2]], np.float32))


@pytest.mark.parametrize("kind", ["relu", "normal"])
def test_a_file_keeps_it(kind: str, tmp_path: Path) -> None:
    whole = histogram(draw(kind, 1), draw(kind, 2))
    Gathered("tag", 8, "abc", {"x": whole}, {"x": np.ones(3, np.float32)}).save(tmp_path / "saved.npz")
    loaded = Gathered.load(tmp_path / "saved.npz")
    assert (loaded.tag, loaded.images, loaded.content, list(loaded.maxima["x"])) == ("tag", 8, "abc", [1, 1, 1])
    found = loaded.histograms["x"]
    assert (found.low, found.high) == (whole.low, whole.high)
    for a, b in zip(found.values(), whole.values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", b"x" * 100])
def test_a_damaged_file_is_begun_anew(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "saved.npz").write_bytes(damage)
    assert Gathered.load(tmp_path / "saved.npz").images == 0
    assert Gathered.load(tmp_path / "none.npz").images == 0


def squared_error(values: NDArray[np.float64], low: float, high: float, levels: int, least: int) -> float:
    """What quantising these values costs, done with each of them."""
    scale = (high - low) / levels
    zero_point = np.rint(-low / scale) if least == 0 else 0
    integers = np.clip(np.rint(values / scale) + zero_point, least, least + (255 if least == 0 else 254))
    return float((((integers - zero_point) * scale - values) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", DRAWS)
def test_mse_is_close_to_the_best_of_a_search_over_all_values(kind: str, symmetric: bool) -> None:
    values = draw(kind)
    found = find_range(histogram(values), "mse", symmetric)
    exact = values.astype(np.float64)
    largest = np.abs(exact).max()
    if symmetric:
        assert found.low == -found.high
        ends = [(-largest * share, largest * share) for share in np.linspace(0.1, 1, 60)]
        errors = [squared_error(exact, *each, 254, -127) for each in ends]
        mine = squared_error(exact, found.low, found.high, 254, -127)
    else:
        low, high = min(exact.min(), 0), max(exact.max(), 0)
        ends = [(low * a, high * b) for a in np.linspace(0.2, 1, 20) for b in np.linspace(0.2, 1, 20)]
        errors = [squared_error(exact, *each, 255, 0) for each in ends if each[0] < each[1]]
        mine = squared_error(exact, found.low, found.high, 255, 0)
    assert mine <= 1.05 * min(errors)


@pytest.mark.parametrize("kind", DRAWS)
def test_minmax_and_percentile(kind: str) -> None:
    values = draw(kind)
    counted = histogram(values)
    largest = float(np.abs(values).max())
    assert find_range(counted, "minmax", True).magnitude == pytest.approx(largest)
    found = find_range(counted, "minmax", False)
    assert (found.low, found.high) == (min(values.min(), 0), max(values.max(), 0))
    found = find_range(counted, "percentile", True)
    assert found.magnitude == pytest.approx(np.quantile(np.abs(values), 0.9999), rel=0.03)
    if kind == "normal":
        found = find_range(counted, "percentile", False)
        assert found.low == pytest.approx(np.quantile(values, 0.00005), rel=0.1)
        assert found.high == pytest.approx(np.quantile(values, 0.99995), rel=0.1)


def divergence(values: NDArray[np.float64], threshold: float, levels: int = 128) -> float:
    """Kullback-Leibler divergence of 128 equal steps up to a threshold: Migacz's, done bin by bin."""
    bins = 2048
    width = np.abs(values).max() / bins
    counts = np.histogram(np.abs(values[values != 0]), bins, (0, bins * width))[0].astype(float)
    end = round(threshold / width)
    reference = counts[:end].copy()
    reference[-1] += counts[end:].sum()
    spread = np.zeros(end)
    for level in range(levels):
        inside = [i for i in range(end) if i * levels // end == level]
        filled = [i for i in inside if counts[i] > 0]
        for i in filled:
            spread[i] = counts[inside].sum() / len(filled)
    p, q = reference / reference.sum(), np.maximum(spread / spread.sum(), 1e-12)
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("kind", ["relu", "heavy", "exponential"])
def test_entropy_is_close_to_the_least_divergence(kind: str) -> None:
    values = draw(kind)
    exact = values.astype(np.float64)
    found = find_range(histogram(values), "entropy", True).magnitude
    width = np.abs(exact).max() / 2048
    least = min(divergence(exact, end * width) for end in range(128, 2049, 64))
    assert divergence(exact, found) <= 1.1 * least + 3e-3


def test_outliers_are_clipped_where_they_cost_more_than_they_are_worth() -> None:
    values = draw("relu")
    values[0, 0, 0, 0] = 100
    counted = histogram(values)
    assert find_range(counted, "minmax", True).magnitude == 100
    for method in ("entropy", "percentile"):
        assert find_range(counted, method, True).magnitude < 30  # type: ignore[arg-type]
    assert find_range(counted, "mse", True).magnitude > 90  # its square is more than all others' rounding


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_tensors_with_next_to_nothing_in_them(method: str, symmetric: bool) -> None:
    zeros = histogram(np.zeros((2, 3, 4, 4), np.float32))
    found = find_range(zeros, method, symmetric)  # type: ignore[arg-type]
    assert (found.low, found.high) == (0, 0)
    rare = np.zeros((2, 8, 50, 50), np.float32)
    rare[0, 0, 0, 0] = 5
    assert find_range(histogram(rare), method, symmetric).high > 0  # type: ignore[arg-type]
    constant = histogram(np.full((2, 3, 4, 4), 2.5, np.float32))
    assert find_range(constant, method, symmetric).high == pytest.approx(2.5, rel=0.02)  # type: ignore[arg-type]
