"""Two bundles on the same images: how much accuracy was lost, and whether that is more than allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.evaluation.accuracy import Evaluation
from rxdeploy.evaluation.baseline import Baseline
from rxdeploy.evaluation.statistics import Estimate, difference, images_to_decide, mcnemar

Outcome = Literal["pass", "fail", "too few images to tell"]
TooFew = Literal["warn", "fail"]


class TooFewImages(UserWarning):
    """Neither that the drop is within the limit nor that it is not can be said with 95% confidence."""


class DoubtfulFigures(UserWarning):
    """Something speaks against the figures: the classes' order, or images that are not the baseline's."""


@dataclass(frozen=True)
class Change:
    """An image to which the candidate gives another class than the baseline."""

    image: str
    label: int
    before: int
    after: int

    @property
    def kind(self) -> Literal["lost", "gained", "wrong both times"]:
        """What it means for the accuracy."""
        if self.before == self.label:
            return "lost"
        return "gained" if self.after == self.label else "wrong both times"


@dataclass(frozen=True)
class Comparison:
    """Top-1 of a candidate against a baseline's, on the `images` that both have seen.

    `lost` were right by the baseline alone, `gained` by the candidate alone. `drop` is the share lost less the share
    gained, positive when the candidate is worse, with its 95% interval; `p` is of McNemar's exact test that there is
    no difference. `unseen` images had no prediction in the baseline and are left out; `missing` images have one there
    and are not in the data, None when only a sample of the data was evaluated.
    """

    images: int
    baseline_right: int
    candidate_right: int
    lost: int
    gained: int
    drop: Estimate
    p: float
    changes: tuple[Change, ...]
    unseen: int
    missing: int | None


@dataclass(frozen=True)
class Verdict:
    """What can be said of a drop with 95% confidence, and in words; `max_drop` in points."""

    outcome: Outcome
    max_drop: float
    text: str

    def fails(self, too_few: TooFew) -> bool:
        """Whether a check with this verdict is to fail; `too_few` says what is to be done when it cannot tell."""
        return self.outcome == "fail" or (self.outcome != "pass" and too_few == "fail")


class AccuracyDrop(CheckFailed, AssertionError):
    """The accuracy dropped by more than allowed, with 95% confidence."""

    def __init__(self, text: str, comparison: Comparison, verdict: Verdict) -> None:
        super().__init__(text)
        self.comparison, self.verdict = comparison, verdict

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that hand it on, as those of pytest-xdist do: pickle would leave two arguments out."""
        return type(self), (str(self), self.comparison, self.verdict)


def compare(candidate: Evaluation, baseline: Baseline | Evaluation) -> Comparison:
    """Hold an evaluation against a baseline, image by image. InputError when they have no image in common.

    Images are the same when their content is, as far as a stored baseline can tell, and in an evaluation of the same
    data set when their names are.
    """
    if isinstance(baseline, Baseline):
        befores = [baseline.of(prediction) for prediction in candidate.predictions]
        missing = baseline.missing(candidate.predictions) if candidate.whole else None
    else:
        by_name = {prediction.image: prediction.top[0] for prediction in baseline.predictions}
        befores = [by_name.get(prediction.image) for prediction in candidate.predictions]
        missing = len(by_name) - sum(before is not None for before in befores)
    pairs = list(zip(candidate.predictions, befores, strict=True))
    seen = [(prediction, before) for prediction, before in pairs if before is not None]
    if not seen:
        raise InputError(
            f"the baseline has seen none of the {len(pairs)} images in {candidate.dataset.root}: it is of others; make "
            "it again with --save-baseline"
        )
    changes = tuple(
        Change(prediction.image, prediction.label, before, prediction.top[0])
        for prediction, before in seen
        if before != prediction.top[0]
    )
    lost, gained = (sum(change.kind == kind for change in changes) for kind in ("lost", "gained"))
    right = sum(prediction.right for prediction, _ in seen)
    return Comparison(
        images=len(seen),
        baseline_right=right + lost - gained,
        candidate_right=right,
        lost=lost,
        gained=gained,
        drop=difference(lost, gained, len(seen)),
        p=mcnemar(lost, gained),
        changes=changes,
        unseen=len(pairs) - len(seen),
        missing=missing,
    )


def check_max_drop(max_drop: float) -> None:
    """InputError for a limit that is none."""
    if not 0 <= max_drop <= 100:
        raise InputError(f"max drop {max_drop:g}: it must be 0 to 100 points of accuracy")


def judge(comparison: Comparison, max_drop: float) -> Verdict:
    """Whether the drop is more than `max_drop` points: by the ends of its 95% interval."""
    drop, limit = comparison.drop, max_drop / 100
    found = describe_drop(drop)
    if drop.low > limit:
        return Verdict("fail", max_drop, f"{found}, which is more than the {max_drop:g} allowed")
    if drop.high <= limit:
        return Verdict("pass", max_drop, f"{found}, which is within the {max_drop:g} allowed")
    needed = images_to_decide(comparison.lost, comparison.gained, comparison.images, limit)
    way_out = (
        f"about {_rounded(needed):,} images would, if they go like these" if needed else "it is right at the limit"
    )
    return Verdict(
        "too few images to tell",
        max_drop,
        f"too few images to tell: {found}, so {comparison.images} images do not show whether it is within the "
        f"{max_drop:g} allowed; {way_out}",
    )


def describe_drop(drop: Estimate) -> str:
    """A drop with its interval in points, negative where accuracy rose."""
    return f"drop in top-1 {100 * drop.value:.2f} points (95% interval {100 * drop.low:.2f} to {100 * drop.high:.2f})"


def _rounded(count: int) -> int:
    """Up to two digits: it is a forecast."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
