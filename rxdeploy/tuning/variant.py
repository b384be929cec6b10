"""One of the graphs that compute what a model computes: which passes, and how each grouped convolution is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from rxdeploy.export.passes import PASSES
from rxdeploy.export.passes.groups import Grouped, pack


@dataclass(frozen=True)
class Variant:
    """`groups` has the channels a group of those layers that are packed; `passes` are names of PASSES."""

    groups: Mapping[str, int] = field(default_factory=dict)
    passes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.groups or self.passes)


def apply(model: ir.Model, variant: Variant) -> ir.Model:
    """A copy of `model` as `variant` says; the passes in the order of PASSES."""
    for name, run in PASSES.items():
        if name in variant.passes:
            model = run(model)
    return pack(model, variant.groups)


def uniform(layers: Mapping[str, Grouped], channels: int) -> dict[str, int]:
    """The groups of a Variant in which `layers` have up to `channels` channels a group: those that then differ."""
    found = {
        name: max(width for width in own.widths if width <= max(channels, own.width)) for name, own in layers.items()
    }
    return {name: width for name, width in found.items() if width != layers[name].width}
