"""The C library, driven through ctypes: its C ABI against NumPy, Pillow and the Python runtime.

`make cpp-test` builds it and runs these; without a build they are skipped. RXDEPLOY_CPP_LIBRARY names another one.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.cards import find_card

sys.path.insert(0, str(Path(__file__).parent))  # the tests here share a module, which pytest would not find
from rxdeploy_c import Library

ROOT = Path(__file__).parents[2]
DIGITS = "digits_resnext14_8x8d"


@pytest.fixture(scope="session")
def library() -> Library:
    """The library that was built."""
    path = Path(os.environ.get("RXDEPLOY_CPP_LIBRARY") or ROOT / "cpp/build/release/librxdeploy.so")
    if not path.exists():
        pytest.skip("the C library is not built; `make cpp-test` builds it")
    return Library(path)


@pytest.fixture(scope="session")
def onnxruntime_library() -> bytes:
    """The path of the libonnxruntime that the Python package brings."""
    spec = importlib.util.find_spec("onnxruntime")
    found = glob.glob(f"{Path(spec.origin).parent}/capi/libonnxruntime.so.*") if spec and spec.origin else []
    if not found:
        pytest.skip("the tests of the C library need the onnxruntime wheel with its libonnxruntime.so")
    return os.fsencode(found[0])


@pytest.fixture(scope="session")
def build_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``build_bundle(precision, input_kind, model)``: the folder of a bundle, built once. Not to be altered."""
    for module in ("torch", "onnx_ir", "safetensors", "filelock", "onnxruntime"):
        pytest.importorskip(module, reason=f"building a bundle needs {module}")
    from rxdeploy.cache import Cache
    from rxdeploy.pipeline import Pipeline, Request

    root = tmp_path_factory.mktemp("bundles")
    built: dict[tuple[str, ...], Path] = {}

    def build(precision: str = "fp32", input_kind: str = "uint8", model: str = DIGITS) -> Path:
        key = precision, input_kind, model
        if key not in built:
            weights = {} if model == DIGITS else {"weights": "synthetic"}
            request = Request(find_card(model), precision, input_kind, target="onnxruntime", **weights)  # type: ignore[arg-type]
            cache = Cache(root / "cache", limit=10**9)
            Pipeline(request, cache).build(root / "-".join(key))
            cache.close()
            built[key] = root / "-".join(key)
        return built[key]

    return build
