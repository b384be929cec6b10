"""What counted images say about all images of their kind: intervals and a test. Only the standard library.

Shares are 0 to 1 here; reports multiply by 100.

- A share (top-1, top-5): Wilson's score interval (E. B. Wilson, 1927; method 3 of R. G. Newcombe, Statistics in
  Medicine 17, 1998, 857-872), which stays within 0 to 1 and holds near 100 %, where accuracies are.
- The difference of two accuracies on the same images: T. Tango's score interval (Statistics in Medicine 17, 1998,
  891-908), the recommendation of M. W. Fagerland, S. Lydersen and P. Laake (Statistics in Medicine 33, 2014,
  2850-2875). It needs the discordant images only (right by one model, wrong by the other), and is not empty when
  there are none: of n images with no change at all, the upper end is z^2 / (n + z^2).
- Whether the two differ at all: McNemar's exact test (a sign test on the discordant images).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Z_975 = 1.959963984540054  # the standard normal's quantile 0.975: 2.5 % on either side
_MOST_TIMES = 10_000  # the number of images, beyond which nobody would collect more


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def share(count: int, total: int) -> Estimate:
    """`count` of `total` images (at least one), with Wilson's 95% interval."""
    squared = Z_975**2
    centre = (count + squared / 2) / (total + squared)
    half = Z_975 / (total + squared) * math.sqrt(count * (total - count) / total + squared / 4)
    low = 0.0 if count == 0 else max(0.0, centre - half)  # exactly, where rounding would leave 1e-18
    high = 1.0 if count == total else min(1.0, centre + half)
    return Estimate(count / total, low, high)


def difference(lost: float, gained: float, total: float) -> Estimate:
    """``(lost - gained) / total`` with Tango's 95% interval: positive when the second of two models is worse.

    Of `total` images (more than none), `lost` were right by the first alone and `gained` by the second alone.
    """
    value = (lost - gained) / total

    def score(supposed: float) -> float:
        return _score(supposed, lost, gained, total)

    # The score falls as the supposed difference grows. At an end of the scale the root is the end itself.
    low = -1.0 if value <= -1 else _root(lambda supposed: score(supposed) - Z_975, -1.0, value)
    high = 1.0 if value >= 1 else _root(lambda supposed: score(supposed) + Z_975, value, 1.0)
    return Estimate(value, low, high)


def _score(supposed: float, lost: float, gained: float, total: float) -> float:
    """How many standard deviations the observed difference lies above a supposed one."""
    above = lost - gained - total * supposed
    variance = total * (2 * _gained_share(supposed, lost, gained, total) + supposed * (1 - supposed))
    if variance <= 0:
        return math.copysign(math.inf, above) if above else 0.0
    return above / math.sqrt(variance)


def _gained_share(supposed: float, lost: float, gained: float, total: float) -> float:
    """The maximum-likelihood share of gained images where the difference is `supposed` (Tango's equation 12)."""
    a = 2 * total
    b = -lost - gained + (2 * total - lost + gained) * supposed
    c = -gained * supposed * (1 - supposed)
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    found = (root - b) / (2 * a) if b <= 0 else (-2 * c / (root + b) if root + b else 0.0)  # without cancellation
    return max(found, -supposed, 0.0)  # a share, and so is that of lost ones, supposed + found


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function of -1 to 1 crosses zero, by bisection down to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return high if abs(high) < abs(low) else low


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value of McNemar's test: of `lost + gained` fair coins, a split at least as uneven."""
    flips, fewer = lost + gained, min(lost, gained)
    if 2 * fewer == flips:
        return 1.0
    # In logarithms, since 2^flips soon leaves the range of a float.
    half = flips * math.log(0.5) + math.lgamma(flips + 1)
    tail = math.fsum(math.exp(half - math.lgamma(k + 1) - math.lgamma(flips - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def images_to_decide(lost: int, gained: int, total: int, limit: float) -> int | None:
    """How many images would tell a difference from `limit` (a share), were the shares of lost and gained the same.

    None when not even ten thousand times as many would, as when the difference is `limit` itself.
    """

    def decided(times: float) -> bool:
        found = difference(lost * times, gained * times, total * times)
        return found.low > limit or found.high <= limit

    low, high = 0.0, math.log(_MOST_TIMES)
    if not decided(_MOST_TIMES):
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        if decided(math.exp(middle)):
            high = middle
        else:
            low = middle
    return math.ceil(total * math.exp(high))
