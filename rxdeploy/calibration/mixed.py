"""Mixed precision: as few layers as can be stay in floating point until a target holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rxdeploy.calibration.network import Network
from rxdeploy.calibration.recipe import Recipe
from rxdeploy.calibration.sensitivity import Sensitivity
from rxdeploy.errors import CheckFailed
from rxdeploy.export.architecture import multiply_adds

_TRIES = 16  # layers that are tried to be given back to int8, from the least damaging on

Measure = Callable[[Recipe], float]  # larger is better


@dataclass(frozen=True)
class Mixed:
    """What keeping layers in floating point gained, and costs."""

    layers: tuple[str, ...]
    target: str
    before: float
    after: float
    float16_share: float  # of the convolutions' multiply-adds

    def as_facts(self) -> dict[str, Any]:
        return {**asdict(self), "predicted_arithmetic": 1 + self.float16_share}


def keep_until(
    network: Network,
    recipe: Recipe,
    rank: Callable[[], Sequence[Sensitivity]],
    measure: Measure,
    least: float,
    target: str,
    progress: Callable[[str], None],
) -> tuple[Recipe, Mixed]:
    """`recipe` with the fewest most damaging layers kept so that `measure` gives `least` or more.

    `rank` gives the layers' sensitivities, when they are needed. Errors of layers add up like independent noise, so the
    worst alone come first; how many are needed is found by halving, and then the least damaging of them are tried
    without.
    CheckFailed when not even all of them are enough.
    """
    before = measure(recipe)
    if before >= least:
        return recipe, Mixed((), target, before, before, _share(network, recipe.keep))
    order = [each.layer for each in sorted(rank(), key=lambda each: -each.only)]
    # `enough` layers are known to do, `few` not to; no layer at all is not enough, all of them must be.
    if not (best := measure(recipe.keeping(order))) >= least:
        raise CheckFailed(f"{target} cannot be reached: with no layer in int8 it is {abs(best):.4g}")
    few, enough = 0, len(order)
    while enough - few > 1:
        middle = (few + enough) // 2
        progress(f"{middle} layers in floating point")
        if (after := measure(recipe.keeping(order[:middle]))) >= least:
            enough, best = middle, after
        else:
            few = middle
    kept = order[:enough]
    for layer in kept[-_TRIES:][::-1]:
        without = [each for each in kept if each != layer]
        progress(f"{len(without)} layers in floating point")
        if without and (after := measure(recipe.keeping(without))) >= least:
            kept, best = without, after
    if len(kept) == len(order):
        raise CheckFailed(f"{target} leaves no layer in int8; build with --fp16")
    found = recipe.keeping(kept)
    return found, Mixed(tuple(kept), target, before, best, _share(network, found.keep))


def _share(network: Network, keep: Sequence[str]) -> float:
    counts = multiply_adds(network.shape)
    return sum(counts.get(layer, 0) for layer in keep) / sum(counts.values())


def sqnr(error: float) -> float:
    """Signal to quantisation noise in dB, of a relative L2 error."""
    return -20 * math.log10(error) if error else math.inf
