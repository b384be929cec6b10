"""`rxdeploy tune`: a bundle that was built elsewhere, or by rule, made as fast as it gets on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from rxdeploy.bench.samples import sample_images
from rxdeploy.cache import Cache
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, CpuSettings, Manifest, Tuning
from rxdeploy.engines.flavours import FLAVOURS, Flavour
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import MAX_BATCH, EngineOptions, Profile
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.graph import serialise
from rxdeploy.export.passes import PASSES
from rxdeploy.export.passes.groups import unpack
from rxdeploy.export.validate import LIMITS, deviation, within
from rxdeploy.pipeline import Reporter, code_digest
from rxdeploy.runtime.cpu import ENGINES, EngineName
from rxdeploy.runtime.onnxrt import open_session, run_session
from rxdeploy.tuning import stage
from rxdeploy.tuning.device import CpuDevice, PlanDevice, device_for
from rxdeploy.tuning.options import batches
from rxdeploy.tuning.variant import Variant, apply

_CHECKED_ON = 8  # images
_DEFAULT_BATCHES = (1, 8)


def tune(path: Path, output: Path | None, sizes: Sequence[int] | None, cache: Cache, reporter: Reporter) -> Bundle:
    """Tune the bundle at `path` for this machine and write it to `output`, by default in its place.

    `sizes` are the batch sizes to tune for; without, those that its plan is built for, or 1 and 8. EnvironmentLacks
    without the GPU that a plan is for; CheckFailed when the tuned model does not compute the same; InputError when
    another build took the bundle's place meanwhile, which stays.
    """
    bundle = bundles.open_bundle(path)
    output, manifest = output or path, bundle.manifest
    bundles.check_destination(output, manifest.model, manifest.precision, overwrite=False)
    flavour, options = _engine(manifest)
    chosen = tuple(sorted(set(sizes))) if sizes else batches(options) if flavour else _DEFAULT_BATCHES
    least, most = manifest.inputs[0].batch or (1, MAX_BATCH)
    if not least <= chosen[0] <= chosen[-1] <= most:
        raise InputError(f"--batch {','.join(map(str, chosen))}: the bundle's plan takes {least} to {most}")
    device = device_for(manifest, flavour, options, chosen, cache.folder)
    base = unpack(ir.load(bundle.file(bundles.MODEL)))
    reporter.started("tune")
    tuning, _ = stage.by_measuring(lambda: base, device, chosen, manifest, code_digest(), cache, reporter.progress)
    tuned = serialise(apply(base, Variant(tuning.groups, tuning.passes)))
    _check_unchanged(bundle)
    checked = _check(bundle, tuned, tuning.cpu, device)
    files: dict[str, Path | bytes] = {name: bundle.file(name) for name in manifest.files}
    files[bundles.MODEL] = tuned
    facts = manifest.engine
    if isinstance(device, PlanDevice):
        reporter.progress("building the plan", None)
        plan = device.build(tuned, reporter.progress)
        files[bundles.PLAN], facts = plan.data, plan.facts
    _check_unchanged(bundle)
    return bundles.write_bundle(output, _tuned(manifest, tuning, facts, checked), files, overwrite=False)


def _engine(manifest: Manifest) -> tuple[Flavour | None, EngineOptions]:
    """What the bundle's plan was built with."""
    if manifest.engine is None:
        return None, EngineOptions()
    flavour = next((each for each in FLAVOURS if each.name == manifest.target.name), None)
    if flavour is None:
        raise InputError(f"the bundle has a plan of {manifest.target.name}, which this rxdeploy does not know")
    known = {name: manifest.engine[name] for name in EngineOptions.__dataclass_fields__ if name in manifest.engine}
    profiles = tuple(Profile(**each) for each in known.pop("profiles"))
    capabilities = tuple(known.pop("compute_capabilities", ()))
    return flavour, EngineOptions(profiles=profiles, compute_capabilities=capabilities, **known)


def _check_unchanged(bundle: Bundle) -> None:
    """InputError when there is another bundle now than was opened, unless it was only tuned."""
    if _build(bundles.read_manifest(bundle.path)) != _build(bundle.manifest):
        raise InputError(f"bundle {bundle.path}: it was built again while it was being tuned; tune it again")


def _build(manifest: Manifest) -> Manifest:
    """What tuning leaves of a manifest as it was."""
    files = {name: digest for name, digest in manifest.files.items() if name in (bundles.CALIBRATION, bundles.LABELS)}
    target = msgspec.structs.replace(manifest.target, gpu=None, version=None)
    return msgspec.structs.replace(
        manifest, digest=bundles.UNSEALED, target=target, tuning=None, engine=None, files=files
    )


def _check(
    bundle: Bundle, tuned: bytes, cpu: CpuSettings | None, device: CpuDevice | PlanDevice
) -> dict[EngineName, dict[str, Any]]:
    """How far the tuned model's logits are from the bundle's own; CheckFailed beyond the limits.

    By engine: on ONNX Runtime, as the bundle's own, and on OpenVINO where it is tuned to that.
    """
    manifest = bundle.manifest
    feed = {manifest.inputs[0].name: sample_images(manifest, _CHECKED_ON)}
    before, after = (
        run_session(open_session(model, integers=manifest.for_integers), ["logits"], feed)[0]
        for model in (bundle.file(bundles.MODEL), tuned)
    )
    logits: dict[EngineName, Any] = {"onnxruntime": after}
    if cpu and cpu.engine == "openvino":
        with device.open(tuned, cpu.engine, cpu) as opened:
            logits[cpu.engine] = opened.run(_CHECKED_ON)
    limits = LIMITS[manifest.precision]
    checked = {engine: deviation(each, before, limits.tie) for engine, each in logits.items()}
    for engine, found in checked.items():
        if not within(found, limits):
            raise CheckFailed(
                f"the tuned model does not compute on {ENGINES[engine]} what {bundle.path} does: relative L2 "
                f"{found['relative_l2']:.2g} (limit {limits.relative_l2:g}), {found['flipped']} of {found['images']} "
                "images change class; this is a bug"
            )
    return checked


def _tuned(
    manifest: Manifest, tuning: Tuning, facts: dict[str, Any] | None, checked: Mapping[EngineName, Any]
) -> Manifest:
    before = manifest.tuning.passes if manifest.tuning else ()
    passes = tuple(name for name in PASSES if name in (*before, *tuning.passes))
    tuning = msgspec.structs.replace(
        tuning, passes=passes, report={**tuning.report, "against_the_bundle_before": checked}
    )
    driver = find_driver()
    gpu = driver.gpus[0].name if facts and driver.gpus else manifest.target.gpu
    version = str(facts["version"]) if facts else manifest.target.version
    target = msgspec.structs.replace(manifest.target, gpu=gpu, version=version)
    return msgspec.structs.replace(manifest, tuning=tuning, engine=facts, target=target, files={})
