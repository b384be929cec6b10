"""Baselines, comparisons and verdicts, counted by hand."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rxdeploy.errors import InputError
from rxdeploy.evaluation.baseline import Baseline, read_baseline, write_baseline
from rxdeploy.evaluation.drop import AccuracyDrop, Change, check_max_drop, compare, judge
from rxdeploy.evaluation.predictions import Predicted


def evaluation(pairs: list[tuple[int, int]]) -> Any:
    """Predictions of (label, class), as far as `compare` looks at an evaluation."""
    predictions = [
        Predicted(f"{n}.jpg", f"{n:016x}" + "f" * 48, *pair[:1], (pair[1],), 1.0) for n, pair in enumerate(pairs)
    ]
    return SimpleNamespace(predictions=tuple(predictions), dataset=SimpleNamespace(root=Path("val")), whole=True)


def baseline(classes: list[int]) -> Baseline:
    return Baseline(
        model="m",
        precision="fp32",
        weights="w",
        bundle="b" * 64,
        device="CPU",
        num_classes=10,
        images=len(classes),
        right=0,
        right_in_top5=0,
        predictions={f"{n:016x}": index for n, index in enumerate(classes)},
    )


def test_a_comparison() -> None:
    #                          right   lost    gained  wrong   wrong and other   lost    unseen
    found = compare(evaluation([(1, 1), (2, 5), (3, 3), (4, 0), (5, 1), (6, 7), (7, 7)]), baseline([1, 2, 0, 0, 2, 6]))
    assert (found.images, found.baseline_right, found.candidate_right) == (6, 3, 2)
    assert (found.lost, found.gained, found.unseen, found.missing) == (2, 1, 1, 0)
    assert found.drop.value == pytest.approx(1 / 6) and found.p == 1
    assert found.changes == (
        Change("1.jpg", 2, 2, 5),
        Change("2.jpg", 3, 0, 3),
        Change("4.jpg", 5, 2, 1),
        Change("5.jpg", 6, 6, 7),
    )
    assert [change.kind for change in found.changes] == ["lost", "gained", "wrong both times", "lost"]


def test_images_that_one_of_them_has_not_seen() -> None:
    candidate = evaluation([(0, 0)] * 5)
    candidate.predictions = candidate.predictions[2:]
    found = compare(candidate, baseline([0] * 4))
    assert (found.images, found.unseen, found.missing) == (2, 1, 2)
    candidate.whole = False
    assert compare(candidate, baseline([0] * 4)).missing is None


def test_an_evaluation_is_compared_by_name() -> None:
    """A picture that is there twice counts twice, with the class that it got each time."""
    candidate, other = evaluation([(1, 1), (2, 2)]), evaluation([(1, 1), (2, 1)])
    for one in (candidate, other):
        one.predictions = tuple(msgspec.structs.replace(p, sha256="a" * 64) for p in one.predictions)
    found = compare(candidate, other)
    assert (found.images, found.lost, found.gained, found.unseen, found.missing) == (2, 0, 1, 0, 0)


def test_a_failure_can_be_handed_to_another_process() -> None:
    found = compare(evaluation([(0, 1)] * 50), baseline([0] * 50))
    drop = AccuracyDrop("it fell", found, judge(found, 1))
    again = pickle.loads(pickle.dumps(drop))
    assert (str(again), again.comparison, again.verdict) == (str(drop), drop.comparison, drop.verdict)


def test_no_image_in_common() -> None:
    other = baseline([1, 2])
    candidate = evaluation([(0, 0)] * 5)
    candidate.predictions = candidate.predictions[2:]
    with pytest.raises(InputError, match="seen none of the 3 images in val"):
        compare(candidate, other)


def verdict_of(lost: int, total: int, max_drop: float) -> Any:
    pairs = [(0, 1)] * lost + [(0, 0)] * (total - lost)
    return judge(compare(evaluation(pairs), baseline([0] * total)), max_drop)


def test_verdicts_go_by_the_ends_of_the_interval() -> None:
    # 14 of 540 lost: 1.55 to 4.30 points; test_statistics has the source.
    assert verdict_of(14, 540, 1.55).outcome == "fail"
    assert verdict_of(14, 540, 1.56).outcome == verdict_of(14, 540, 4.30).outcome == "too few images to tell"
    assert verdict_of(14, 540, 4.31).outcome == "pass"
    assert verdict_of(0, 540, 0.71).outcome == "pass"
    assert verdict_of(0, 540, 0.70).outcome == "too few images to tell"


def test_verdicts_in_words() -> None:
    assert verdict_of(14, 540, 0.5).text == (
        "drop in top-1 2.59 points (95% interval 1.55 to 4.30), which is more than the 0.5 allowed"
    )
    assert verdict_of(0, 540, 0.5).text == (
        "too few images to tell: drop in top-1 0.00 points (95% interval -0.71 to 0.71), so 540 images do not show "
        "whether it is within the 0.5 allowed; about 770 images would, if they go like these"
    )
    assert verdict_of(5, 1000, 0.5).text.endswith("; it is right at the limit")


@pytest.mark.parametrize("points", [-0.1, 100.1, float("nan"), float("inf")])
def test_a_limit_that_is_none(points: float) -> None:
    with pytest.raises(InputError, match="it must be 0 to 100 points"):
        check_max_drop(points)


def test_a_baseline_is_a_small_file_that_diffs_by_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "baseline.json"
    write_baseline(baseline([3, 4]), path)
    assert ' "predictions": {\n  "0000000000000000": 3,\n  "0000000000000001": 4\n }\n' in path.read_text()
    assert read_baseline(path) == baseline([3, 4])


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a bundle nor a plain file"):
        read_baseline(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema"),
        ({"kind": "rxdeploy predictions"}, "kind"),
        ({"predictions": {}}, "predictions"),
        ({"predictions": {"xyz": 1}}, "predictions"),
        ({"predictions": {"0" * 16: -1}}, "predictions"),
        ({"num_classes": None}, "num_classes"),
    ],
)
def test_a_file_that_is_no_baseline(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(baseline([3]), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=rf"neither a bundle nor a baseline \(.*{message}.*--save-baseline"):
        read_baseline(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or bundle; .*--save-baseline"):
        read_baseline(tmp_path / "nothing.json")
    (tmp_path / "text.json").write_bytes(b"\xff not json")
    with pytest.raises(InputError, match="neither a bundle nor a baseline"):
        read_baseline(tmp_path / "text.json")
