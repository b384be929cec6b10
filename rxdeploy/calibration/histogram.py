"""What values a tensor takes, in one pass whatever its range: counts by sign, exponent and eight bits of mantissa.

Bins of a float's own leading bits need no range beforehand, so a second pass is not needed, two parts of a data set
simply add up, and an interrupted calibration goes on where it was. A bin is 0.2 to 0.4 % of its value wide, where
a step of eight bits is 0.8 % of the largest. The extremes are exact.

ONNX Runtime's calibrators (`onnxruntime.quantization.calibrate`, 1.32) keep every activation of every image until the
end for "entropy" and "percentile": benchmarks/results/int8.json has what they take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHIFT = 15  # of float32's 32 bits; what stays: sign, 8 of exponent, 8 of mantissa
_SMALLEST = 63 << 8  # the bin of 2^-64: everything smaller counts as zero
_BINS = (1 << 16) - _SMALLEST  # for one sign
_SAMPLED = 1 << 14  # values an image and tensor that are counted; of the extremes all are looked at
_STEPS = (1, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


@dataclass
class Histogram:
    """Counts of one tensor's values."""

    low: float = math.inf
    high: float = -math.inf
    positive: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    negative: NDArray[np.int64] | None = None

    def add(self, values: Tensor) -> None:
        """Count the values of a batch; ValueError when one is NaN or infinite."""
        flat = in_memory_order(values)
        low, high = (float(each) for each in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("it has values that are NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        some = flat[:: _step(len(flat) / len(values), values.shape[1])].contiguous()
        if low < 0:
            if self.negative is None:
                self.negative = np.zeros(_BINS, np.int64)
            _count(-some[some < 0], self.negative)
            some = some[some >= 0]
        _count(some, self.positive)

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bin centres in rising order, and their counts; only bins that are not empty."""
        centres, counts = _side(self.positive)
        if self.negative is not None:
            below, below_counts = _side(self.negative)
            centres, counts = np.concatenate([-below[::-1], centres]), np.concatenate([below_counts[::-1], counts])
        return np.clip(centres, self.low, self.high), counts.astype(np.float64)

    def beyond(self, low: float, high: float) -> float:
        """The share of the values that lie outside `low` to `high`."""
        centres, counts = self.values()
        total = float(counts.sum())
        return float(counts[(centres < low) | (centres > high)].sum()) / total if total else 0.0

    def sparse(self) -> dict[str, NDArray]:
        """The non-empty bins, for a file."""
        counts = np.concatenate([self.positive, self.negative if self.negative is not None else ()]).astype(np.int64)
        (bins,) = np.nonzero(counts)
        return {"range": np.array([self.low, self.high]), "bins": bins.astype(np.int32), "counts": counts[bins]}

    @classmethod
    def from_sparse(cls, arrays: dict[str, NDArray]) -> Histogram:
        """What `sparse` gave."""
        counts = np.zeros(2 * _BINS, np.int64)
        counts[arrays["bins"]] = arrays["counts"]
        low, high = map(float, arrays["range"])
        return cls(low, high, counts[:_BINS], counts[_BINS:] if counts[_BINS:].any() else None)


def in_memory_order(values: Tensor) -> Tensor:
    """All values of a tensor as a vector, channels innermost; no copy of what `Network` gives."""
    return (values.permute(0, 2, 3, 1) if values.ndim == 4 else values).reshape(-1)


def _step(size: float, channels: int) -> int:
    """Of an image's `size` values each how manyeth is counted; prime to the channels, so that each has its turn."""
    wanted = size / _SAMPLED
    return next((step for step in _STEPS if step >= wanted and (step == 1 or channels % step)), _STEPS[-1])


def _count(magnitudes: Tensor, counts: NDArray[np.int64]) -> None:
    """Add to `counts`, which has _BINS, what bins these lie in."""
    bins = ((magnitudes.view(torch.int32) >> _SHIFT) - _SMALLEST).clamp_(min=0)
    found = torch.bincount(bins).numpy()
    counts[: len(found)] += found


def _side(counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    (bins,) = np.nonzero(counts)
    edges = ((bins + _SMALLEST).astype(np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    widths = ((bins + _SMALLEST + 1).astype(np.uint32) << _SHIFT).view(np.float32) - edges
    # Zero's own bin is the only one where most values are its lower edge exactly: what ReLU gives.
    return np.where(bins == 0, 0.0, edges + widths / 2), counts[bins]
