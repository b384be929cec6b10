"""Compiles the Gluon ResNeXt classifiers to validated ONNX models and TensorRT engines, and runs them.

PYTEST_DONT_REWRITE, which pytest looks for: our own asserts are no tests, and may be imported before its plugins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rxdeploy.runtime import Session, load

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load`, `Session` and `runtime`, imported when first asked for: NumPy and Pillow would slow down `--help`."""
    if name in ("Session", "load"):
        return getattr(importlib.import_module("rxdeploy.runtime"), name)
    if name == "runtime":
        return importlib.import_module("rxdeploy.runtime")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
