"""Which classes a model does worst on, and what it takes their images for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from rxdeploy.evaluation.predictions import Predicted

TAKEN_FOR = 3  # classes to name for each


@dataclass(frozen=True)
class ClassResult:
    """One class: `right` of its `images`, and the classes that the others were taken for, with their counts."""

    label: int
    images: int
    right: int
    taken_for: tuple[tuple[int, int], ...]


def worst_classes(predictions: Iterable[Predicted], count: int) -> list[ClassResult]:
    """At most `count` classes with errors, the lowest accuracy first; of equal ones, the one with more errors."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for prediction in predictions:
        found[prediction.label][prediction.top[0]] += 1
    results = []
    for label, taken in found.items():
        wrong = sorted(((k, n) for k, n in taken.items() if k != label), key=lambda pair: (-pair[1], pair[0]))
        if wrong:
            results.append(ClassResult(label, taken.total(), taken[label], tuple(wrong[:TAKEN_FOR])))
    results.sort(key=lambda result: (result.right / result.images, result.right - result.images, result.label))
    return results[:count]
