"""The images that validation and synthetic weights look at: real photographs and noise, always the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard
from rxdeploy.runtime.preprocess import open_rgb, transform

PHOTOS = Path(__file__).parent / "photos"


def photographs(card: ModelCard) -> NDArray[np.uint8]:
    """The photographs in photos/ through the card's evaluation transform.

    uint8 (photographs, image_size, image_size, 3), RGB.
    """
    inputs = card.input
    return np.stack(
        [
            transform(open_rgb(path), inputs.image_size, inputs.crop_pct, inputs.interpolation)
            for path in sorted(PHOTOS.glob("*.jpg"))
        ]
    )


def noise(card: ModelCard, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Uniform noise, uint8 (count, image_size, image_size, 3)."""
    shape = (count, card.input.image_size, card.input.image_size, 3)
    size = math.prod(shape)
    # The bit generator's stream is guaranteed by NumPy; its distributions' are not.
    return np.random.PCG64(seed).random_raw(-(-size // 8)).view(np.uint8)[:size].reshape(shape)
