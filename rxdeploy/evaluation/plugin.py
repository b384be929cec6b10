"""The pytest plugin: the fixture ``rxdeploy_accuracy``.

Every pytest imports this module where rxdeploy is installed, so it imports nothing but pytest. PYTEST_DONT_REWRITE:
there are no assert statements here to rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rxdeploy.evaluation.drop import Comparison


class AccuracyChecks:
    """What the fixture gives. Results go into the JUnit report too, as properties of the test."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def assert_no_drop(
        self, candidate: Any, baseline: Any, data: Any, max_drop: float = 0.5, **more: Any
    ) -> Comparison:
        """As `rxdeploy.evaluation.assert_no_drop`, which says what it takes, raises and returns."""
        __tracebackhide__ = True
        from rxdeploy.evaluation.drop import AccuracyDrop, judge
        from rxdeploy.evaluation.regression import assert_no_drop

        try:
            comparison = assert_no_drop(candidate, baseline, data, max_drop, **more)
        except AccuracyDrop as drop:
            self._put_down(drop.comparison, drop.verdict.outcome)
            raise
        self._put_down(comparison, judge(comparison, max_drop).outcome)
        return comparison

    def _put_down(self, comparison: Comparison, outcome: str) -> None:
        figures = {
            "images": comparison.images,
            "top1_percent": 100 * comparison.candidate_right / comparison.images,
            "baseline_top1_percent": 100 * comparison.baseline_right / comparison.images,
            "drop_points": 100 * comparison.drop.value,
            "drop_points_low": 100 * comparison.drop.low,
            "drop_points_high": 100 * comparison.drop.high,
            "mcnemar_p": comparison.p,
        }
        for name, value in figures.items():
            self._record(f"rxdeploy_{name}", f"{value:.6g}")
        self._record("rxdeploy_verdict", outcome)


@pytest.fixture
def rxdeploy_accuracy(request: pytest.FixtureRequest) -> AccuracyChecks:
    """Checks that a bundle's accuracy has not dropped: ``rxdeploy_accuracy.assert_no_drop(...)``."""
    # Not record_property, which does the same and warns that a JUnit family has no properties of a single test.
    properties = request.node.user_properties
    return AccuracyChecks(lambda name, value: properties.append((name, value)))
