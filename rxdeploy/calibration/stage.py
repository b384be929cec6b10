"""The calibration as a stage of a build: what decides its result, how it is run, and what is said of it.

Light: the network, and PyTorch with it, are imported when it runs.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rxdeploy.calibration.cpu import weight_bits
from rxdeploy.calibration.options import HELD_OUT, CalibrationOptions, SchemeName, quantisable
from rxdeploy.calibration.selection import choose_images
from rxdeploy.cards import ModelCard
from rxdeploy.datasets import Dataset, Item, Stream, open_dataset, sample
from rxdeploy.engines.bundle import CALIBRATION
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.architecture import resnext
from rxdeploy.plainfile import read_plain

if TYPE_CHECKING:
    from rxdeploy.calibration.calibrate import Calibration, Progress
    from rxdeploy.calibration.mixed import Measure
    from rxdeploy.calibration.network import Network
    from rxdeploy.calibration.recipe import Recipe
    from rxdeploy.calibration.record import Record
    from rxdeploy.calibration.sensitivity import Sensitivity
    from rxdeploy.export.weights import StateDict

_SENSITIVITY_ON = 16  # images
_JUDGED_ON = 1000  # labelled images for --max-drop, other than those calibrated with
_LABELLED_LEAST = 100


class CalibrationStage:
    """Calibrates the model of one card for one target; InputError at once for images or a file that will not do."""

    def __init__(
        self, card: ModelCard, options: CalibrationOptions, scheme: SchemeName, cache: Path, progress: Progress
    ) -> None:
        self._card, self._options, self._scheme = card, options, scheme
        self._cache, self._progress = cache / "calibrating", progress
        self.weight_bits = weight_bits() if scheme == "onnxruntime" else 8
        _check_keep(card, options.keep, scheme)
        self._dataset: Dataset | None = None
        self._items: tuple[Item, ...] = ()
        if options.data:
            self._dataset = open_dataset(
                options.data,
                card.architecture.num_classes,
                card.class_names(),
                options.labels,
                labelled=options.max_drop is not None,
            )
            self._items = choose_images(self._dataset, options)

    def key(self) -> dict[str, Any]:
        """What determines the result, besides the model and the code."""
        options = self._options
        facts = {
            "scheme": self._scheme,
            "weight_bits": self.weight_bits,
            "method": options.method,
            "keep": options.keep,
            "seed": options.seed,
            "min_sqnr": options.min_sqnr,
            "max_drop": options.max_drop,
        }
        if self._dataset:
            judged = self._dataset.fingerprint() if options.max_drop is not None else None
            return facts | {"data": self._dataset.fingerprint(self._items), "judged": judged}
        assert options.file is not None
        content = read_plain(options.file, f"calibration {options.file}")
        return facts | {"file": hashlib.sha256(content).hexdigest()}

    def run(self, weights: StateDict, key: str, output: Path) -> dict[str, Any]:
        """Calibrate, write calibration.json and the images held out to `output`, and give the facts for the manifest.

        What an interrupted run left under `key` is used, and removed at the end.
        """
        from rxdeploy.calibration.network import Network
        from rxdeploy.calibration.record import record_json

        self._progress("folding batch-norms", None)
        network = Network(self._card, weights)
        mixed: dict[str, Any] | None = None
        saved = self._cache / key
        if self._dataset:
            calibration = self._calibration(network, saved)
            record = calibration.run(self._scheme, self.weight_bits, self._options)
            record, mixed = self._mix(network, calibration, record)
            np.save(output / HELD_OUT, calibration.held)
        else:
            record = self._from_file(network)
        (output / CALIBRATION).write_text(record_json(record), encoding="utf-8")
        shutil.rmtree(saved, ignore_errors=True)
        return _facts(record, record.recipes[self._scheme], mixed)

    def describe(self, facts: dict[str, Any]) -> str:
        """A line on what came out."""
        if facts["sqnr_db"] is None:
            return f"{facts['method']} ranges" + (f" from {self._options.file}" if self._options.file else "")
        extra = [name for name in ("equalisation", "bias_correction") if facts[name]]
        also = f", with {' and '.join(extra).replace('_', ' ')}" if extra else ""
        kept = f"; {len(facts['keep'])} layers kept in floating point" if facts["keep"] else ""
        skipped = f"; {len(facts['skipped'])} images skipped" if facts["skipped"] else ""
        most = facts["most_clipped"]
        clipped = f"; at most {most[1]:.2%} of a tensor's values clipped ({most[0]})" if most and most[1] else ""
        quality = f"SQNR {facts['sqnr_db']:.1f} dB"
        return f"{facts['images']} images, {facts['method']}{also}; {quality}{kept}{clipped}{skipped}"

    def sensitivity(self, weights: StateDict, record: Path) -> list[Sensitivity]:
        """How much each layer pays, on a few of the images. InputError without images."""
        from rxdeploy.calibration.network import Network
        from rxdeploy.calibration.record import load_recipe
        from rxdeploy.calibration.sensitivity import sensitivities

        network = Network(self._card, weights)
        return sensitivities(network, load_recipe(record, self._scheme), self._few(), self._progress)

    def _few(self) -> np.ndarray:
        if self._dataset is None:
            raise InputError("sensitivity needs images: --calibration-data FOLDER")
        items = self._items[-_SENSITIVITY_ON:]
        return np.concatenate([batch.images for batch in Stream(self._dataset, items, 8, self._card.input, max_bad=1)])

    def _calibration(self, network: Network, saved: Path) -> Calibration:
        from rxdeploy.calibration.calibrate import Calibration

        assert self._dataset is not None
        seed = None if self._options.listed else self._options.seed
        return Calibration(network, self._dataset, self._items, seed, saved, self._progress)

    def _from_file(self, network: Network) -> Record:
        from rxdeploy.calibration.calibrate import recipe_from
        from rxdeploy.calibration.record import read_record

        assert self._options.file is not None
        record = read_record(self._options.file, network)
        recipe = recipe_from(record, self._scheme, self.weight_bits, self._options.method, self._options.keep)
        made = record.recipes.get(self._scheme) == recipe
        errors = {self._scheme: record.errors[self._scheme]} if made and self._scheme in record.errors else {}
        trials = {self._scheme: record.trials.get(self._scheme, ())} if made else {}
        clipped = {self._scheme: record.clipped.get(self._scheme, {})} if made else {}
        return msgspec.structs.replace(
            record, recipes={self._scheme: recipe}, errors=errors, trials=trials, clipped=clipped
        )

    def _mix(self, network: Network, calibration: Calibration, record: Record) -> tuple[Record, dict[str, Any] | None]:
        """Keep layers in float16 until --min-sqnr or --max-drop holds."""
        from rxdeploy.calibration.mixed import keep_until, sqnr
        from rxdeploy.calibration.sensitivity import sensitivities

        options, recipe = self._options, record.recipes[self._scheme]
        if options.min_sqnr is not None:
            target, least = f"SQNR of {options.min_sqnr:g} dB", options.min_sqnr

            def measured(tried: Recipe) -> float:
                return sqnr(calibration.judge.verdict(tried))

            measure: Measure = measured
        elif options.max_drop is not None:
            target, least = f"a drop of at most {options.max_drop:g} points", -options.max_drop
            measure = self._drop(network, set(calibration.images()))
        else:
            return record, None

        def say(text: str) -> None:
            self._progress(text, None)

        def rank() -> list[Sensitivity]:
            return sensitivities(network, recipe, calibration.held[:_SENSITIVITY_ON], self._progress)

        found, mixed = keep_until(network, recipe, rank, measure, least, target, say)
        error = calibration.judge.verdict(found)
        if options.max_drop is not None:  # as a drop, not as what is gained
            mixed = replace(mixed, before=-mixed.before, after=-mixed.after)
        return (
            msgspec.structs.replace(record, recipes={self._scheme: found}, errors={self._scheme: error}),
            mixed.as_facts(),
        )

    def _drop(self, network: Network, used: set[Item]) -> Measure:
        """Minus the points of top-1 accuracy that a recipe loses, on labelled images not calibrated with."""
        from rxdeploy.calibration.network import Steps
        from rxdeploy.calibration.recipe import Quantised, WeightCache, logits

        assert self._dataset is not None
        drawn = sample(self._dataset, _JUDGED_ON + len(used), self._options.seed + 1)  # shuffled: any part is even
        items = [item for item in drawn if item not in used][:_JUDGED_ON]
        if len(items) < _LABELLED_LEAST:
            raise InputError(
                f"data {self._dataset.root}: {len(items)} labelled images besides those calibrated with, too few to "
                f"see a drop in accuracy (at least {_LABELLED_LEAST}); lower --calibration-images, or use --min-sqnr"
            )
        batches = list(Stream(self._dataset, items, 8, self._card.input))
        labels = np.array([item.label for batch in batches for item in batch.items])
        images = np.concatenate([batch.images for batch in batches])
        exact = float((logits(network, Steps(), images).argmax(1) == labels).mean())
        cache = WeightCache()

        def measure(tried: Recipe) -> float:
            found = logits(network, Quantised(network, tried, cache), images)
            return 100 * (float((found.argmax(1) == labels).mean()) - exact)

        return measure


def _check_keep(card: ModelCard, keep: tuple[str, ...], scheme: SchemeName) -> None:
    """InputError for a layer that int8 would not change anyway."""
    network = resnext(card)
    if unknown := sorted(set(keep) - set(quantisable(network, scheme))):
        block = network.blocks[0].name
        also = f"shortcuts by their block ({block})" if scheme == "tensorrt" else "fc"
        raise InputError(
            f"--keep {unknown[0]}: no layer that is quantised for {scheme}; those are convolutions "
            f"({network.stem.name}, {block}.conv1, ...) and {also}"
        )


def _facts(record: Record, recipe: Recipe, mixed: dict[str, Any] | None) -> dict[str, Any]:
    from rxdeploy.calibration.mixed import sqnr

    error = record.errors.get(recipe.scheme)
    clipped = record.clipped.get(recipe.scheme)
    if error is not None and error != error:
        raise CheckFailed("calibration: the quantised model's logits are not finite; the weights are damaged")
    return {
        "scheme": recipe.scheme,
        "method": recipe.method,
        "other_methods": dict(recipe.methods),
        "weight_bits": recipe.weight_bits,
        "weight_scales": recipe.weight_scales,
        "equalisation": bool(recipe.equalisation),
        "bias_correction": bool(recipe.bias),
        "keep": list(recipe.keep),
        "mixed_precision": mixed,
        "images": record.data.images + record.data.held_out,
        "content_sha256": record.data.content_sha256,
        "skipped": [name for name, _ in record.data.skipped],
        "most_clipped": max(clipped.items(), key=lambda each: each[1]) if clipped else None,  # tensor, share
        "relative_l2": error,
        "sqnr_db": sqnr(error) if error else None,  # nothing says infinite in JSON
    }
