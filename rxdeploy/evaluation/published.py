"""The card's accuracy beside the measured one, where that is a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from rxdeploy.evaluation.accuracy import Evaluation


@dataclass(frozen=True)
class Published:
    """The card's accuracy in percent, of `dataset`; `why_not` says why the measured one is not held against it."""

    dataset: str
    top1: float
    top5: float | None
    why_not: str


def published(evaluation: Evaluation) -> Published | None:
    """What the card claims, and whether these images can tell; None when it claims nothing."""
    accuracy = evaluation.bundle.manifest.card.accuracy
    if accuracy is None:
        return None
    return Published(accuracy.dataset, accuracy.top1, accuracy.top5, _why_not(evaluation, accuracy.dataset))


def _why_not(evaluation: Evaluation, dataset: str) -> str:
    """A clause, empty when the two figures are of the same weights and the same images."""
    weights = evaluation.bundle.manifest.weights
    if not evaluation.dataset.is_imagenet_val:
        return f"this is not the ImageNet validation set: {evaluation.dataset.not_imagenet_val}"
    if not dataset.lower().startswith("imagenet"):
        return f"this is the ImageNet validation set, and the card's figure is of {dataset}"
    if weights.kind != "published":
        return f"the card's figure is of the published weights, and these are {weights.source}"
    return ""
