"""The digits model, which has four grouped convolutions of 8, 16, 32 and 64 channels a group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rxdeploy.cards import find_card

for _name in ("torch", "onnx_ir", "onnxruntime", "safetensors", "filelock"):
    pytest.importorskip(_name, reason="these tests need rxdeploy[build] and ONNX Runtime")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Its card and weights."""
    from rxdeploy.export.weights import load_weights, resolve_weights

    card = find_card("digits_resnext14_8x8d")
    source = resolve_weights(card, None, tmp_path_factory.mktemp("weights"))
    return SimpleNamespace(card=card, weights=load_weights(card, source))
