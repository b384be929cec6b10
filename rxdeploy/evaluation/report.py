"""An assessment for people: text and tables, at most 110 columns wide."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rxdeploy.errors import printable
from rxdeploy.evaluation.accuracy import Evaluation
from rxdeploy.evaluation.assessment import Assessment
from rxdeploy.evaluation.baseline import Baseline
from rxdeploy.evaluation.confusion import worst_classes
from rxdeploy.evaluation.drop import Comparison
from rxdeploy.evaluation.facts import WORST
from rxdeploy.evaluation.published import published
from rxdeploy.evaluation.regression import class_text
from rxdeploy.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH, _NAME = 110, 14  # columns
_CHANGES = 20  # changed images to list; --json has them all
_SKIPPED = 5


def headline(found: Assessment) -> str:
    """The figures, a fact a line."""
    evaluation = found.evaluation
    manifest, dataset = evaluation.bundle.manifest, evaluation.dataset
    of = "" if evaluation.whole else f" of {len(dataset.items):,}"
    rows = [
        ("model", f"{manifest.model}, {manifest.precision}, weights {manifest.weights.source}"),
        ("device", evaluation.description),
        *(("not taken", reason) for reason in evaluation.passed_over),
        ("data", f"{printable(str(dataset.root))} ({dataset.layout}): {evaluation.images:,}{of} images"),
        ("top-1", _accuracy(evaluation.top1, evaluation.right, evaluation.images)),
        ("top-5", _accuracy(evaluation.top5, evaluation.right_in_top5, evaluation.images)),
        ("speed", _speed(evaluation)),
        *_card(evaluation),
        *_skipped(evaluation),
    ]
    if found.baseline and found.comparison:
        rows += _comparison(found.baseline, found.comparison)
    if found.verdict:
        rows.append(("verdict", f"{found.verdict.outcome}, for a drop of at most {found.verdict.max_drop:g} points"))
    return "\n".join(_wrapped(f"{name:<{_NAME}} {text}") for name, text in rows)


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=" " * (_NAME + 1), break_long_words=False, break_on_hyphens=False
    )


def _accuracy(found: Estimate, right: int, images: int) -> str:
    return (
        f"{100 * found.value:.2f}% ({right:,} of {images:,}), 95% interval {100 * found.low:.2f} to "
        f"{100 * found.high:.2f}%"
    )


def _speed(evaluation: Evaluation) -> str:
    speed = evaluation.speed
    if speed is None:
        return "not measured: every prediction was in the file already"
    of = "" if speed.images == evaluation.images else f" of the {speed.images:,} images run now"
    return (
        f"{speed.images / speed.seconds:.1f} images/s{of}, with reading and decoding; "
        f"{speed.images / speed.inference_seconds:.1f} images/s in inference"
    )


def _card(evaluation: Evaluation) -> list[tuple[str, str]]:
    card = published(evaluation)
    if card is None:
        return []
    top5 = "" if card.top5 is None else f", top-5 {card.top5:g}%"
    claim = f"top-1 {card.top1:g}%{top5} on {card.dataset}"
    if card.why_not:
        return [("card", f"{claim}; not compared: {card.why_not}")]
    texts = [_against("top-1", evaluation.top1, card.top1)]
    if card.top5 is not None:
        texts.append(_against("top-5", evaluation.top5, card.top5))
    sample = "" if evaluation.whole else ". This is a sample of its images: the interval says how far it can be off"
    return [("card", f"{claim}; here {', '.join(texts)}{sample}")]


def _against(name: str, found: Estimate, claimed: float) -> str:
    points = 100 * found.value - claimed
    where = "above" if points >= 0 else "below"
    inside = "inside" if 100 * found.low <= claimed <= 100 * found.high else "OUTSIDE"
    return f"{name} is {abs(points):.2f} points {where} (the card's is {inside} the interval)"


def _skipped(evaluation: Evaluation) -> list[tuple[str, str]]:
    if not evaluation.skipped:
        return []
    shown = "; ".join(f"{printable(s.image)}: {printable(s.reason)}" for s in evaluation.skipped[:_SKIPPED])
    more = f"; and {len(evaluation.skipped) - _SKIPPED} more" if len(evaluation.skipped) > _SKIPPED else ""
    return [("skipped", f"{len(evaluation.skipped)} images that cannot be decoded: {shown}{more}")]


def _comparison(baseline: Baseline, comparison: Comparison) -> list[tuple[str, str]]:
    drop = comparison.drop
    right, images = comparison.baseline_right, comparison.images
    rows = [
        (
            "baseline",
            f"{baseline.model}, {baseline.precision}, weights {baseline.weights}; {baseline.device}; top-1 "
            f"{100 * right / images:.2f}% ({right:,} of {images:,})",
        ),
        (
            "drop",
            f"{100 * drop.value:.2f} points of top-1, 95% interval {100 * drop.low:.2f} to {100 * drop.high:.2f}; "
            f"{comparison.lost} images lost, {comparison.gained} gained; McNemar's exact p {comparison.p:.2g}",
        ),
    ]
    if comparison.unseen:
        rows.append(("left out", f"{comparison.unseen:,} images that are not in the baseline"))
    if comparison.missing:
        rows.append(("missing", f"{comparison.missing:,} images of the baseline that are not in the data"))
    return rows


def tables(found: Assessment) -> list[Table]:
    """The tables to print."""
    tables = [confusion_table(found.evaluation)]
    if found.comparison:
        tables.append(changes_table(found.evaluation, found.comparison))
    return [table for table in tables if table.row_count]


def confusion_table(evaluation: Evaluation) -> Table:
    """The classes with the lowest accuracy, and what their images were taken for."""
    from rich.markup import escape
    from rich.table import Table

    names = evaluation.bundle.labels()
    table = Table("class", title="Worst classes")
    table.add_column("images", justify="right")
    table.add_column("top-1", justify="right")
    table.add_column("taken for")
    for worst in worst_classes(evaluation.predictions, WORST):
        taken = ", ".join(f"{class_text(label, names)} {count}x" for label, count in worst.taken_for)
        table.add_row(
            escape(class_text(worst.label, names)),
            str(worst.images),
            f"{worst.right / worst.images:.1%}",
            escape(taken),
        )
    return table


def changes_table(evaluation: Evaluation, comparison: Comparison) -> Table:
    """The images that changed class: those lost, then those gained, then those wrong both times."""
    from rich.markup import escape
    from rich.table import Table

    names = evaluation.bundle.labels()
    table = Table("image", "class", "baseline", "candidate", "", title="Images that changed")
    kinds = ("lost", "gained", "wrong both times")
    changes = sorted(comparison.changes, key=lambda change: kinds.index(change.kind))
    for change in changes[:_CHANGES]:
        classes = (class_text(index, names) for index in (change.label, change.before, change.after))
        table.add_row(escape(printable(change.image)), *map(escape, classes), change.kind)
    if len(changes) > _CHANGES:
        table.caption = f"{len(changes) - _CHANGES} more; --json has them all"
    return table
