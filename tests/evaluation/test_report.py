"""What the report says of the card's accuracy when the data are ImageNet's validation set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxdeploy.cards.card import Accuracy
from rxdeploy.evaluation.accuracy import Evaluation
from rxdeploy.evaluation.assessment import Assessment
from rxdeploy.evaluation.predictions import Predicted, Skipped
from rxdeploy.evaluation.report import headline


def evaluation(right: int, total: int, whole: bool = True) -> Any:
    predictions = [Predicted(str(n), f"{n:064x}", 7, (7 if n < right else 8, 9), 1.0) for n in range(total)]
    manifest = SimpleNamespace(
        model="gluon_resnext50_32x4d",
        precision="fp16",
        weights=SimpleNamespace(kind="published", source="https://x/w.pth"),
        card=SimpleNamespace(accuracy=Accuracy(dataset="ImageNet", top1=79.35, top5=94.42)),
    )
    dataset = SimpleNamespace(
        root=Path("val"), layout="flat", items=range(50_000), is_imagenet_val=True, not_imagenet_val=""
    )
    return Evaluation(
        bundle=SimpleNamespace(manifest=manifest),  # type: ignore[arg-type]
        device="cpu",
        description="ONNX Runtime on CPU",
        passed_over=(),
        dataset=dataset,  # type: ignore[arg-type]
        whole=whole,
        predictions=tuple(predictions),
        skipped=(Skipped("a\x1b[31m.jpg", "truncated"),),
        speed=None,
    )


def card_line(found: Any) -> str:
    text = headline(Assessment(found)).replace("\n" + " " * 15, " ")
    return next(line for line in text.splitlines() if line.startswith("card"))


def test_the_card_beside_the_measured() -> None:
    # 790 of 1000: Wilson's interval 76.4 to 81.4 %; the top-5 of the predictions above is right as often.
    line = card_line(evaluation(790, 1000))
    assert "top-1 79.35%, top-5 94.42% on ImageNet; here top-1 is 0.35 points below (the card's is inside" in line
    assert "top-5 is 15.42 points below (the card's is OUTSIDE the interval)" in line
    assert "sample" not in line
    assert "here top-1 is 0.65 points above" in card_line(evaluation(800, 1000))


def test_a_sample_is_said_to_be_one() -> None:
    found = evaluation(790, 1000, whole=False)
    assert "This is a sample of its images" in card_line(found)
    assert "val (flat): 1,000 of 50,000 images" in headline(Assessment(found))


@pytest.mark.parametrize("whole", [True, False])
def test_names_from_files_cannot_control_the_terminal(whole: bool) -> None:
    text = headline(Assessment(evaluation(1, 2, whole)))
    assert "1 images that cannot be decoded: a?[31m.jpg: truncated" in text and "\x1b" not in text
