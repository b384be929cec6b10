"""The range of a tensor's values that its eight bits are spent on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Scales of activations are float16 in a strongly typed graph; below this one has less than four bits left.
_TINY = 2.0**-20


@dataclass(frozen=True)
class Range:
    """What lies beyond is clipped."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The larger end: the range of a symmetric quantiser."""
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Units:
    """value = (integer - zero_point) * scale, integers from `least` to `most`."""

    scale: float
    zero_point: int
    least: int
    most: int


def units(found: Range, symmetric: bool) -> Units:
    """The units of a tensor with that range: int8 around zero with a float16 scale, or uint8 with a float32 one."""
    if symmetric:
        return Units(float(np.float16(max(found.magnitude / 127, _TINY))), 0, -128, 127)
    # Zero must be an integer: it is what a convolution pads with and what a ReLU gives.
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)  # of a tensor that is always zero
    zero_point = int(np.clip(round(-low / float(scale)), 0, 255))
    return Units(float(max(scale, np.finfo(np.float32).tiny)), zero_point, 0, 255)
