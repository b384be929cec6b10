"""Graph pass: grouped convolutions as ones of fewer, wider groups, with zeros between what was apart; and back.

It computes the same with more multiply-adds. An engine multiplies one small matrix a group, and a matrix of 4 columns
fills neither vector registers nor dot products. How wide is best differs between engines, precisions and layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rxdeploy.errors import InputError
from rxdeploy.export.passes import weights

GROUPS = "rxdeploy.groups"  # in the metadata of a packed node: the groups of the model itself
WIDTHS = (8, 16, 32, 64)  # channels a group worth a try: a vector register holds 4 to 64 numbers


@dataclass(frozen=True)
class Grouped:
    """A grouped convolution as the model itself has it, packed or not."""

    groups: int
    width: int  # input channels a group
    channels: int  # input channels
    widths: tuple[int, ...]  # what packing can give: its own width, those of WIDTHS, and all channels (dense)

    @classmethod
    def of(cls, groups: int, channels: int) -> Grouped:
        """A convolution of `channels` input channels in `groups` groups."""
        width = channels // groups
        wider = {each for each in (*WIDTHS, channels) if each > width and each % width == 0 and channels % each == 0}
        return cls(groups, width, channels, (width, *sorted(wider)))


def grouped(model: ir.Model) -> dict[str, Grouped]:
    """The grouped convolutions of `model` by node name, in the order of the graph."""
    return {node.name or "": _own(node) for node in model.graph if _is_grouped(node)}


def pack(model: ir.Model, channels: int | Mapping[str, int]) -> ir.Model:
    """A copy of `model` whose grouped convolutions have up to `channels` input channels a group.

    `channels` holds for all of them, or is given by node name, and then those not named stay as they are. As many
    groups as fit and divide their number become one: none below twice a layer's own width, all of them, with which the
    convolution is dense, from the number of its input channels on. A number for all leaves depthwise convolutions
    (one input channel a group) alone, which have kernels of their own. What was packed before is unpacked first.

    A weight (out, in / groups, height, width) becomes (out, in / fewer groups, height, width), in whatever type it is
    stored: float32, float16, or integers behind a DequantizeLinear, whose scales (a tensor's or an output channel's)
    stay. A packed node's metadata say how many groups the model itself has, since the zeros are no part of it.

    InputError for a name that is no grouped convolution's, or fewer than one channel; CheckFailed for a weight that is
    no constant of its convolution alone or has a scale an input channel.
    """
    model = model.clone()
    nodes = {node.name or "": node for node in model.graph if _is_grouped(node)}
    if isinstance(channels, int):
        channels = {name: channels if _own(node).width > 1 else 1 for name, node in nodes.items()}
    if unknown := sorted(set(channels) - set(nodes)):
        raise InputError(f"to be packed: the model has no grouped convolution {', '.join(unknown)}")
    for name, width in channels.items():
        if width < 1:
            raise InputError(f"to be packed: {name} cannot have {width} channels a group; 1 is the least")
        _set_width(nodes[name], width)
    return model


def unpack(model: ir.Model) -> ir.Model:
    """A copy of `model` with its own groups, the weights those that were packed, bit for bit."""
    return pack(model, {name: own.width for name, own in grouped(model).items()})


def _is_grouped(node: ir.Node) -> bool:
    return node.op_type == "Conv" and (_groups(node) > 1 or GROUPS in node.metadata_props)


def _groups(node: ir.Node) -> int:
    """The groups that the node has now."""
    attribute = node.attributes.get("group")
    return attribute.as_int() if attribute else 1


def _own(node: ir.Node) -> Grouped:
    channels = weights.shape(node)[1] * _groups(node)
    return Grouped.of(int(node.metadata_props.get(GROUPS, _groups(node))), channels)


def _set_width(node: ir.Node, channels: int) -> None:
    """Let `node` have up to `channels` input channels a group, whatever it has now."""
    own, now = _own(node), _groups(node)
    left = own.groups // _together(own.groups, own.width, channels)
    if left == now:
        return
    array, zero = weights.stored(node)
    weights.store(node, _joined(_split(array, own.groups, now), own.groups, left, zero))
    node.attributes["group"] = ir.AttrInt64("group", left)
    if left == own.groups:
        del node.metadata_props[GROUPS]
    else:
        node.metadata_props[GROUPS] = str(own.groups)


def _together(groups: int, width: int, channels: int) -> int:
    """How many groups of `width` input channels to make one of: a divisor of `groups`."""
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * width <= channels))


def _joined(weight: NDArray, groups: int, left: int, zero: NDArray) -> NDArray:
    """Block-diagonal: each output channel reads its own old group's inputs, of the new group's, and zeros."""
    out, width = weight.shape[:2]
    together = groups // left
    wide = np.empty((out, together, *weight.shape[1:]), weight.dtype)
    wide[:] = zero.reshape(-1, 1, 1, 1, 1)
    wide[np.arange(out), _place(out, groups, together)] = weight
    return wide.reshape(out, together * width, *weight.shape[2:])


def _split(weight: NDArray, groups: int, now: int) -> NDArray:
    """The blocks of a weight that was packed from `groups` groups into `now`."""
    out, together = len(weight), groups // now
    apart = weight.reshape(out, together, -1, *weight.shape[2:])
    return apart[np.arange(out), _place(out, groups, together)]


def _place(out: int, groups: int, together: int) -> NDArray[np.intp]:
    """For each output channel, which of the old groups in its new one is its own."""
    return np.arange(out) // (out // groups) % together
