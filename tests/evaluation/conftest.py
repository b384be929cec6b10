"""Bundles of the digits model, as trained and damaged, and the digits that it has not been trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rxdeploy.cards import find_card
from rxdeploy.cards.digits_images import Digits
from rxdeploy.datasets import Dataset, from_arrays

DIGITS = "digits_resnext14_8x8d"


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
