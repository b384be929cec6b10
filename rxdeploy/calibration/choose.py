"""Which method finds the ranges, and which corrections to apply: by the logits' error on images held out.

Everything is judged by one number, the relative L2 error of the quantised network's logits against the float one's,
in simulation (recipe.Quantised). A method or a correction is taken only where it lowers the error by a certain share on
one half of the held-out images and lowers it on the other half too. `mse` is what others have to beat. Which single
tensors would do much better by another method, a backward pass tells for all at once (linear.py); the network with all
of these is then judged like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from rxdeploy.calibration.correct import corrections
from rxdeploy.calibration.histogram import Histogram
from rxdeploy.calibration.linear import Errors, predicted_errors
from rxdeploy.calibration.methods import find_range
from rxdeploy.calibration.network import Network, Steps
from rxdeploy.calibration.options import METHODS, Method, MethodChoice, SchemeName
from rxdeploy.calibration.ranges import Range
from rxdeploy.calibration.recipe import Quantised, Recipe, WeightCache, logits, ranges_as_data
from rxdeploy.export.validate import relative_l2

_WORTH = 0.01
_USUAL: Method = "mse"
_CLEARLY = 0.05  # another for all tensors: on images unlike the few held out, mse has been the safer one
_PREDICTED_ON = 8  # images
_MUCH = 0.3  # of a tensor's squared error, which the prediction knows within some ten per cent
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

    def predicted(self, recipe: Recipe, ranges: Mapping[Method, Mapping[str, Range]]) -> Errors:
        """Each tensor's squared error by each method, predicted on a few images of the first half."""
        own = Quantised(self._network, recipe, self.cache).own
        images = self._images[: min(_PREDICTED_ON, self.halves()[0].stop)]
        return predicted_errors(self._network, own, images, ranges, recipe.symmetric)

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
    found = recipe(_USUAL)
    trials.append(Trial(_USUAL, judge.error(found, judge.halves()[0]), True))
    for each in METHODS:
        if each != _USUAL:
            progress(f"trying {each}")
            found = _better(judge, found, recipe(each), each, trials, _CLEARLY)
    progress("trying other methods for single tensors")
    if changed := _single_tensors(judge, found, ranges):
        tried = msgspec.structs.replace(
            found,
            methods=dict(changed),
            ranges=found.ranges | ranges_as_data({name: ranges[each][name] for name, each in changed.items()}),
        )
        found = _better(judge, found, tried, f"another method for {len(changed)} tensors", trials)
    return found, trials


def _single_tensors(judge: Judge, recipe: Recipe, ranges: Mapping[Method, Mapping[str, Range]]) -> dict[str, Method]:
    """The tensors for which another method than the recipe's is predicted to do much better, and that method."""
    predicted = judge.predicted(recipe, ranges)
    found: dict[str, Method] = {}
    for name, own in predicted[recipe.method].items():
        best = min(METHODS, key=lambda each: predicted[each][name])
        if predicted[best][name] < own * (1 - _MUCH):
            found[name] = best
    return found


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


def _better(
    judge: Judge, before: Recipe, after: Recipe, what: str, trials: list[Trial], least: float = _WORTH
) -> Recipe:
    """The one of two with the smaller error; `before` where `after` is not better by that share on both halves."""
    choosing, confirming = judge.halves()
    old, new = judge.error(before, choosing), judge.error(after, choosing)
    worth = new < old * (1 - least) and judge.error(after, confirming) < judge.error(before, confirming)
    trials.append(Trial(what, new, worth))
    return after if worth else before
