"""What a series of calls says: percentiles of their latency, and throughput with a confidence interval.

A percentile is by nearest rank: the smallest sample that at least that share of all samples do not exceed. It is
given only where at least one sample lies beyond it, since it would be nothing but the maximum otherwise.

Successive calls resemble each other (clock frequency, neighbours), so an interval from single calls would be too
narrow. The calls are therefore cut into blocks of successive ones, and Student's t-distribution is applied to the
means of the blocks (the method of batch means).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
MOST_BLOCKS = 20
FEWEST_BLOCKS = 5  # where there are as many calls

# Student's t: the quantile 0.975 for 1, 2, ... 19 degrees of freedom, which leaves 2.5% on either side.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


@dataclass(frozen=True)
class Latency:
    """Seconds of a call. `percentiles` holds None for what there are too few calls for."""

    calls: int
    mean: float
    fastest: float
    percentiles: dict[float, float | None]

    @property
    def median(self) -> float:
        """The 50th percentile, or the mean of the only call."""
        found = self.percentiles[50.0]
        return self.mean if found is None else found


@dataclass(frozen=True)
class Throughput:
    """Images a second, with the 95% confidence interval `low` to `high`, None from a single block."""

    images_per_s: float
    low: float | None
    high: float | None
    blocks: int


def latency(seconds: Sequence[float]) -> Latency:
    """What is to be said of the calls that took `seconds` (at least one)."""
    ordered = np.sort(np.asarray(seconds, np.float64))
    return Latency(
        len(ordered), float(ordered.mean()), float(ordered[0]), {p: percentile(ordered, p) for p in PERCENTILES}
    )


def percentile(ordered: NDArray[np.float64], percent: float) -> float | None:
    """The nearest-rank percentile of ascending samples, or None where no sample lies beyond it."""
    rank = math.ceil(percent * len(ordered) / 100 - 1e-9)  # 99.9 has no exact binary form
    return float(ordered[rank - 1]) if 1 <= rank < len(ordered) else None


def throughput(seconds: Sequence[float], images: int) -> Throughput:
    """Images a second of successive calls of `images` each, one after the other."""
    samples = np.asarray(seconds, np.float64)
    mean = float(samples.mean())
    means = np.array([block.mean() for block in np.array_split(samples, _blocks(len(samples)))])
    if len(means) < 2:
        return Throughput(images / mean, None, None, 1)
    margin = _T_975[len(means) - 2] * float(means.std(ddof=1)) / math.sqrt(len(means))
    slowest, fastest = mean + margin, mean - margin
    # A mean duration that may be nothing says that the throughput has no upper bound.
    return Throughput(images / mean, images / slowest, images / fastest if fastest > 0 else None, len(means))


def _blocks(calls: int) -> int:
    """How many blocks: as many as allowed, of two calls at least where that leaves FEWEST_BLOCKS."""
    return min(MOST_BLOCKS, max(calls // 2, min(calls, FEWEST_BLOCKS)))
