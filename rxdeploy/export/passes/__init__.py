"""Graph passes that an engine may gain by: each a function `model -> model`, in its own file.

PASSES are those that measurement may choose, in the order of application; after them, groups.py packs layer by layer.
docs/passes.md has what was measured, of passes that were given up too.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from rxdeploy.export.passes.stem import space_to_depth

PASSES: dict[str, Callable[[ir.Model], ir.Model]] = {"space_to_depth": space_to_depth}
