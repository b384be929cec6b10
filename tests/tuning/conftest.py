"""What these tests need."""

from __future__ import annotations

import pytest

for _name in ("torch", "onnx_ir", "onnxruntime", "safetensors", "filelock"):
    pytest.importorskip(_name, reason="these tests need rxdeploy[build] and ONNX Runtime")
