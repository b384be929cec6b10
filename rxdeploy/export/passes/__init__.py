"""Graph passes that an engine may gain by: each a function `model -> model`, in its own file."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

PASSES: dict[str, Callable[[ir.Model], ir.Model]] = {}
