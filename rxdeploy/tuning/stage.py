"""What a bundle is tuned with: measured where it can be, by rule where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
import onnx_ir as ir

from rxdeploy.bench.machine import cores
from rxdeploy.cache import Cache, recipe_digest
from rxdeploy.calibration.options import SchemeName
from rxdeploy.engines.bundle import Manifest, Precision, Tuning
from rxdeploy.export.architecture import ResNeXt
from rxdeploy.export.passes.groups import Grouped, grouped
from rxdeploy.tuning.device import Device
from rxdeploy.tuning.rules import Rule, rule
from rxdeploy.tuning.search import search
from rxdeploy.tuning.variant import Variant, uniform

Progress = Callable[[str, float | None], None]


def by_rule(
    network: ResNeXt, scheme: SchemeName, precision: Precision, channels: int | None, keep: Collection[str] = ()
) -> Tuning:
    """Without measuring: the rule's groups, or `channels` in each (0: the model's own).

    Layers in `keep`, which an int8 model computes in floating point, stay as they are.
    """
    found = rule(scheme, precision) if channels is None else Rule(channels, "as asked for")
    layers = {conv.name: Grouped.of(conv.groups, conv.in_channels) for conv in network.convs() if conv.groups > 1}
    return Tuning(
        tuned=False,
        device="any",
        cores=None,
        versions={},
        batch=(),
        groups=_packed(layers, found.channels, keep),
        passes=(),
        cpu=None,
        report={"rule": found.why},
    )


def _packed(layers: Mapping[str, Grouped], channels: int, keep: Collection[str]) -> dict[str, int]:
    """Depthwise layers stay as they are too."""
    return uniform({name: own for name, own in layers.items() if own.width > 1 and name not in keep}, channels)


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

    It is found once for a device, versions, precision and shape; weights make no difference to a speed. What it gains
    is told, and has to be more than nothing, over what the rule would have given.
    """
    quantisation = manifest.quantisation or {}
    keep = quantisation.get("keep", ())
    scheme: SchemeName = "onnxruntime" if manifest.target.name == "onnxruntime" else "tensorrt"
    scheme = quantisation.get("scheme", scheme)
    key = recipe_digest(
        card=manifest.card.sha256,
        precision=manifest.precision,
        inputs=msgspec.to_builtins(manifest.inputs),
        passes=manifest.tuning.passes if manifest.tuning else (),  # that the model has already
        keep=keep,
        scheme=scheme,
        weight_bits=quantisation.get("weight_bits"),
        batch=sizes,
        device=device.facts(),
        code=code,
    )

    def produce(folder: Any) -> dict[str, Any]:
        base = model()
        untuned = Variant(_packed(grouped(base), rule(scheme, manifest.precision).channels, keep))
        found = search(base, device, sizes, lambda text: progress(text, None), untuned)
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
