"""The regression test of a user's CI on quantised models, right ones and ones with the usual mistakes in them.

On 5400 hard variants of the held-out digits, where float32 gets 90 % right, so that a drop can be seen.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rxdeploy.cache import Cache
from rxdeploy.calibration import record
from rxdeploy.calibration import weights as to_int8
from rxdeploy.calibration.options import CalibrationOptions
from rxdeploy.calibration.recipe import Recipe
from rxdeploy.cards import find_card
from rxdeploy.cards.digits_images import hard, split
from rxdeploy.datasets import Dataset, from_arrays
from rxdeploy.errors import CheckFailed
from rxdeploy.evaluation import AccuracyDrop, assert_no_drop, assess, write_baseline
from rxdeploy.evaluation.baseline import from_evaluation
from rxdeploy.pipeline import Pipeline, Request

Spoil = Callable[[Recipe], Recipe]
MAX_DROP = 0.3  # points


@pytest.fixture(scope="module")
def images() -> Dataset:
    digits = hard()
    return from_arrays(digits.images, digits.labels, 10)


@pytest.fixture(scope="module")
def baseline(bundle: Callable[..., Path], images: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What float32 says, as it is committed to a repository."""
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    evaluation = assess(bundle("fp32"), images, device="cpu").evaluation
    assert 0.85 < evaluation.right / len(evaluation.predictions) < 0.92
    write_baseline(from_evaluation(evaluation), path)
    return path


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to calibrate with."""
    path = tmp_path_factory.mktemp("images") / "train.npz"
    train, _ = split()
    np.savez(path, images=train.images[:256], labels=train.labels[:256])
    return path


@pytest.fixture
def build(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An int8 bundle, its recipe spoilt on the way to the graph; validation lets it pass."""

    def make(spoil: Spoil | None = None, placement: Any = "onnxruntime", validated: bool = False) -> Path:
        real = record.load_recipe
        if spoil:
            monkeypatch.setattr(record, "load_recipe", lambda path, scheme: spoil(real(path, scheme)))
        if not validated:
            monkeypatch.setattr(
                Pipeline, "validate", lambda self, precision=None: self._validation(precision or "int8")
            )
        options = CalibrationOptions(data=training, images=256, method="mse")
        request = Request(
            find_card("digits_resnext14_8x8d"),
            "int8",
            target="onnxruntime",
            placement=placement,
            calibration=options,
        )
        folder = Path(tempfile.mkdtemp(dir=tmp_path))  # with a cache of its own: it does not know of what is spoilt
        with contextlib.closing(Cache(folder / "cache", 10**12)) as opened:
            return Pipeline(request, opened).build(folder / "bundle").path

    return make


@pytest.mark.parametrize("placement", ["onnxruntime", "tensorrt"])
def test_int8_passes(build: Callable[..., Path], images: Dataset, baseline: Path, placement: str) -> None:
    found = assert_no_drop(build(placement=placement, validated=True), baseline, images, MAX_DROP, device="cpu")
    assert found.images == 5400 and found.drop.high <= MAX_DROP / 100


def clipped(recipe: Recipe) -> Recipe:
    """Scales that are a fourth of what they should be."""
    ranges = {name: (low / 4, high / 4) for name, (low, high) in recipe.ranges.items()}
    return msgspec.structs.replace(recipe, ranges=ranges)


def swapped(recipe: Recipe) -> Recipe:
    """The ends of one layer's range. (Two layers' ranges exchanged cost this model 0.2 to 0.3 points, not seen.)"""
    low, high = recipe.ranges["input"]
    return msgspec.structs.replace(recipe, ranges=recipe.ranges | {"input": (-high, -low)})


def coarse(recipe: Recipe) -> Recipe:
    """Weights of four bits: at eight, this model is right even with one scale a tensor (0.13 points, -0.01 to 0.30)."""
    return msgspec.structs.replace(recipe, weight_bits=4)


@pytest.mark.parametrize("spoil", [clipped, swapped])
def test_wrong_ranges_turn_it_red(build: Callable[..., Path], images: Dataset, baseline: Path, spoil: Spoil) -> None:
    with pytest.raises(AccuracyDrop, match=r"which is more than the 0\.3 allowed") as failure:
        assert_no_drop(build(spoil), baseline, images, MAX_DROP, device="cpu")
    assert failure.value.comparison.drop.low > MAX_DROP / 100


def test_weights_with_one_scale_a_tensor_turn_it_red(
    build: Callable[..., Path], images: Dataset, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = assess(build(coarse, "tensorrt"), images, device="cpu", baseline=baseline, max_drop=MAX_DROP)
    assert right.verdict and right.verdict.outcome != "fail"
    real = to_int8.scales
    monkeypatch.setattr(to_int8, "scales", lambda *arguments: np.full_like(s := real(*arguments), s.max()))
    with pytest.raises(AccuracyDrop) as failure:
        assert_no_drop(build(coarse, "tensorrt"), baseline, images, MAX_DROP, device="cpu")
    assert failure.value.comparison.drop.low > 2 * MAX_DROP / 100


def test_a_build_refuses_scales_a_fourth_as_large(build: Callable[..., Path]) -> None:
    """Before any accuracy is measured."""
    with pytest.raises(CheckFailed, match="validation of the int8 model"):
        build(clipped, validated=True)
