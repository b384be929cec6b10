"""Small real bundles for the runtime's tests: the trained digits model, built by the pipeline, once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rxdeploy.cards import find_card

DIGITS = "digits_resnext14_8x8d"


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a bundle of the digits model: ``digits_bundle(precision, input_kind, placement)``.

    `placement` is whose Q/DQ nodes an int8 model has. Not to be altered.
    """
    for module in ("torch", "onnx_ir", "safetensors", "filelock", "onnxruntime"):
        pytest.importorskip(module, reason=f"building a bundle needs {module}")
    from rxdeploy.cache import Cache
    from rxdeploy.pipeline import Pipeline, Request

    root = tmp_path_factory.mktemp("bundles")
    built: dict[tuple[str, str, str | None], Path] = {}

    def build(precision: str = "fp16", input_kind: str = "uint8", placement: str | None = None) -> Path:
        key = precision, input_kind, placement
        if key not in built:
            options = _calibration(root / "digits") if precision == "int8" else {}
            request = Request(
                find_card(DIGITS), precision, input_kind, target="onnxruntime", placement=placement, **options
            )  # type: ignore[arg-type]
            cache = Cache(root / "cache", limit=10**9)
            built[key] = Pipeline(request, cache).build(root / "-".join(map(str, key))).path
            cache.close()
        return built[key]

    return build


def _calibration(folder: Path) -> dict[str, Any]:
    """What int8 needs besides: some images, and the quickest way to ranges."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    from rxdeploy.calibration.options import CalibrationOptions
    from rxdeploy.cards.digits_images import write_held_out

    if not folder.exists():
        folder.mkdir()
        write_held_out(folder, 64)
    return {"calibration": CalibrationOptions(data=folder, images=48, method="minmax")}
