"""Which method finds the ranges, and which corrections to apply: by the logits' error on images held out.

Everything is judged by one number, the relative L2 error of the quantised network's logits against the float one's,
in simulation (recipe.Quantised). A method for one kind of tensor, or a correction, is taken only where it lowers the
error by more than `_WORTH` on one half of the held-out images and lowers it on the other half too. Where there are many
tensors of a kind the second best method overall is the only one tried for it: each trial is a run of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from rxdeploy.calibration.correct import corrections
from rxdeploy.calibration.histogram import Histogram
from rxdeploy.calibration.methods import find_range
from rxdeploy.calibration.network import Network, Steps
from rxdeploy.calibration.options import METHODS, Method, MethodChoice, SchemeName
from rxdeploy.calibration.ranges import Range
from rxdeploy.calibration.recipe import Quantised, Recipe, WeightCache, logits, ranges_as_data
from rxdeploy.export.validate import relative_l2

_WORTH = 0.01
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One way to quantise, and its error."""

    what: str
    error: float
    taken: bool


class Judge:
    """Errors on the held-out images."""

    def __init__(self, network: Network, images: NDArray[np.uint8]) -> None:
        self._network, self._images = network, images
        self._exact = logits(network, Steps(), images).astype(np.float64)
        self.cache = WeightCache()
        self._known: list[tuple[Recipe, slice, float]] = []

    def error(self, recipe: Recipe, part: slice = slice(None)) -> float:
        """Relative L2 error of the logits, of a part of the images."""
        for known, of, error in self._known:
            if known is recipe and of == part:
                return error
        found = logits(self._network, Quantised(self._network, recipe, self.cache), self._images[part])
        error = relative_l2(found, self._exact[part])
        self._known = [*self._known[-7:], (recipe, part, error)]
        return error

    def verdict(self, recipe: Recipe) -> float:
        """The error on the half that only confirms choices."""
        return self.error(recipe, self.halves()[1])

    def halves(self) -> tuple[slice, slice]:
        """The images that a choice is made on, and those that confirm it."""
        middle = (len(self._images) + 1) // 2
        return slice(0, middle), slice(middle if middle < len(self._images) else 0, None)


def all_ranges(histograms: Mapping[str, Histogram], symmetric: bool) -> dict[Method, dict[str, Range]]:
    """Every tensor's range by every method."""
    return {
        method: {name: find_range(histogram, method, symmetric) for name, histogram in histograms.items()}
        for method in METHODS
    }


def choose(
    judge: Judge,
    ranges: Mapping[Method, Mapping[str, Range]],
    scheme: SchemeName,
    weight_bits: int,
    method: MethodChoice,
    equalisation: dict[str, list[float]],
    progress: Progress,
    keep: tuple[str, ...] = (),
) -> tuple[Recipe, list[Trial]]:
    """The recipe with the smallest error, and everything that was tried."""
    trials: list[Trial] = []

    def recipe(each: Method) -> Recipe:
        return Recipe(
            scheme=scheme,
            weight_bits=weight_bits,
            method=each,
            ranges=ranges_as_data(ranges[each]),
            equalisation=equalisation,
            keep=keep,
        )

    if method != "auto":
        return recipe(method), trials
    errors: dict[Method, float] = {}
    whole = {each: recipe(each) for each in METHODS}
    for each in METHODS:
        progress(f"trying {each}")
        errors[each] = judge.error(whole[each], judge.halves()[0])
    best = min(METHODS, key=lambda each: (errors[each] != errors[each], errors[each]))
    trials += [Trial(each, errors[each], each == best) for each in METHODS]
    found = whole[best]
    other = min((each for each in METHODS if each != best), key=lambda each: errors[each])
    for kind, names in kinds(ranges[best]).items():
        changed = dict.fromkeys(names, other)
        tried = msgspec.structs.replace(
            found,
            methods=found.methods | changed,
            ranges=found.ranges | ranges_as_data({name: ranges[other][name] for name in names}),
        )
        progress(f"trying {other} for {kind}")
        found = _better(judge, found, tried, f"{other} for {kind}", trials)
    return found, trials


def correct(
    judge: Judge, network: Network, recipe: Recipe, images: NDArray[np.uint8], progress: Progress
) -> tuple[Recipe, list[Trial]]:
    """`recipe` with MSE weight scales and corrected biases, each where it lowers the error.

    At 8 bits the scales are not tried: no channel's gained anything (see weights.py).
    """
    trials: list[Trial] = []
    if recipe.weight_bits < 8:
        progress("trying mse weight scales")
        scaled = msgspec.structs.replace(recipe, weight_scales="mse")
        recipe = _better(judge, recipe, scaled, "weight scales by mse", trials)
    progress("trying bias correction")
    bias = corrections(network, recipe, images, judge.cache)
    return _better(judge, recipe, msgspec.structs.replace(recipe, bias=bias), "bias correction", trials), trials


def _better(judge: Judge, before: Recipe, after: Recipe, what: str, trials: list[Trial]) -> Recipe:
    """The one of two with the smaller error; `before` where it is not worth it."""
    choosing, confirming = judge.halves()
    old, new = judge.error(before, choosing), judge.error(after, choosing)
    worth = new < old * (1 - _WORTH) and judge.error(after, confirming) < judge.error(before, confirming)
    trials.append(Trial(what, new, worth))
    return after if worth else before


_KINDS = {"conv1.relu": "the grouped convolutions' inputs", "conv2.relu": "the last convolutions' inputs"}


def kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors of one kind, for which another method may do better: by what they are in a block."""
    found: dict[str, list[str]] = {}
    for name in names:
        _, _, inside = name.partition(".")
        part = inside.partition(".")[2]  # of layer1.0.conv1.relu: conv1.relu
        if not name.startswith("layer"):
            kind = "the stem and the head"
        elif not part:
            kind = "the blocks' outputs"
        else:
            kind = _KINDS.get(part, "what is added")
        found.setdefault(kind, []).append(name)
    return found
