"""The trained digits model, its network and its images: real activations in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.runtime.preprocess import transform

for _name in ("torch", "onnx_ir", "onnxruntime", "safetensors", "filelock", "sklearn"):
    pytest.importorskip(_name, reason="these tests need rxdeploy[build], ONNX Runtime and scikit-learn")


class DigitsModel(NamedTuple):
    """The card with its weights, and images as the model takes them."""

    card: ModelCard
    weights: dict[str, NDArray[np.float32]]
    train: NDArray[np.uint8]  # (160, 64, 64, 3)
    held_out: NDArray[np.uint8]  # (48, 64, 64, 3)
    labels: NDArray[np.int64]  # of those held out


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitsModel:
    """The digits model."""
    from rxdeploy.cards.digits_images import split
    from rxdeploy.export.weights import load_weights, resolve_weights

    card = find_card("digits_resnext14_8x8d")
    source = resolve_weights(card, None, tmp_path_factory.mktemp("weights"))
    train, held_out = split()

    def transformed(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        inputs = card.input
        arguments = inputs.image_size, inputs.crop_pct, inputs.interpolation
        return np.stack([transform(Image.fromarray(image), *arguments) for image in images])

    return DigitsModel(
        card,
        load_weights(card, source),
        transformed(train.images[:160]),
        transformed(held_out.images[:48]),
        held_out.labels[:48],
    )


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out digits as files, 12 of each class, in class folders."""
    from rxdeploy.cards.digits_images import split

    root = tmp_path_factory.mktemp("digits")
    _, held_out = split()
    for label in range(10):
        folder = root / str(label)
        folder.mkdir()
        for index in np.flatnonzero(held_out.labels == label)[:12]:
            Image.fromarray(held_out.images[index][..., 0]).save(folder / f"{index}.png")
    return root
