"""Weights to int8: a scale for each output channel, symmetric, zero_point 0."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

WeightScales = Literal["minmax", "mse"]

# Shares of the largest magnitude that "mse" tries. At 8 bits a channel of some thousand weights gains next to nothing:
# the best clipping point of a normal distribution lies beyond 4 standard deviations, where its largest weight is.
_SHARES = np.linspace(1.0, 0.6, 9)
_TINY = np.float32(2.0**-20)  # a float16 scale below it would have less than four bits left; also of a channel of zeros


def scales(weight: NDArray[np.float32], largest: int, method: WeightScales = "mse") -> NDArray[np.float32]:
    """The scale of each output channel, float32 (out,), a float16 value; weight / scale is rounded to +-largest.

    "minmax" spans the channel's largest magnitude. "mse" clips the largest weights where that leaves a smaller sum
    of squared errors.
    """
    flat = weight.reshape(len(weight), -1)
    spans = np.abs(flat).max(1)
    best = _scale(spans, largest)
    if method == "minmax":
        return best
    errors = _squared_errors(flat, best, largest)
    for share in _SHARES[1:]:
        tried = _scale(spans * np.float32(share), largest)
        found = _squared_errors(flat, tried, largest)
        better = found < errors
        best, errors = np.where(better, tried, best), np.where(better, found, errors)
    return best


def quantise(weight: NDArray[np.float32], scale: NDArray[np.float32], largest: int) -> NDArray[np.int8]:
    """`weight`, (out, ...), in units of `scale`, (out,): int8, rounded to nearest even, clipped to +-largest."""
    units = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(units), -largest, largest).astype(np.int8)


def dequantise(values: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `quantise` made of the weights, float32."""
    return np.asarray(values * scale.reshape(-1, *[1] * (values.ndim - 1)), np.float32)


def _scale(spans: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    # Rounded to what float16 holds, since that is what a strongly typed float16 graph stores.
    return np.maximum(spans / np.float32(largest), _TINY).astype(np.float16).astype(np.float32)


def _squared_errors(flat: NDArray[np.float32], scale: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    units = flat / scale[:, None]
    error = np.clip(np.rint(units), -largest, largest)
    error -= units
    return np.asarray(np.einsum("oi,oi->o", error, error) * scale**2)
