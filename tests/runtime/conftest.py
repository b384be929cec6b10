"""Small real bundles for the runtime's tests: the trained digits model, built by the pipeline, once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.cards import find_card

DIGITS = "digits_resnext14_8x8d"


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a bundle of the digits model: ``digits_bundle(precision, input_kind)``. Not to be altered."""
    for module in ("torch", "onnx_ir", "safetensors", "filelock", "onnxruntime"):
        pytest.importorskip(module, reason=f"building a bundle needs {module}")
    from rxdeploy.cache import Cache
    from rxdeploy.pipeline import Pipeline, Request

    root = tmp_path_factory.mktemp("bundles")
    built: dict[tuple[str, str], Path] = {}

    def build(precision: str = "fp16", input_kind: str = "uint8") -> Path:
        key = precision, input_kind
        if key not in built:
            request = Request(find_card(DIGITS), *key, target="onnxruntime")  # type: ignore[arg-type]
            cache = Cache(root / "cache", limit=10**9)
            Pipeline(request, cache).build(root / "-".join(key))
            cache.close()
            built[key] = root / "-".join(key)
        return built[key]

    return build
