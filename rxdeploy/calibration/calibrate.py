"""The calibration of one model: images in, a Record out."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import rxdeploy
from rxdeploy.calibration.choose import Judge, Trial, all_ranges, choose, correct
from rxdeploy.calibration.equalise import equalised, factors
from rxdeploy.calibration.gather import Gathered, gather
from rxdeploy.calibration.methods import find_range
from rxdeploy.calibration.network import Network
from rxdeploy.calibration.options import CalibrationOptions, Method, SchemeName
from rxdeploy.calibration.ranges import Range
from rxdeploy.calibration.recipe import Recipe, ranges_as_data, tensors
from rxdeploy.calibration.record import Data, Record, TensorFacts, TrialFacts, model_digest
from rxdeploy.datasets import Batch, Dataset, Item, Stream
from rxdeploy.errors import InputError, printable
from rxdeploy.export.architecture import multiply_adds

BATCH = 8
_MAX_BAD = 0.01  # of the images
# What choices are made on. Few images of a small network say little, and many of a large one take long.
_LARGE = 10**9  # multiply-adds an image
_HELD_OUT = {True: 24, False: 128}  # images at most, and at most a quarter of them
_BATCHES_TRIED = {True: 1, False: 8}  # for equalisation and bias correction
_WORTH = 0.02  # of the error

BothRanges = dict[SchemeName, dict[Method, dict[str, Range]]]


class Progress(Protocol):
    """Told what happens inside, as pipeline.Reporter.progress is."""

    def __call__(self, text: str, fraction: float | None) -> None: ...


class Calibration:
    """Calibrates `network` with `items` of `dataset`.

    `saved` is a folder for what an interrupted calibration is to go on with.
    """

    def __init__(
        self,
        network: Network,
        dataset: Dataset,
        items: Sequence[Item],
        seed: int | None,
        saved: Path,
        progress: Progress,
    ) -> None:
        self.network, self._progress = network, progress
        self._dataset, self._seed, self._saved = dataset, seed, saved
        self._skipped: dict[str, str] = {}
        large = sum(multiply_adds(network.shape).values()) > _LARGE
        held = max(1, min(_HELD_OUT[large], len(items) // 4))
        self._batches_tried = _BATCHES_TRIED[large]
        self._items, self._held_items = tuple(items[:-held]), tuple(items[-held:])
        self._allowed = max(1, int(_MAX_BAD * len(items)))
        batches = list(self._batches(self._held_items))
        if not batches:
            raise InputError(
                f"data {dataset.root}: none of the {held} images held out can be decoded; use another --seed"
            )
        self.held: NDArray[np.uint8] = np.concatenate([batch.images for batch in batches])
        self._held_digests = [digest for batch in batches for digest in batch.digests]
        self.judge = Judge(network, self.held)

    def run(self, scheme: SchemeName, weight_bits: int, options: CalibrationOptions) -> Record:
        """Gather, choose and correct."""
        equalisation, trials = self._equalisation(scheme, weight_bits)
        found = self._gather(equalisation)
        self._say("finding ranges")
        both: BothRanges = {
            "tensorrt": all_ranges(found.histograms, symmetric=True),
            "onnxruntime": all_ranges(found.histograms, symmetric=False),
        }
        used = tensors(self.network, scheme)
        ranges = {method: {name: each[name] for name in used} for method, each in both[scheme].items()}
        say = self._say
        recipe, tried = choose(self.judge, ranges, scheme, weight_bits, options.method, equalisation, say, options.keep)
        recipe, corrected = correct(self.judge, self.network, recipe, self._first(), say)
        return self._record(found, both, recipe, self.judge.verdict(recipe), [*trials, *tried, *corrected])

    def images(self) -> tuple[Item, ...]:
        """Every image that was used."""
        return self._items + self._held_items

    def _batches(self, items: Sequence[Item]) -> _Batches:
        # However many of this part are bad: the share is of all.
        return _Batches(Stream(self._dataset, items, BATCH, self.network.card.input, max_bad=1), self._skip)

    def _skip(self, stream: Stream) -> None:
        self._skipped |= {item.name: reason for item, reason in stream.skipped}
        if len(self._skipped) > self._allowed:
            name, reason = next(iter(self._skipped.items()))
            raise InputError(
                f"data {self._dataset.root}: more than {self._allowed} of {len(self.images())} images cannot be "
                f"decoded, {printable(name)} first: {reason}"
            )

    def _gather(self, equalisation: dict[str, list[float]]) -> Gathered:
        total = len(self._items)
        begun: list[tuple[float, int]] = []  # after the first batch: an earlier run may have left others

        def progress(images: int) -> None:
            if not begun:
                begun.append((time.monotonic(), images))
                return
            since, first = begun[0]
            rate = (images - first) / (time.monotonic() - since)
            left = (total - images) / rate
            self._progress(f"calibrating {images}/{total}, {rate:.1f} images/s, {left:.0f} s left", images / total)

        parameters = equalised(self.network, equalisation) if equalisation else None
        tag = hashlib.sha256(json.dumps(equalisation).encode()).hexdigest()
        saved = self._saved / "gathered.npz"
        return gather(self.network, self._batches(self._items), saved, parameters, progress, tag)

    def _first(self) -> NDArray[np.uint8]:
        first = itertools.islice(self._batches(self._items), self._batches_tried)
        return np.concatenate([batch.images for batch in first])

    def _equalisation(self, scheme: SchemeName, bits: int) -> tuple[dict[str, list[float]], list[Trial]]:
        """The factors, when ranges of a few images show that they lower the error."""
        self._say("trying equalisation")
        errors: list[float] = []
        tried: dict[str, list[float]] = {}
        for again in (False, True):
            parameters = equalised(self.network, tried) if again else None
            first = itertools.islice(self._batches(self._items), self._batches_tried)
            few = gather(self.network, first, None, parameters)
            histograms, symmetric = few.histograms, scheme == "tensorrt"
            used = {name: find_range(histograms[name], "mse", symmetric) for name in tensors(self.network, scheme)}
            errors.append(self.judge.error(_plain(scheme, bits, used, tried), self.judge.halves()[0]))
            tried = tried or factors(self.network, few.maxima)
        worth = errors[1] < errors[0] * (1 - _WORTH)
        return (tried if worth else {}), [Trial("equalisation (mse, ranges of a few images)", errors[1], worth)]

    def _record(self, found: Gathered, both: BothRanges, recipe: Recipe, error: float, trials: list[Trial]) -> Record:
        tensors = {
            name: TensorFacts(
                low=histogram.low,
                high=histogram.high,
                ranges={
                    scheme: {method: ranges_as_data(each)[name] for method, each in ranges.items()}
                    for scheme, ranges in both.items()
                },
            )
            for name, histogram in found.histograms.items()
        }
        content = hashlib.sha256(" ".join((found.content, *self._held_digests)).encode()).hexdigest()
        return Record(
            rxdeploy=rxdeploy.__version__,
            model=self.network.card.name,
            model_sha256=model_digest(self.network),
            data=Data(
                source=str(self._dataset.root),
                layout=self._dataset.layout,
                images=found.images,
                held_out=len(self.held),
                seed=self._seed,
                fingerprint=self._dataset.fingerprint(self.images()),
                content_sha256=content,
                skipped=tuple(sorted(self._skipped.items())),
            ),
            tensors=tensors,
            recipes={recipe.scheme: recipe},
            errors={recipe.scheme: error},
            trials={recipe.scheme: tuple(TrialFacts(what=t.what, error=t.error, taken=t.taken) for t in trials)},
            clipped={
                recipe.scheme: {name: found.histograms[name].beyond(*ends) for name, ends in recipe.ranges.items()}
            },
        )

    def _say(self, text: str) -> None:
        self._progress(text, None)


class _Batches:
    """Batches of a stream without what cannot be decoded, of which `skip` is told; may be iterated again."""

    def __init__(self, stream: Stream, skip: Callable[[Stream], None]) -> None:
        self._stream, self._skip = stream, skip

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            self._skip(self._stream)
            yield batch
        self._skip(self._stream)


def _plain(scheme: SchemeName, bits: int, ranges: dict[str, Range], equalisation: dict[str, list[float]]) -> Recipe:
    return Recipe(
        scheme=scheme, weight_bits=bits, method="mse", ranges=ranges_as_data(ranges), equalisation=equalisation
    )


def recipe_from(record: Record, scheme: SchemeName, weight_bits: int, method: str, keep: tuple[str, ...]) -> Recipe:
    """The recipe for a target from a calibration that may have been made for another, or by another method.

    Then only the ranges and the equalisation are taken over: corrections and layers kept were found for the other.
    """
    made = record.recipes.get(scheme)
    same = made and (method == "auto" or (method == made.method and not made.methods))
    if made and same and made.weight_bits == weight_bits:
        return made.keeping(keep)
    wanted = made.method if made and method == "auto" else "mse" if method == "auto" else method
    ranges = {name: facts.ranges[scheme][wanted] for name, facts in record.tensors.items()}
    equalisation = next((recipe.equalisation for recipe in record.recipes.values()), {})
    return Recipe(
        scheme=scheme,
        weight_bits=weight_bits,
        method=wanted,  # type: ignore[arg-type]
        ranges=ranges,
        equalisation=equalisation,
        keep=keep,
    )
