"""The regression test of a user's CI on quantised models, right ones and ones with the usual mistakes in them.

On hard variants of the held-out digits, where float32 gets 90 % right, so that a drop can be seen. The mistakes are
made in a model with weights as uneven as ImageNet's (`uneven` in conftest.py), which computes the same: the card's own
are so even that some mistakes cost next to nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from rxdeploy.cache import Cache
from rxdeploy.calibration import apply, record
from rxdeploy.calibration import weights as to_int8
from rxdeploy.calibration.cpu import weight_bits
from rxdeploy.calibration.options import CalibrationOptions
from rxdeploy.calibration.recipe import Recipe
from rxdeploy.cards import find_card
from rxdeploy.cards.digits_images import hard, split
from rxdeploy.datasets import Dataset, from_arrays
from rxdeploy.errors import CheckFailed
from rxdeploy.evaluation import AccuracyDrop, Comparison, assert_no_drop, assess, write_baseline
from rxdeploy.evaluation.baseline import from_evaluation
from rxdeploy.pipeline import Pipeline, Request

Spoil = Callable[[Recipe], Recipe]
DIGITS = "digits_resnext14_8x8d"
MAX_DROP = 0.3  # points
PLACEMENTS = ("onnxruntime", "tensorrt")


class Images(NamedTuple):
    """Labelled images, and what float32 says of them, as it is committed to a repository."""

    data: Dataset
    baseline: Path


@pytest.fixture(scope="module")
def images(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Images]:
    """So many hard digits."""
    found: dict[int, Images] = {}

    def get(count: int) -> Images:
        if count not in found:
            digits, path = hard(count), tmp_path_factory.mktemp("baseline") / "baseline.json"
            data = from_arrays(digits.images, digits.labels, 10)
            evaluation = assess(bundle("fp32"), data, device="cpu").evaluation
            assert 0.85 < evaluation.right / len(evaluation.predictions) < 0.92
            write_baseline(from_evaluation(evaluation), path)
            found[count] = Images(data, path)
        return found[count]

    return get


@pytest.fixture(scope="module")
def few(images: Callable[[int], Images]) -> Images:
    """Enough to see a drop."""
    return images(5400)


@pytest.fixture(scope="module")
def many(images: Callable[[int], Images]) -> Images:
    """Enough to see that there is none."""
    return images(21600)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to calibrate with."""
    path = tmp_path_factory.mktemp("images") / "train.npz"
    train, _ = split()
    np.savez(path, images=train.images[:256], labels=train.labels[:256])
    return path


