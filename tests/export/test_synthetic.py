"""Synthetic weights: the same everywhere, and behaving in the PyTorch module as trained ones do."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.export.module import ResNeXt
from rxdeploy.export.samples import noise, photographs
from rxdeploy.export.synthetic import synthetic_weights

Weights = dict[str, NDArray[np.float32]]

DIGEST = """
import hashlib, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[2]))
from rxdeploy.cards import load_card
from rxdeploy.export.synthetic import synthetic_weights
digest = hashlib.sha256()
for name, array in synthetic_weights(load_card(Path(sys.argv[1])), int(sys.argv[3])).items():
    digest.update(name.encode() + array.tobytes())
print(digest.hexdigest())
"""


def digest_of(weights: Mapping[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name, array in weights.items():
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def test_same_seed_same_bytes(make_card: Callable[..., ModelCard]) -> None:
    card = make_card()
    first = digest_of(synthetic_weights(card, 3))
    torch.manual_seed(5)
    np.random.seed(5)
    assert digest_of(synthetic_weights(card, 3)) == first
    for threads in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", DIGEST, str(card.path), threads, "3"],
            env={**os.environ, "PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == first, f"{threads} threads"


def test_another_seed_gives_other_weights(make_card: Callable[..., ModelCard]) -> None:
    card = make_card()
    first, second = synthetic_weights(card, 0), synthetic_weights(card, 1)
    assert digest_of(synthetic_weights(card)) == digest_of(first)
    assert [name for name in first if np.array_equal(first[name], second[name])] == []


def test_draws_as_he_et_al_and_every_layer_anew(make_card: Callable[..., ModelCard]) -> None:
    weights = synthetic_weights(make_card(channels=[64, 64, 64], base_width=32))
    kernels = {name: array for name, array in weights.items() if array.ndim == 4}
    for name, array in kernels.items():
        fan_in = array[0].size
        assert array.var() * fan_in == pytest.approx(1, rel=0.1), name
        assert abs(array.mean()) * fan_in**0.5 < 5 / array.size**0.5, name
    for (one, a), (other, b) in itertools.combinations(kernels.items(), 2):
        assert a.shape != b.shape or not np.array_equal(a, b), (one, other)


def test_statistics_have_12_bits(make_card: Callable[..., ModelCard]) -> None:
    for name, array in synthetic_weights(make_card()).items():
        if name.endswith(("running_mean", "running_var")):
            mantissa = np.frexp(array.astype(np.float64))[0] * 4096
            np.testing.assert_array_equal(mantissa, np.round(mantissa), err_msg=name)


def normalised(card: ModelCard, images: NDArray[np.uint8]) -> Tensor:
    x = torch.from_numpy(images.copy()).double() / 255
    return ((x - torch.tensor(card.input.mean)) / torch.tensor(card.input.std)).permute(0, 3, 1, 2).float()


def observe(
    card: ModelCard,
    weights: Weights,
    images: NDArray[np.uint8],
    see: Callable[[str, nn.BatchNorm2d, Tensor, Tensor], None],
) -> Tensor:
    """Logits of `images`; `see` is shown every batch-norm's input and output."""
    module = ResNeXt(card)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    for name, child in module.eval().named_modules():
        if isinstance(child, nn.BatchNorm2d):

            def hook(norm: Any, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
                see(name, norm, inputs[0], output)

            child.register_forward_hook(hook)
    with torch.inference_mode():
        return module(normalised(card, images))


BIG = [
    "digits_resnext14_8x8d",
    "gluon_resnext50_32x4d",
    pytest.param("gluon_resnext101_64x4d", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=BIG)
def big(request: pytest.FixtureRequest) -> tuple[ModelCard, Weights]:
    card = find_card(request.param)
    return card, synthetic_weights(card)


def test_statistics_are_those_of_the_images_they_come_from(big: tuple[ModelCard, Weights]) -> None:
    card, weights = big
    layers = 0

    def see(name: str, norm: nn.BatchNorm2d, x: Tensor, _output: Tensor) -> None:
        nonlocal layers
        layers += 1
        assert norm.running_mean is not None and norm.running_var is not None
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        # 12 bits of mantissa are 1.2e-4 or better; the module adds up in float32. A channel that hardly varies on
        # these images keeps a larger variance than measured.
        varies = var > 2e-3 * var.mean()
        error = (norm.running_var / var - 1).abs()
        assert error[varies].max() < 1e-3, name
        assert varies.double().mean() > 0.9, name
        assert ((norm.running_mean - mean).abs() / var.mean().sqrt()).max() < 5e-3, name

    observe(card, weights, np.concatenate([photographs(card), noise(card, 2)]), see)
    assert layers == sum(name.endswith("running_var") for name in weights)


def test_activations_stay_well_scaled_on_other_images(big: tuple[ModelCard, Weights]) -> None:
    card, weights = big
    mirrored = photographs(card)[:, :, ::-1]
    images = np.concatenate([mirrored, noise(card, 2, seed=99)])

    def see(name: str, _norm: nn.BatchNorm2d, _x: Tensor, output: Tensor) -> None:
        assert 0.2 < output.std() < 3, name
        # Channels differ: no two of the first few go along.
        few = np.corrcoef(output[:, :8].transpose(0, 1).flatten(1).numpy())
        assert (few - np.eye(8)).max() < 0.999, name

    logits = observe(card, weights, images, see).numpy()
    assert 1 < logits.std() < 6
    between = np.corrcoef(logits)
    assert (between - np.eye(len(images))).max() < 0.99
    assert len(set(logits.argmax(1))) > 1


def test_a_channel_that_hardly_varies_is_not_blown_up(make_card: Callable[..., ModelCard]) -> None:
    """With six pixels and a channel a group, a channel can be (almost) constant on the images looked at."""
    card = make_card(image_size=32, layers=[1] * 8, channels=[16] * 8, cardinality=16, base_width=4)
    for seed in range(20):
        for name, array in synthetic_weights(card, seed).items():
            # The floor is 1e-3 of the layer's mean, which the floor itself raises by 1e-3 at most.
            assert not name.endswith("running_var") or array.min() > 0.99e-3 * array.mean(), (seed, name)


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        # The last stages see a single pixel of six images, so their statistics are poor.
        ({"image_size": 32, "layers": [1] * 8, "channels": [16] * 8}, 20),
        ({"num_classes": 1}, 5),
        ({"cardinality": 1, "base_width": 4, "channels": [16, 16, 16]}, 5),  # one channel wide
        ({"mean": [0, 0, 0], "std": [0.004, 0.004, 0.004]}, 5),  # bytes as they are, as some training scripts have it
    ],
)
def test_odd_cards(changes: dict[str, Any], largest: float, make_card: Callable[..., ModelCard]) -> None:
    card = make_card(**changes)
    weights = synthetic_weights(card)
    assert {name: array.shape for name, array in weights.items()} == {
        name: tuple(tensor.shape)
        for name, tensor in ResNeXt(card).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for name, array in weights.items():
        assert array.dtype == np.float32 and np.isfinite(array).all(), name
        assert not name.endswith("running_var") or (array > 0).all(), name
    images = np.concatenate([photographs(card)[:, :, ::-1], noise(card, 2, seed=99)])

    def see(name: str, _norm: nn.BatchNorm2d, _x: Tensor, output: Tensor) -> None:
        assert 0.1 < output.std() < largest, name

    logits = observe(card, weights, images, see)
    assert torch.isfinite(logits).all() and 0.5 < logits.std() < 4 * largest
