"""The assertion for tests: a candidate has not lost accuracy against a baseline."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from rxdeploy.engines.bundle import Manifest
from rxdeploy.errors import InputError, printable
from rxdeploy.evaluation.assessment import Assessment, assess
from rxdeploy.evaluation.baseline import Baseline
from rxdeploy.evaluation.drop import AccuracyDrop, Change, Comparison, DoubtfulFigures, TooFew, TooFewImages

_SHOWN = 10  # changed images to name


def assert_no_drop(
    candidate: str | Path,
    baseline: str | Path,
    data: Any,
    max_drop: float = 0.5,
    *,
    labels: str | Path | None = None,
    device: str = "auto",
    batch: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    too_few: TooFew = "warn",
) -> Comparison:
    """Pass when top-1 of the bundle `candidate` is shown to be at most `max_drop` points below `baseline`'s.

    `baseline` is a bundle, or the file that ``rxdeploy evaluate --save-baseline`` wrote; `data` and the rest are as
    for `assess`. `AccuracyDrop`, an AssertionError, when the drop is larger with 95% confidence. When the images are
    too few to say either, a `TooFewImages` warning, or with ``too_few="fail"`` an `AccuracyDrop` too. A
    `DoubtfulFigures` warning when the figures look as if classes or images were others. InputError and
    EnvironmentLacks for what cannot be run.
    """
    __tracebackhide__ = True  # by pytest: the message says it all
    options: dict[str, Any] = {"labels": labels, "device": device, "batch": batch, "limit": limit, "seed": seed}
    return conclude(check(candidate, baseline, data, max_drop, too_few=too_few, **options), too_few)


def check(
    candidate: str | Path,
    baseline: str | Path,
    data: Any,
    max_drop: float = 0.5,
    *,
    too_few: TooFew = "warn",
    **options: Any,
) -> Assessment:
    """The assessment with its verdict, for `conclude`; arguments as for `assert_no_drop`."""
    __tracebackhide__ = True
    if too_few not in ("warn", "fail"):
        raise InputError(f"too_few is {too_few!r}; it must be 'warn' or 'fail'")
    return assess(candidate, data, baseline=baseline, max_drop=max_drop, too_few=too_few, **options)


def conclude(found: Assessment, too_few: TooFew) -> Comparison:
    """Raise or warn as the verdict says; the warnings are of the caller's caller."""
    __tracebackhide__ = True
    assert found.comparison and found.verdict
    if found.verdict.fails(too_few):
        raise AccuracyDrop(message(found), found.comparison, found.verdict)
    for doubt in found.doubts:
        warnings.warn(doubt, DoubtfulFigures, stacklevel=3)
    if found.verdict.outcome != "pass":
        warnings.warn(found.verdict.text, TooFewImages, stacklevel=3)
    return found.comparison


def message(found: Assessment) -> str:
    """A failed assertion's text: the first line says it, the others what it rests on, and which images."""
    comparison, verdict, baseline = found.comparison, found.verdict, found.baseline
    assert comparison and verdict and baseline
    lines = [
        verdict.text,
        f"candidate: {_of(found.evaluation.bundle.manifest)}, {_right(comparison.candidate_right, comparison)}, "
        f"{found.evaluation.description}",
        f"baseline: {_of(baseline)}, {_right(comparison.baseline_right, comparison)}, {baseline.device}",
        f"{comparison.lost} images lost, {comparison.gained} gained; McNemar's exact p {comparison.p:.2g}",
    ]
    if comparison.unseen:
        lines.append(f"{comparison.unseen} images are not in the baseline and were left out")
    if comparison.missing:
        lines.append(f"{comparison.missing} images of the baseline are not in the data")
    lines += [f"doubtful: {doubt}" for doubt in found.doubts]
    names = found.evaluation.bundle.labels()
    lost = [change for change in comparison.changes if change.kind == "lost"]
    lines += [f"lost: {_change(change, names)}" for change in lost[:_SHOWN]]
    if len(lost) > _SHOWN:
        lines.append(f"... and {len(lost) - _SHOWN} more")
    return "\n".join(lines)


def _of(source: Manifest | Baseline) -> str:
    if isinstance(source, Baseline):
        weights, digest = source.weights, source.bundle
    else:
        weights, digest = source.weights.source, source.digest
    return f"{source.model} {source.precision}, weights {weights}, bundle {digest[:8]}"


def _right(right: int, comparison: Comparison) -> str:
    return f"top-1 {100 * right / comparison.images:.2f}% ({right} of {comparison.images})"


def _change(change: Change, names: tuple[str, ...] | None) -> str:
    return f"{printable(change.image)}: {class_text(change.label, names)} taken for {class_text(change.after, names)}"


def class_text(index: int, names: tuple[str, ...] | None) -> str:
    """A class for people: its index, and its name where there is one that says more."""
    name = printable(names[index]) if names and index < len(names) else str(index)
    return str(index) if name == str(index) else f"{index} ({name})"
