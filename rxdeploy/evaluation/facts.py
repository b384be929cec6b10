"""An assessment for programs: plain values, with the unit in every key. What was not measured is null."""

from __future__ import annotations

from typing import Any

from rxdeploy.bench import machine
from rxdeploy.evaluation.accuracy import Evaluation
from rxdeploy.evaluation.assessment import Assessment
from rxdeploy.evaluation.baseline import Baseline
from rxdeploy.evaluation.confusion import worst_classes
from rxdeploy.evaluation.drop import Comparison, Verdict
from rxdeploy.evaluation.published import published
from rxdeploy.evaluation.statistics import Estimate

SCHEMA = 1
WORST = 10  # classes

METHOD = {
    "accuracy_interval": "95%, Wilson's score interval (Newcombe 1998, method 3)",
    "drop_interval": "95%, Tango's score interval for the difference of paired proportions (Tango 1998)",
    "mcnemar_p": "exact, two-sided",
    "verdict": "fail: the interval lies above max_drop; pass: its upper end is at most max_drop",
    "images_per_s": "reading, decoding and running; inference: calls of Session.run alone, while others are decoded",
}


def as_facts(found: Assessment) -> dict[str, Any]:
    """The assessment as plain values."""
    return {
        "schema": SCHEMA,
        "machine": machine.facts(),
        **_evaluation_facts(found.evaluation),
        "baseline": _baseline_facts(found.baseline) if found.baseline else None,
        "comparison": _comparison_facts(found.comparison) if found.comparison else None,
        "verdict": _verdict_facts(found.verdict) if found.verdict else None,
        "warnings": list(found.doubts),
        "method": METHOD,
    }


def _evaluation_facts(evaluation: Evaluation) -> dict[str, Any]:
    manifest, dataset, card = evaluation.bundle.manifest, evaluation.dataset, published(evaluation)
    speed = evaluation.speed
    return {
        "bundle": {
            "path": str(evaluation.bundle.path),
            "digest": manifest.digest,
            "model": manifest.model,
            "precision": manifest.precision,
            "weights": manifest.weights.source,
            "target": manifest.target.name,
        },
        "device": {
            "kind": evaluation.device,
            "description": evaluation.description,
            "passed_over": list(evaluation.passed_over),
        },
        "data": {
            "path": str(dataset.root),
            "layout": dataset.layout,
            "images": len(dataset.items),
            "class_order": dataset.class_order,
            "is_imagenet_val": dataset.is_imagenet_val,
            "notes": list(dataset.notes),
        },
        "images": evaluation.images,
        "top1": _accuracy_facts(evaluation.right, evaluation.top1),
        "top5": _accuracy_facts(evaluation.right_in_top5, evaluation.top5),
        "images_run_now": speed.images if speed else 0,
        "images_per_s": speed.images / speed.seconds if speed else None,
        "inference_images_per_s": speed.images / speed.inference_seconds if speed else None,
        "skipped": [{"image": skipped.image, "reason": skipped.reason} for skipped in evaluation.skipped],
        "worst_classes": [
            {"class": worst.label, "images": worst.images, "right": worst.right, "taken_for": dict(worst.taken_for)}
            for worst in worst_classes(evaluation.predictions, WORST)
        ],
        "card_accuracy": {
            "dataset": card.dataset,
            "top1_percent": card.top1,
            "top5_percent": card.top5,
            "not_compared_because": card.why_not or None,
        }
        if card
        else None,
    }


def _accuracy_facts(right: int, found: Estimate) -> dict[str, Any]:
    return {"right": right, "percent": 100 * found.value, "interval_95_percent": [100 * found.low, 100 * found.high]}


def _baseline_facts(baseline: Baseline) -> dict[str, Any]:
    return {
        "model": baseline.model,
        "precision": baseline.precision,
        "weights": baseline.weights,
        "bundle_digest": baseline.bundle,
        "device": baseline.device,
        "images": baseline.images,
        "top1_percent": 100 * baseline.right / baseline.images,
        "top5_percent": 100 * baseline.right_in_top5 / baseline.images,
    }


def _comparison_facts(comparison: Comparison) -> dict[str, Any]:
    drop = comparison.drop
    return {
        "images": comparison.images,
        "baseline_right": comparison.baseline_right,
        "candidate_right": comparison.candidate_right,
        "lost": comparison.lost,
        "gained": comparison.gained,
        "drop_points": 100 * drop.value,
        "drop_points_95_percent_interval": [100 * drop.low, 100 * drop.high],
        "mcnemar_p": comparison.p,
        "images_not_in_baseline": comparison.unseen,
        "baseline_images_not_in_data": comparison.missing,  # null for a sample of the data
        "changes": [
            {"image": c.image, "label": c.label, "before": c.before, "after": c.after, "kind": c.kind}
            for c in comparison.changes
        ],
    }


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {"outcome": verdict.outcome, "max_drop_points": verdict.max_drop, "text": verdict.text}
