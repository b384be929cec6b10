"""The range of a tensor's values that its eight bits are spent on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """What lies beyond is clipped."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The larger end: the range of a symmetric quantiser."""
        return max(-self.low, self.high)
