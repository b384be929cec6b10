"""Bias correction: what quantisation adds to a channel on average is taken off its bias.

Layer after layer, so that each corrects what the layers before it left (M. Nagel et al. 2019, section 4.2, with the
means measured instead of derived).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy.calibration.network import Network, Steps
from rxdeploy.calibration.recipe import Quantised, Recipe, WeightCache


def corrections(
    network: Network, recipe: Recipe, images: NDArray[np.uint8], cache: WeightCache | None = None
) -> dict[str, list[float]]:
    """What to add to each quantised convolution's bias, from a batch of images (n, size, size, 3)."""
    cache = cache or WeightCache()
    exact = _Means()
    parameters = Quantised(network, recipe, cache).own  # equalised, in float
    exact.parameters = lambda layer, own: parameters.get(layer, own)  # type: ignore[method-assign]
    network.run(images, exact)
    fixed = _Corrected(network, recipe, exact.means, cache)
    network.run(images, fixed)
    return {
        layer: [float(f"{value:.5g}") for value in shift.tolist()]
        for layer, shift in fixed.shifts.items()
        if fixed.is_quantised(layer)
    }


class _Means(Steps):
    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}

    def output(self, layer: str, value: Tensor) -> Tensor:
        self.means[layer] = value.mean((0, 2, 3))
        return value


class _Corrected(Quantised):
    def __init__(self, network: Network, recipe: Recipe, means: dict[str, Tensor], cache: WeightCache) -> None:
        super().__init__(network, recipe, cache)
        self._means = means
        self.shifts: dict[str, Tensor] = {}

    def output(self, layer: str, value: Tensor) -> Tensor:
        if not self.is_quantised(layer):
            return value
        shift = self._means[layer] - value.mean((0, 2, 3))
        self.shifts[layer] = shift
        return torch.add(value, shift[:, None, None])
