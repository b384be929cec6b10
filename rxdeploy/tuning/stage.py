"""What a bundle is tuned with: measured where it can be, by rule where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec
import onnx_ir as ir

from rxdeploy.bench.machine import cores
from rxdeploy.cache import Cache, recipe_digest
from rxdeploy.calibration.options import SchemeName
from rxdeploy.engines.bundle import Manifest, Precision, Tuning
from rxdeploy.export.architecture import ResNeXt
from rxdeploy.export.passes.groups import Grouped
from rxdeploy.tuning.device import Device
from rxdeploy.tuning.rules import Rule, rule
from rxdeploy.tuning.search import search
from rxdeploy.tuning.variant import uniform

Progress = Callable[[str, float | None], None]


def by_rule(
    network: ResNeXt, scheme: SchemeName, precision: Precision, channels: int | None, keep: Collection[str] = ()
) -> Tuning:
    """Without measuring: the rule's groups, or `channels` in each (0: the model's own).

    Layers in `keep`, which an int8 model computes in floating point, stay as they are.
    """
    found = rule(scheme, precision) if channels is None else Rule(channels, "as asked for")
    layers = {conv.name: Grouped.of(conv.groups, conv.in_channels) for conv in network.convs() if conv.groups > 1}
    layers = {name: own for name, own in layers.items() if own.width > 1 and name not in keep}  # nor depthwise ones
    return Tuning(
        tuned=False,
        device="any",
        cores=None,
        versions={},
        batch=(),
        groups=uniform(layers, found.channels) if found.channels else {},
        passes=(),
        cpu=None,
        report={"rule": found.why},
    )


def by_measuring(
    model: Callable[[], ir.Model],
    device: Device,
    sizes: tuple[int, ...],
    manifest: Manifest,
    code: str,
    cache: Cache,
    progress: Progress,
) -> tuple[Tuning, bool]:
    """The fastest of the graphs that compute what `model` does, and whether that was known already.

    It is found once for a device, versions, precision and shape; weights make no difference to a speed.
    """
    key = recipe_digest(
        card=manifest.card.sha256,
        precision=manifest.precision,
        inputs=msgspec.to_builtins(manifest.inputs),
        integers=manifest.for_integers,
        keep=(manifest.quantisation or {}).get("keep"),
        weight_bits=(manifest.quantisation or {}).get("weight_bits"),
        batch=sizes,
        device=device.facts(),
        code=code,
    )

    def produce(folder: Any) -> dict[str, Any]:
        found = search(model(), device, sizes, lambda text: progress(text, None))
        on_cpu = found.settings is not None
        tuning = Tuning(
            tuned=True,
            device=device.name,
            cores=cores() if on_cpu else None,
            versions=device.facts()["versions"],
            batch=sizes,
            groups=dict(found.variant.groups),
            passes=found.variant.passes,
            cpu=found.settings,
            report=found.report,
        )
        return msgspec.to_builtins(tuning)

    entry = cache.stage("tuning", key, produce)
    return msgspec.convert(entry.facts, Tuning), entry.reused
