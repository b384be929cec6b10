"""How near the tensors of a float16 model come to float16's end, and which go beyond it.

A GPU's kernel that stores such a tensor makes infinity of it, and of that NaN, of which a ReLU may make zero: the
logits can be finite all the same, and wrong. So every tensor is looked at, not only the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT16_MAX = 65504.0
OVERFLOW = 65520.0  # from here on rounding to nearest gives infinity
_PREFIX = "rxdeploy.largest."
_NEAREST = 5  # tensors that the figures name


def add_largest(rounding: ir.Model) -> dict[str, str]:
    """Give a model that `round_everywhere` made an output for each tensor: its largest magnitude before it is rounded.

    Returns {output: tensor}, in the order of computation. Of a run, the first tensor beyond `OVERFLOW` is exact; what
    is computed of it may be anything.
    """
    import onnx_ir as ir  # here, as `describe` is for people who look at a bundle and build none

    graph, outputs = rounding.graph, {}
    casts = [node for node in graph if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16]
    for number, cast in enumerate(casts):
        exact = cast.inputs[0]
        assert exact is not None and exact.name is not None
        magnitude = ir.node("Abs", [exact], name=f"{_PREFIX}{number}.abs")
        largest = ir.node("ReduceMax", magnitude.outputs, attributes={"keepdims": 0}, name=f"{_PREFIX}{number}")
        output = largest.outputs[0]
        output.name, output.type, output.shape = f"{_PREFIX}{number}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.insert_after(cast, [magnitude, largest])
        graph.outputs.append(output)
        outputs[output.name] = exact.name.removesuffix(".exact").removesuffix(".half")
    return outputs


def headroom(largest: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Figures of {tensor: its largest magnitude}, for the manifest.

    ``overflowed`` are the tensors that float16 cannot hold, first to last; ``nearest`` those that come nearest to its
    end, and ``headroom`` is 65504 over the largest of all. What is not finite is None.
    """
    values = {name: float(value) if np.isfinite(value) else None for name, value in largest.items()}
    ranked = sorted(((value, name) for name, value in values.items() if value), reverse=True)
    return {
        "limit": FLOAT16_MAX,
        "tensors": len(values),
        "headroom": FLOAT16_MAX / ranked[0][0] if ranked else None,
        "nearest": [{"tensor": name, "largest": value} for value, name in ranked[:_NEAREST]],
        "overflowed": [
            {"tensor": name, "largest": value} for name, value in values.items() if value is None or value >= OVERFLOW
        ],
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures of `headroom` in half a sentence."""
    if overflowed := figures["overflowed"]:
        reaches = "what is no number" if overflowed[0]["largest"] is None else f"{overflowed[0]['largest']:g}"
        return f"{overflowed[0]['tensor']} overflows: it reaches {reaches}, float16 ends at {figures['limit']:g}"
    if not figures["nearest"]:
        return "every tensor is zero"
    tensor, largest = figures["nearest"][0]["tensor"], figures["nearest"][0]["largest"]
    return f"float16 ends {figures['headroom']:.3g} times beyond the largest magnitude, {largest:.4g} in {tensor}"
