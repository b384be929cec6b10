"""What each tensor's rounding does to the logits, for every tensor and method at once: from a few backward passes.

To first order the logits move by J e, J being their derivative by the tensor and e what quantising it adds. With v of
random signs, the mean of ((J'v) . e)^2 is |J e|^2 (M. Hutchinson 1989), and J'v is what one backward pass from
v . logits gives at every tensor. Rounding errors of different values are as good as independent, so their squares are
summed, which takes far fewer v; what a range clips is all of one sign and is summed before it is squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy.calibration.network import Network, Parameters, Steps
from rxdeploy.calibration.options import Method
from rxdeploy.calibration.ranges import Range, Units, units

_BATCH = 4  # every tensor of a batch is held for the backward pass
_PROBES = 2
_SEED = 0

Errors = dict[Method, dict[str, float]]


def predicted_errors(
    network: Network,
    parameters: Mapping[str, Parameters],
    images: NDArray[np.uint8],
    ranges: Mapping[Method, Mapping[str, Range]],
    symmetric: bool,
) -> Errors:
    """Squared relative error of the logits for each method and tensor, when only that tensor is quantised so.

    `images` (n, size, size, 3); `parameters` are the float ones, after equalisation. Squared errors of several tensors
    add up, since they are independent.
    """
    steps, random = _Derivatives(parameters, ranges, symmetric), torch.Generator().manual_seed(_SEED)
    for begin in range(0, len(images), _BATCH):
        with torch.enable_grad():
            found = network.forward(network.normalised(images[begin : begin + _BATCH]), steps)
            norms = found.detach().norm(dim=1, keepdim=True)
            for probe in range(_PROBES):
                signs = torch.randint(0, 2, found.shape, generator=random) * 2.0 - 1.0
                torch.autograd.backward(found, signs / norms, retain_graph=probe + 1 < _PROBES)
    scale = 1 / (len(images) * _PROBES)
    return {method: {name: total * scale for name, total in each.items()} for method, each in steps.totals.items()}


class _Derivatives(Steps):
    """Adds up, at each tensor, what a backward pass through it says of every method."""

    def __init__(
        self, parameters: Mapping[str, Parameters], ranges: Mapping[Method, Mapping[str, Range]], symmetric: bool
    ) -> None:
        self._parameters = parameters
        self._units = {
            method: {name: units(found, symmetric) for name, found in each.items()} for method, each in ranges.items()
        }
        self.totals: Errors = {method: dict.fromkeys(each, 0.0) for method, each in ranges.items()}

    def tensor(self, name: str, value: Tensor) -> Tensor:
        if not value.requires_grad:
            value = value.requires_grad_()
        if any(name in each for each in self._units.values()):
            value.register_hook(partial(self._add, name, value.detach()))  # type: ignore[no-untyped-call]
        return value

    def parameters(self, layer: str, own: Parameters) -> Parameters:
        return self._parameters.get(layer, own)

    def _add(self, name: str, value: Tensor, derivative: Tensor) -> None:
        for method, each in self._units.items():
            self.totals[method][name] += _squared(value, derivative, each[name])


def _squared(value: Tensor, derivative: Tensor, to: Units) -> float:
    """The sum over the images of the squared error that rounding `value` to those units makes."""
    moved = torch.fake_quantize_per_tensor_affine(value, to.scale, to.zero_point, to.least, to.most).sub_(value)
    moved.mul_(derivative)
    low, high = ((end - to.zero_point) * to.scale for end in (to.least, to.most))
    outside = value.clamp(low, high).ne(value)
    clipped = torch.where(outside, moved, 0).flatten(1).sum(1)
    rounded = moved.masked_fill_(outside, 0).square_().sum()
    return float(rounded + clipped.square().sum())
