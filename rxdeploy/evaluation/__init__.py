"""Bundle + labelled images -> accuracy, and whether it dropped.

Names are imported when first asked for: the pytest plugin of this package is imported by every pytest that runs where
rxdeploy is installed, and must cost it nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rxdeploy.evaluation.accuracy import Evaluation, evaluate
    from rxdeploy.evaluation.assessment import Assessment, assess
    from rxdeploy.evaluation.baseline import Baseline, read_baseline, write_baseline
    from rxdeploy.evaluation.drop import AccuracyDrop, Comparison, DoubtfulFigures, TooFewImages, compare
    from rxdeploy.evaluation.regression import assert_no_drop

_HOME = {
    "Assessment": "assessment",
    "assess": "assessment",
    "Baseline": "baseline",
    "read_baseline": "baseline",
    "write_baseline": "baseline",
    "AccuracyDrop": "drop",
    "Comparison": "drop",
    "DoubtfulFigures": "drop",
    "TooFewImages": "drop",
    "compare": "drop",
    "Evaluation": "accuracy",
    "evaluate": "accuracy",
    "assert_no_drop": "regression",
}
__all__ = [
    "AccuracyDrop",
    "Assessment",
    "Baseline",
    "Comparison",
    "DoubtfulFigures",
    "Evaluation",
    "TooFewImages",
    "assert_no_drop",
    "assess",
    "compare",
    "evaluate",
    "read_baseline",
    "write_baseline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
