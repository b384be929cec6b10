"""The shortest time that a batch can take on a device with a given peak and bandwidth.

Williams, Waterman, Patterson: Roofline (CACM 52(4), 2009), for a whole model: its operations take at least
operations / peak, and what must pass the memory at least bytes / bandwidth; with perfect overlap the larger is the
floor. The bytes are the fewest there can be: all weights once, the input and the output, and no activations, as if
those never left the caches. (Weights that stay in the caches from one call to the next would go below even that.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rxdeploy.bench.counts import GraphCounts


@dataclass(frozen=True)
class Floor:
    """Seconds a batch takes at least: for its operations, for its bytes, and the larger of both."""

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which of both is the larger."""
        return "compute" if self.compute >= self.memory else "memory"


def floor(counts: GraphCounts, batch: int, peak: float | None, bandwidth: float | None) -> Floor | None:
    """The floor of a batch of `batch` images; `peak` in operations and `bandwidth` in bytes a second.

    None where either is not known.
    """
    if peak is None or bandwidth is None:
        return None
    moved = counts.weight_bytes + batch * (counts.input_bytes + counts.output_bytes)
    return Floor(2 * counts.multiply_adds * batch / peak, moved / bandwidth)