@pytest.fixture
def build(training: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An int8 bundle, its recipe spoilt on the way to the graph; validation lets it pass."""

    def make(
        placement: Any, spoil: Spoil | None = None, validated: bool = False, weights: str | None = str(uneven)
    ) -> Path:
        real = record.load_recipe
        if spoil:
            monkeypatch.setattr(record, "load_recipe", lambda path, scheme: spoil(real(path, scheme)))
        if not validated:
            monkeypatch.setattr(
                Pipeline, "validate", lambda self, precision=None: self._validation(precision or "int8")
            )
        options = CalibrationOptions(data=training, images=256, method="mse")
        request = Request(
            find_card(DIGITS), "int8", weights=weights, target="onnxruntime", placement=placement, calibration=options
        )
        folder = Path(tempfile.mkdtemp(dir=tmp_path))  # with a cache of its own: it does not know of what is spoilt
        with contextlib.closing(Cache(folder / "cache", 10**12)) as opened:
            return Pipeline(request, opened).build(folder / "bundle").path

    return make


def test_uneven_weights_give_the_same_logits(uneven: Path) -> None:
    """To the last bit, so that float32's predictions are the same too. By PyTorch, with batch-norms not folded."""
    import torch
    from safetensors.torch import load_file

    from rxdeploy.cards.train_digits import enlarge, model_input
    from rxdeploy.export.module import ResNeXt

    card = find_card(DIGITS)
    assert card.weights.file
    digits, logits, gains = model_input(enlarge(hard(540), card), card), [], []
    for path in card.beside(card.weights.file), uneven:
        module = ResNeXt(card).eval()
        module.load_state_dict(load_file(path), strict=False)
        with torch.inference_mode():
            logits.append(module(digits).numpy())
        gains.append(module.state_dict()["bn1.weight"].max() / module.state_dict()["bn1.weight"].min())
    np.testing.assert_array_equal(logits[0], logits[1])
    assert gains[0] < 2 and gains[1] > 30  # of weights that are others


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_int8_passes(build: Callable[..., Path], few: Images, placement: str) -> None:
    bundle = build(placement, validated=True, weights=None)
    found = assert_no_drop(bundle, few.baseline, few.data, MAX_DROP, device="cpu")
    assert found.images == 5400 and found.drop.high <= MAX_DROP / 100


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_int8_passes_with_uneven_weights(build: Callable[..., Path], many: Images, placement: str) -> None:
    found = assess(build(placement, validated=True), many.data, device="cpu", baseline=many.baseline, max_drop=MAX_DROP)
    assert found.verdict and found.comparison and found.comparison.images == 21600
    # With weights of 7 bits the drop is 0.17 points (0.01 to 0.32): too few images to tell.
    narrow = placement == "onnxruntime" and weight_bits() < 8
    assert found.verdict.outcome != "fail" if narrow else found.verdict.outcome == "pass", found.verdict.text


def too_large(recipe: Recipe) -> Recipe:
    """Scales that are four times what they should be: two of the eight bits are lost."""
    return _scaled(recipe, 4)


def too_small(recipe: Recipe) -> Recipe:
    """Scales that are a fourth of what they should be: most of a range is clipped."""
    return _scaled(recipe, 1 / 4)


def _scaled(recipe: Recipe, by: float) -> Recipe:
    ranges = {name: (low * by, high * by) for name, (low, high) in recipe.ranges.items()}
    return msgspec.structs.replace(recipe, ranges=ranges)


def exchanged(recipe: Recipe) -> Recipe:
    """Two layers' ranges swapped; one is nine times the other."""
    one, other = "layer1.0.conv2.relu", "layer1.0"
    ranges = recipe.ranges | {one: recipe.ranges[other], other: recipe.ranges[one]}
    return msgspec.structs.replace(recipe, ranges=ranges)


def turned(recipe: Recipe) -> Recipe:
    """The ends of one layer's range swapped. (Symmetric ranges, TensorRT's, would stay the same.)"""
    low, high = recipe.ranges["input"]
    return msgspec.structs.replace(recipe, ranges=recipe.ranges | {"input": (-high, -low)})


def _red(bundle: Path, images: Images) -> Comparison:
    with pytest.raises(AccuracyDrop, match=r"which is more than the 0\.3 allowed") as failure:
        assert_no_drop(bundle, images.baseline, images.data, MAX_DROP, device="cpu")
    found = failure.value.comparison
    assert found.drop.low > MAX_DROP / 100
    return found


@pytest.mark.parametrize(
    ("spoil", "placement"),
    [
        (too_large, "onnxruntime"),
        (too_large, "tensorrt"),
        (too_small, "onnxruntime"),
        (too_small, "tensorrt"),
        (exchanged, "onnxruntime"),
        (exchanged, "tensorrt"),
        (turned, "onnxruntime"),
    ],
)
def test_wrong_ranges_turn_it_red(build: Callable[..., Path], few: Images, spoil: Spoil, placement: str) -> None:
    _red(build(placement, spoil), few)


def one_scale(*arguments: Any) -> NDArray[np.float32]:
    """The scale of the largest channel for all of them."""
    scales = _scales(*arguments)
    return np.full_like(scales, scales.max())


_scales = to_int8.scales


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_scale_a_weight_turns_it_red(
    build: Callable[..., Path], few: Images, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the graph alone, as by a placement that forgets the axis."""
    monkeypatch.setattr(apply, "to_int8", SimpleNamespace(scales=one_scale))
    _red(build(placement), few)


def test_one_scale_a_weight_is_not_passed_when_calibrated_with(
    build: Callable[..., Path], many: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias correction that has seen such weights makes good for most of the loss, but not for all: 0.47 points are
    left (0.23 to 0.71), too much to pass, by images that are enough for the right model to do so.
    """
    monkeypatch.setattr(to_int8, "scales", one_scale)
    bundle = build("onnxruntime")
    with pytest.raises(AccuracyDrop) as failure:
        assert_no_drop(bundle, many.baseline, many.data, MAX_DROP, device="cpu", too_few="fail")
    assert failure.value.comparison.drop.high > MAX_DROP / 100


def test_a_build_refuses_scales_a_fourth_as_large(build: Callable[..., Path]) -> None:
    """Before any accuracy is measured."""
    with pytest.raises(CheckFailed, match="validation of the int8 model"):
        build("onnxruntime", too_small, validated=True)
