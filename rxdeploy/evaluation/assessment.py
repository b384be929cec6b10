"""A whole check, as the command line and the regression test do it: evaluate, compare, judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rxdeploy.datasets import Dataset, Item, from_arrays, open_dataset, sample
from rxdeploy.engines.bundle import PLAN, Bundle, open_bundle
from rxdeploy.errors import InputError, RxDeployError
from rxdeploy.evaluation.accuracy import Evaluation, Progress, evaluate
from rxdeploy.evaluation.baseline import Baseline, classes_digest, from_evaluation, read_baseline, write_baseline
from rxdeploy.evaluation.doubts import doubts
from rxdeploy.evaluation.drop import Comparison, TooFew, Verdict, check_max_drop, compare, judge
from rxdeploy.evaluation.files import beside_predictions, check_files
from rxdeploy.runtime import load
from rxdeploy.signing.keys import TrustedKeys


@dataclass(frozen=True)
class Assessment:
    """What was found: always the evaluation, the rest where it was asked for. `stored`: the new baseline's file."""

    evaluation: Evaluation
    baseline: Baseline | None = None
    comparison: Comparison | None = None
    verdict: Verdict | None = None
    stored: Path | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against trusting the figures, for a warning each."""
        return doubts(self.evaluation, self.comparison)


def assess(
    bundle: str | Path,
    data: Any,
    *,
    labels: str | Path | None = None,
    device: str = "auto",
    batch: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    baseline: str | Path | None = None,
    max_drop: float | None = None,
    too_few: TooFew = "warn",
    predictions: Path | None = None,
    save_baseline: Path | None = None,
    progress: Progress | None = None,
    trusted_keys: TrustedKeys | None = None,
) -> Assessment:
    """Evaluate `bundle`, and hold it against `baseline` (a bundle, or a stored baseline's file) when given.

    `data`: a path for `open_dataset` (with `labels`, a file), a `Dataset`, or arrays: ``(images, labels)``. `limit`
    takes that many images, the same ones for the same `seed`, of every class its share. `max_drop` (points) adds the
    verdict. `predictions` is a file for `evaluate`; a baseline bundle's go to a file beside it with ``.baseline``
    before the ending. `save_baseline` is where to store the result as a baseline, unless the verdict is that it fails
    (`Verdict.fails` with `too_few`); it is stored also when the comparison cannot be made, so that the run is not lost.
    `trusted_keys` are as for `runtime.load`, for both bundles.

    Bad input is an error before any image is run; the rest as for `evaluate` and `compare`.
    """
    if max_drop is not None:
        check_max_drop(max_drop)
        if baseline is None:
            raise InputError("--max-drop: a drop from what? Give --baseline too, a bundle or a stored baseline")
    check_files(data, labels, baseline, predictions, save_baseline)
    reference = _reference(Path(baseline), trusted_keys) if baseline is not None else None
    with load(bundle, device, trusted_keys=trusted_keys) as session:
        dataset = _dataset(session.bundle, data, labels)
        if reference is not None:
            _check_classes(session.bundle, reference, baseline)
        items = sample(dataset, limit, seed) if limit is not None else dataset.items
        evaluation = evaluate(session, dataset, items, batch, predictions, progress)
    found = Assessment(evaluation)
    if reference is not None:
        try:
            if isinstance(reference, Bundle):
                beside = beside_predictions(predictions) if predictions else None
                other = _evaluate_baseline(reference, device, dataset, items, batch, beside, progress, trusted_keys)
                found = Assessment(evaluation, from_evaluation(other), compare(evaluation, other))
            else:
                found = Assessment(evaluation, reference, compare(evaluation, reference))
        except RxDeployError as error:
            if save_baseline is None:
                raise
            write_baseline(from_evaluation(evaluation), save_baseline)
            raise type(error)(f"{error} (the bundle's own result is stored in {save_baseline})") from error
    if found.comparison and max_drop is not None:
        found = replace(found, verdict=judge(found.comparison, max_drop))
    if save_baseline and not (found.verdict and found.verdict.fails(too_few)):
        write_baseline(from_evaluation(evaluation), save_baseline)
        found = replace(found, stored=save_baseline)
    return found


def _reference(path: Path, trusted_keys: TrustedKeys | None) -> Bundle | Baseline:
    """What to compare with, read and checked."""
    return open_bundle(path, trusted_keys) if path.is_dir() else read_baseline(path)


def _check_classes(bundle: Bundle, reference: Bundle | Baseline, path: str | Path | None) -> None:
    """InputError for models of different classes, or of the same in different orders."""
    if isinstance(reference, Bundle):
        classes, digest = reference.manifest.num_classes, classes_digest(reference.labels())
    else:
        classes, digest = reference.num_classes, reference.classes
    if classes != bundle.manifest.num_classes:
        raise InputError(
            f"baseline {path}: it has {classes} classes, and {bundle.path} has {bundle.manifest.num_classes}: they are "
            "models of different things"
        )
    own = classes_digest(bundle.labels())
    if own and digest and own != digest:
        raise InputError(
            f"baseline {path}: its class names are not those of {bundle.path}, or are in another order, so the two "
            "models' classes cannot be compared; build both with the same --labels, or make the baseline again"
        )


def _dataset(bundle: Bundle, data: Any, labels: str | Path | None) -> Dataset:
    classes = bundle.manifest.num_classes
    if isinstance(data, str | Path):
        return open_dataset(Path(data), classes, bundle.labels(), Path(labels) if labels is not None else None)
    if labels is not None:
        raise InputError("labels: a labels file goes with a path to images; arrays come with their labels")
    if isinstance(data, Dataset):
        return data
    try:
        images, classes_of_images = data
    except (TypeError, ValueError):
        raise InputError(
            f"data: got {type(data).__name__}, expected a path, a Dataset or a pair of arrays (images, labels)"
        ) from None
    return from_arrays(images, classes_of_images, classes)


def _evaluate_baseline(
    reference: Bundle,
    device: str,
    dataset: Dataset,
    items: Sequence[Item],
    batch: int | None,
    predictions: Path | None,
    progress: Progress | None,
    trusted_keys: TrustedKeys | None,
) -> Evaluation:
    # A float32 reference is often built without a plan; it then runs on the best that is here.
    if device.startswith("tensorrt") and PLAN not in reference.manifest.files:
        device = "auto"
    with load(reference.path, device, trusted_keys=trusted_keys) as session:
        return evaluate(session, dataset, items, batch, predictions, progress)
