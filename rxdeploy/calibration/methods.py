"""From a tensor's histogram to the range that eight bits are spent on: four ways.

`levels` is how many steps the range has: 127 for the half of a symmetric int8 quantiser (zero_point 0), which is
TensorRT's, or 255 for uint8 with a zero_point, which is ONNX Runtime's on a CPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rxdeploy.calibration.histogram import Histogram
from rxdeploy.calibration.options import Method
from rxdeploy.calibration.ranges import Range

Array = NDArray[np.float64]

PERCENTILE = 99.99  # of the magnitudes; TensorRT's and Model Optimizer's usual choice
_SHARES = np.linspace(1.0, 0.2, 65)  # of the extremes, that "mse" tries
_KL_BINS = 2048  # as in S. Migacz, "8-bit Inference with TensorRT", GTC 2017, whose search "entropy" is
_SIDES = np.linspace(1.0, 0.3, 15)  # the same, for each end of a range with two


def find_range(histogram: Histogram, method: Method, symmetric: bool) -> Range:
    """The range of a tensor by `method`; symmetric ones have `low == -high`, others hold zero."""
    values, counts = histogram.values()
    if not symmetric and histogram.low < 0 < histogram.high:
        return _two_sided(values, counts, histogram, method)
    levels = 127 if symmetric else 255
    largest = max(-histogram.low, histogram.high)
    threshold = _threshold(np.abs(values), counts, largest, levels, method) if largest > 0 else 0.0
    if symmetric:
        return Range(-threshold, threshold)
    return Range(0.0, threshold) if histogram.high > 0 else Range(-threshold, 0.0)


def _threshold(magnitudes: Array, counts: Array, largest: float, levels: int, method: Method) -> float:
    if method == "minmax":
        return largest
    order = np.argsort(magnitudes, kind="stable")
    magnitudes, counts = magnitudes[order], counts[order]
    if method == "percentile":
        return min(_quantile(magnitudes, counts, PERCENTILE / 100), largest)
    if method == "mse":
        return _smallest_error(magnitudes, counts, largest, levels)
    return _smallest_divergence(magnitudes, counts, largest, (levels + 1) // 2 if levels > 127 else levels + 1)


def _quantile(values: Array, counts: Array, share: float) -> float:
    total = np.cumsum(counts)
    place = int(np.searchsorted(total, share * total[-1]))
    # A tensor that is nearly always zero (a dead ReLU) must not get a range of nothing.
    return float(values[place]) or float(values[-1])


def _smallest_error(magnitudes: Array, counts: Array, largest: float, levels: int) -> float:
    """The threshold with the least mean squared error of rounding and clipping."""
    best, least = largest, np.inf
    for share in _SHARES:
        threshold = largest * float(share)
        error = _squared_error(magnitudes, counts, 0.0, threshold, levels)
        if error < least:
            best, least = threshold, error
    return best


def _squared_error(values: Array, counts: Array, low: float, high: float, levels: int) -> float:
    """Sum of squared errors when [low, high] has `levels` steps.

    Values fill their bins, so what is rounded is off by step^2 / 12 on average, wherever a bin is finer than a
    step; zero is exact, and what is beyond the range is off by the distance to it.
    """
    step = (high - low) / levels
    inside = (values >= low - step / 2) & (values <= high + step / 2)
    rounded = float(counts[inside & (values != 0)].sum()) * step**2 / 12
    small = inside & (np.abs(values) < step / 2)  # these become zero
    rounded += float((counts[small] * (values[small] ** 2 - step**2 / 12 * (values[small] != 0))).sum())
    beyond = values[~inside]
    return rounded + float((counts[~inside] * (beyond - np.clip(beyond, low, high)) ** 2).sum())


def _smallest_divergence(magnitudes: Array, counts: Array, largest: float, levels: int) -> float:
    """The threshold whose `levels` steps lose the least information: the Kullback-Leibler divergence of Migacz.

    Zero is left out: it is exact at any threshold, and after a ReLU it is half of everything.
    """
    filled = magnitudes > 0
    edges = np.linspace(0, largest, _KL_BINS + 1)
    places = np.minimum((magnitudes[filled] / largest * _KL_BINS).astype(int), _KL_BINS - 1)
    fine = np.bincount(places, counts[filled], _KL_BINS)
    total, best, least = fine.sum(), largest, np.inf
    if not total:
        return largest
    for end in range(levels, _KL_BINS + 1, 8):
        reference = fine[:end].copy()
        reference[-1] += fine[end:].sum()  # what is clipped lands in the last
        groups = np.arange(end) * levels // end
        occupied = fine[:end] > 0
        sums = np.bincount(groups, fine[:end], levels)
        members = np.bincount(groups, occupied, levels)
        spread = np.where(occupied, (sums / np.maximum(members, 1))[groups], 0)
        if not (scale := spread.sum()):
            continue
        p, q = reference / total, np.maximum(spread / scale, 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = float(np.where(p > 0, p * np.log(p / q), 0).sum())
        if divergence < least:
            best, least = float(edges[end]), divergence
    return best


def _two_sided(values: Array, counts: Array, histogram: Histogram, method: Method) -> Range:
    """For a zero_point somewhere inside."""
    low, high = histogram.low, histogram.high
    if method == "minmax":
        return Range(low, high)
    if method == "percentile":
        share = PERCENTILE / 100
        ends = _quantile(values, counts, (1 - share) / 2), _quantile(values, counts, (1 + share) / 2)
        return Range(max(low, min(ends[0], 0)), min(high, max(ends[1], 0)))
    if method == "mse":
        tried = [(low * a, high * b) for a in _SIDES for b in _SIDES]
        errors = [_squared_error(values, counts, *ends, 255) for ends in tried]
        return Range(*(float(end) for end in tried[int(np.argmin(errors))]))
    # The divergence is of magnitudes: each side by itself, with half of the steps.
    below, above = values < 0, values > 0
    least = _smallest_divergence(-values[below][::-1], counts[below][::-1], -low, 128)
    return Range(-least, _smallest_divergence(values[above], counts[above], high, 128))
