"""A stand-in for TensorRT: the runtime half of its Python interface, executed by ONNX Runtime on a simulated GPU.

`tensorrt`, `tensorrt_rtx` and `tensorrt_lean` beside this package are made from it. What they refuse, and how the
flavours differ, follows tensorrt_rtx 1.7.1 and tensorrt 11.4; docs of both say "undefined behaviour" for what is
counted as misuse here.
"""

from __future__ import annotations

from standin.plan import VERSIONS, make_plan

__all__ = ["VERSIONS", "make_plan"]
