"""The pytest plugin: the fixture ``rxdeploy_accuracy``.

Every pytest imports this module where rxdeploy is installed, so it imports nothing but pytest. PYTEST_DONT_REWRITE:
there are no assert statements here to rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rxdeploy.evaluation.assessment import Assessment
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
        from rxdeploy.evaluation.regression import check, conclude

        found = check(candidate, baseline, data, max_drop, **more)
        self._put_down(found)  # before the conclusion, which may be an exception, or a warning that is made one
        return conclude(found, more.get("too_few", "warn"))

    def _put_down(self, found: Assessment) -> None:
        comparison, verdict = found.comparison, found.verdict
        assert comparison and verdict
        figures = {
            "images": comparison.images,
            "images_not_in_baseline": comparison.unseen,
            "baseline_images_not_in_data": comparison.missing,  # None: not known
            "top1_percent": 100 * comparison.candidate_right / comparison.images,
            "baseline_top1_percent": 100 * comparison.baseline_right / comparison.images,
            "drop_points": 100 * comparison.drop.value,
            "drop_points_low": 100 * comparison.drop.low,
            "drop_points_high": 100 * comparison.drop.high,
            "mcnemar_p": comparison.p,
        }
        for name, value in figures.items():
            if value is not None:
                self._record(f"rxdeploy_{name}", str(value) if isinstance(value, int) else f"{value:.6g}")
        self._record("rxdeploy_verdict", verdict.outcome)


@pytest.fixture
def rxdeploy_accuracy(request: pytest.FixtureRequest) -> AccuracyChecks:
    """Checks that a bundle's accuracy has not dropped: ``rxdeploy_accuracy.assert_no_drop(...)``."""
    # Not record_property, which does the same and warns that a JUnit family has no properties of a single test.
    properties = request.node.user_properties
    return AccuracyChecks(lambda name, value: properties.append((name, value)))
