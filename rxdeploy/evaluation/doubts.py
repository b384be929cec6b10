"""What speaks against trusting the figures of an assessment: a wrong order of the classes, or other images.

These are no errors, since each has an honest explanation too, and a good model must not be turned away for it.
"""

from __future__ import annotations

from rxdeploy.evaluation.accuracy import Evaluation
from rxdeploy.evaluation.drop import Comparison

_GUESSES = 2  # a model that learnt anything is more often right than twice as often as guessing
_COIN = 0.5  # and of two or three classes, than half of the time
_MUCH_BETTER = 0.05  # share of the images by which no candidate surpasses what it was made from
_OTHER_IMAGES = 0.01  # share


def doubts(evaluation: Evaluation, comparison: Comparison | None) -> tuple[str, ...]:
    """Each in a clause or two, in the order of their weight."""
    found = [_guessing(evaluation)]
    if comparison:
        found += [_worse_baseline(comparison), _other_images(comparison)]
    return tuple(text for text in found if text)


def _guessing(evaluation: Evaluation) -> str:
    manifest, high = evaluation.bundle.manifest, evaluation.top1.high
    # Of made-up weights nothing else is to be expected.
    if manifest.weights.kind == "synthetic" or high >= min(_GUESSES / manifest.num_classes, _COIN):
        return ""
    order = evaluation.dataset.class_order
    return (
        f"top-1 is at most {100 * high:.2f}%, where guessing gives {100 / manifest.num_classes:.2f}%: the classes of "
        f"the data are probably in another order than the logits{f' (they were found by: {order})' if order else ''}"
    )


def _worse_baseline(comparison: Comparison) -> str:
    drop = comparison.drop
    if drop.value >= -_MUCH_BETTER or drop.high >= 0:
        return ""
    return (
        f"the baseline is {-100 * drop.value:.2f} points worse than the bundle (95% interval {-100 * drop.high:.2f} to "
        f"{-100 * drop.low:.2f}): it, or the labels, are probably wrong, and then the drop says nothing"
    )


def _other_images(comparison: Comparison) -> str:
    unseen, missing, images = comparison.unseen, comparison.missing or 0, comparison.images
    if max(unseen / (images + unseen), missing / (images + missing)) <= _OTHER_IMAGES:
        return ""
    return (
        f"the baseline is of other images: it has not seen {unseen:,} of today's {images + unseen:,}, and {missing:,} "
        f"of its own are not among them, so the drop is of the {images:,} that both have; make it again with "
        "--save-baseline"
    )
