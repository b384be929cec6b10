"""Graph pass: grouped convolutions as ones of fewer, wider groups, with zeros between what was apart.

It computes the same with more multiply-adds. ONNX Runtime multiplies one small matrix a group, and a matrix of 4
columns fills neither its vector registers nor its dot products: ResNeXt-50 in int8 takes 1.4 times as long without
(batch 8, AVX-512 VNNI; with groups of 16 channels 1.08 times, of 64 1.02 times: benchmarks/placement_cpu.py).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

CHANNELS = 32
GROUPS = "rxdeploy.groups"  # in a node's metadata: the groups of the model itself


def merge_groups(model: ir.Model, channels: int = CHANNELS, keep: Collection[str] = ()) -> ir.Model:
    """A copy of `model` whose grouped convolutions have up to `channels` input channels a group.

    A weight (out, in / groups, height, width) becomes (out, in / fewer groups, height, width). Convolutions in `keep`
    stay as they are. A node's metadata say how many groups it had, since the zeros are no part of the model.
    """
    model = model.clone()
    for node in model.graph:
        if node.op_type != "Conv" or "group" not in node.attributes or node.name in keep:
            continue
        groups, weight = node.attributes["group"].as_int(), node.inputs[1]
        assert weight is not None and weight.const_value is not None, f"{node.name} has no constant weight"
        array = weight.const_value.numpy()
        together = _together(groups, array.shape[1], channels)
        if together > 1 and array.shape[1] > 1:  # depthwise ones have a kernel of their own
            wide = _merged(array, groups, together)
            weight.const_value = ir.tensor(wide, name=weight.name)
            weight.shape = ir.Shape(wide.shape)
            node.attributes["group"] = ir.AttrInt64("group", groups // together)
            node.metadata_props[GROUPS] = str(groups)
    return model


def _together(groups: int, width: int, channels: int) -> int:
    """How many groups of `width` input channels to make one of: a divisor of `groups`."""
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * width <= channels))


def _merged(weight: NDArray, groups: int, together: int) -> NDArray:
    """Block-diagonal: each output channel reads its own old group's inputs, of the new group's, and zeros."""
    out, width = weight.shape[:2]
    wide = np.zeros((out, together, *weight.shape[1:]), weight.dtype)
    place = np.arange(out) // (out // groups) % together
    wide[np.arange(out), place] = weight
    return wide.reshape(out, together * width, *weight.shape[2:])
