"""The regression test of a user's CI on quantised models, right ones and ones with the usual mistakes in them.

On hard variants of the held-out digits, where float32 gets 90 % right, so that a drop can be seen. The mistakes are
made in a model with weights as uneven as ImageNet's (`uneven` in conftest.py), which computes the same: the card's own
are so even that some mistakes cost next to nothing.
"""

from __future__ import annotations

import contextlib
import functools
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
from rxdeploy.engines.bundle import CALIBRATION
from rxdeploy.errors import CheckFailed
from rxdeploy.evaluation import AccuracyDrop, Comparison, assert_no_drop, assess, write_baseline
from rxdeploy.evaluation.baseline import from_evaluation
from rxdeploy.evaluation.drop import TooFew
from rxdeploy.pipeline import Pipeline, Request

Spoil = Callable[[Recipe], Recipe]
DIGITS = "digits_resnext14_8x8d"
MAX_DROP = 0.3  # points
BATCH = 32
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
            evaluation = assess(bundle("fp32"), data, device="cpu", batch=BATCH).evaluation
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


@pytest.fixture(scope="module")
def right(training: Path, uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The int8 bundle of the uneven weights for a placement, with nothing wrong."""
    root = tmp_path_factory.mktemp("right")
    return functools.cache(lambda placement: _build(root / placement, placement, uneven, _calibrating(training)))


@pytest.fixture
def spoilt(right: Callable[[str], Path], uneven: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same, made from its calibration, which is spoilt on the way to the graph; validation lets it pass."""

    def make(placement: str, spoil: Spoil = lambda recipe: recipe) -> Path:
        real = record.load_recipe
        options = CalibrationOptions(file=right(placement) / CALIBRATION)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record, "load_recipe", lambda path, scheme: spoil(real(path, scheme)))
            _let_pass(patch)
            return _build(tmp_path, placement, uneven, options)

    return make


def _let_pass(patch: pytest.MonkeyPatch) -> None:
    """Validation raises nothing any more."""
    patch.setattr(Pipeline, "validate", lambda self, precision=None: self._validation(precision or "int8"))


def _calibrating(data: Path) -> CalibrationOptions:
    return CalibrationOptions(data=data, images=256, method="mse")


def _build(folder: Path, placement: Any, weights: Path | None, calibration: CalibrationOptions) -> Path:
    """An int8 bundle in `folder`, with a cache of its own: it does not know of what is spoilt."""
    request = Request(
        find_card(DIGITS),
        "int8",
        weights=str(weights) if weights else None,
        target="onnxruntime",
        placement=placement,
        calibration=calibration,
    )
    with contextlib.closing(Cache(folder / "cache", 10**12)) as cache:
        return Pipeline(request, cache).build(folder / "bundle").path


def test_uneven_weights_give_the_same_logits(uneven: Path) -> None:
    """To the last bit, so that float32's predictions are the same too. By PyTorch, with batch-norms not folded."""
    import torch
    from safetensors.torch import load_file

    from rxdeploy.cards.train_digits import enlarge, model_input
    from rxdeploy.export.module import ResNeXt

    card = find_card(DIGITS)
    assert card.weights.file
    digits, logits, gains = model_input(enlarge(hard(108), card), card), [], []
    for path in card.beside(card.weights.file), uneven:
        module = ResNeXt(card).eval()
        module.load_state_dict(load_file(path), strict=False)
        with torch.inference_mode():
            logits.append(module(digits).numpy())
        gains.append(module.state_dict()["bn1.weight"].max() / module.state_dict()["bn1.weight"].min())
    np.testing.assert_array_equal(logits[0], logits[1])
    assert gains[0] < 2 and gains[1] > 30  # of weights that are others


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_int8_passes(training: Path, few: Images, placement: str, tmp_path: Path) -> None:
    bundle = _build(tmp_path, placement, None, _calibrating(training))
    found = assert_no_drop(bundle, few.baseline, few.data, MAX_DROP, device="cpu", batch=BATCH)
    assert found.images == 5400 and found.drop.high <= MAX_DROP / 100


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_int8_passes_with_uneven_weights(right: Callable[[str], Path], many: Images, placement: str) -> None:
    found = assess(right(placement), many.data, device="cpu", batch=BATCH, baseline=many.baseline, max_drop=MAX_DROP)
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


def _red(bundle: Path, images: Images, too_few: TooFew = "warn") -> Comparison:
    with pytest.raises(AccuracyDrop) as failure:
        assert_no_drop(bundle, images.baseline, images.data, MAX_DROP, device="cpu", batch=BATCH, too_few=too_few)
    return failure.value.comparison


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
def test_wrong_ranges_turn_it_red(spoilt: Callable[..., Path], few: Images, spoil: Spoil, placement: str) -> None:
    assert _red(spoilt(placement, spoil), few).drop.low > MAX_DROP / 100


_scales = to_int8.scales


def one_scale(*arguments: Any) -> NDArray[np.float32]:
    """The scale of the largest channel for all of them."""
    scales = _scales(*arguments)
    return np.full_like(scales, scales.max())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_scale_a_weight_turns_it_red(
    spoilt: Callable[..., Path],
    right: Callable[[str], Path],
    few: Images,
    placement: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the graph alone, as by a placement that forgets the axis."""
    right(placement)
    monkeypatch.setattr(apply, "to_int8", SimpleNamespace(scales=one_scale))
    assert _red(spoilt(placement), few).drop.low > MAX_DROP / 100


def test_one_scale_a_weight_does_not_pass_when_calibrated_with(
    training: Path, uneven: Path, many: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias correction that has seen such weights makes good for most of the loss, but not for all: 0.47 points are
    left (0.23 to 0.71), too much to pass, by images that are enough for the right model to do so.
    """
    monkeypatch.setattr(to_int8, "scales", one_scale)
    _let_pass(monkeypatch)
    bundle = _build(tmp_path, "onnxruntime", uneven, _calibrating(training))
    assert _red(bundle, many, too_few="fail").drop.high > MAX_DROP / 100


def test_a_build_refuses_scales_a_fourth_as_large(
    training: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any accuracy is measured."""
    real = record.load_recipe
    monkeypatch.setattr(record, "load_recipe", lambda path, scheme: too_small(real(path, scheme)))
    with pytest.raises(CheckFailed, match="validation of the int8 model"):
        _build(tmp_path, "onnxruntime", uneven, _calibrating(training))
