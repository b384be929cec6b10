"""Whether a data set is ImageNet's validation set, and that reading one needs neither PyTorch nor ONNX."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rxdeploy.datasets import Dataset, Item
from rxdeploy.datasets.folders import FolderSource


def whole(prefix: str = "") -> Dataset:
    items = tuple(Item(f"{prefix}ILSVRC2012_val_{n:08}.JPEG", n % 1000, 1, 1) for n in range(1, 50_001))
    return Dataset(Path("val"), "flat", items, 1000, FolderSource(Path("val")))


def test_whole() -> None:
    for prefix in ("", "n01440764/", "val/n01440764/"):
        dataset = whole(prefix)
        assert dataset.is_imagenet_val
        assert dataset.not_imagenet_val == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: replace(d, num_classes=10), "10 classes, not 1000"),
        (lambda d: replace(d, items=d.items[:-1]), "49999 images, not 50000"),
        (lambda d: replace(d, items=(*d.items[:-1], replace(d.items[0], name="x.JPEG"))), "not named"),
        (lambda d: replace(d, items=(*d.items[:-1], replace(d.items[0], name=f"a/{d.items[0].name}"))), "not named"),
        (lambda d: replace(d, items=(*d.items[:-1], replace(d.items[-1], label=None))), "no labels"),
        (lambda d: replace(d, items=(*d.items[:-1], replace(d.items[-1], label=7))), "not 50 images of each class"),
    ],
)
def test_not_it(change: object, reason: str) -> None:
    dataset = change(whole())  # type: ignore[operator]
    assert not dataset.is_imagenet_val
    assert reason in dataset.not_imagenet_val


def test_light() -> None:
    code = (
        "import sys, rxdeploy.datasets; heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'click', 'scipy', "
        "'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
