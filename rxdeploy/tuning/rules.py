"""What is done without measuring: for plans that are built ahead for another GPU, and builds without --tune."""

from __future__ import annotations

from dataclasses import dataclass

from rxdeploy.calibration.options import SchemeName
from rxdeploy.engines.bundle import Precision


@dataclass(frozen=True)
class Rule:
    """Channels a group (0: as the model has them), and why."""

    channels: int
    why: str


_TILES = "the narrowest group that fills a tensor core's tile ({}); by arithmetic, not measured (docs/grouped.md)"
_RULES: dict[tuple[SchemeName, Precision], Rule] = {
    ("tensorrt", "fp32"): Rule(0, "float32 has no tensor cores without TF32, which is off"),
    ("tensorrt", "fp16"): Rule(16, _TILES.format("m16n8k16")),
    ("tensorrt", "int8"): Rule(32, _TILES.format("m16n8k32")),
    ("onnxruntime", "fp32"): Rule(0, "float kernels differ by a few per cent either way (docs/passes.md)"),
    ("onnxruntime", "fp16"): Rule(0, "computed in float32 on most CPUs"),
    ("onnxruntime", "int8"): Rule(
        32, "a matrix product a group, which is 1.4 times as slow at 4 channels (docs/int8.md)"
    ),
}


def rule(scheme: SchemeName, precision: Precision) -> Rule:
    """The rule for an engine of that kind."""
    return _RULES[scheme, precision]
