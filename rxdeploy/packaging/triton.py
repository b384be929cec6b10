"""A bundle as a model of a Triton Inference Server's model repository.

    REPOSITORY/NAME/config.pbtxt, labels.txt, 1/model.plan or 1/model.onnx

The fields are those of ModelConfig in triton-inference-server/common, protobuf/model_config.proto; what the backends
take is from the READMEs of triton-inference-server/tensorrt_backend and onnxruntime_backend.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rxdeploy import atomic
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, Manifest
from rxdeploy.errors import InputError, from_os_error

Backend = Literal["tensorrt", "onnxruntime"]

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
_FILES: dict[Backend, tuple[str, str]] = {  # in the bundle, and as Triton's backend wants it named
    "tensorrt": (bundles.PLAN, "model.plan"),
    "onnxruntime": (bundles.MODEL, "model.onnx"),
}
_CONFIG = "config.pbtxt"
_MOST_WITHOUT_PLAN = 32  # images at once on ONNX Runtime, whose model takes any number


@dataclass(frozen=True)
class Packaged:
    """Where the model is, what runs it there, and why not something else."""

    path: Path
    backend: Backend
    reason: str


def package(
    bundle: Bundle,
    repository: Path,
    name: str | None = None,
    backend: Literal["auto", "tensorrt", "onnxruntime"] = "auto",
    max_batch: int | None = None,
    max_delay_ms: float = 2.0,
    overwrite: bool = False,
) -> Packaged:
    """Write `bundle` to ``repository/name``; other models there stay as they are.

    `max_batch` images at most are put together, after `max_delay_ms` at most. InputError for a name that Triton does
    not take, a bundle that a backend cannot run, a batch that the plan does not take, or a model of that name that is
    there already (with `overwrite` it is replaced, if it looks like one of Triton's).
    """
    manifest = bundle.manifest
    name = name or manifest.model
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
        raise InputError(f"--name {name}: letters, digits, '_', '-' and '.', not beginning with '-' or '.'")
    if max_batch is not None and max_batch < 1:
        raise InputError(f"--max-batch {max_batch}: must be at least 1")
    chosen, reason = _backend(manifest, backend)
    try:
        most = _most(manifest, chosen, max_batch)
    except (LookupError, TypeError, ValueError) as error:
        raise bundles.strange_manifest(bundle.path, error) from None
    if not 0 <= max_delay_ms <= 10_000:
        raise InputError(f"--max-delay-ms {max_delay_ms:g}: must be 0 to 10000")
    target = repository / name
    _check_target(target, overwrite)
    labels = bundle.labels()
    try:
        config = _config(manifest, name, chosen, most, max_delay_ms, labelled=labels is not None)
    except (LookupError, TypeError, ValueError) as error:
        raise bundles.strange_manifest(bundle.path, error) from None
    source, file = _FILES[chosen]
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with atomic.new_folder(target) as folder:
            (folder / "1").mkdir()
            (folder / "1" / file).write_bytes(bundle.read(source))
            if labels is not None:
                (folder / bundles.LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
            (folder / _CONFIG).write_text(config, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, f"output {target}") from None
    return Packaged(target, chosen, reason)


def _backend(manifest: Manifest, wanted: str) -> tuple[Backend, str]:
    """Which backend, and why."""
    if manifest.engine is None:
        problem = "the bundle has no plan"
    elif manifest.target.name != "tensorrt":
        problem = f"Triton's tensorrt backend runs no {manifest.target.name} plan"
    elif manifest.engine.get("strip_plan"):
        problem = "the plan has no weights"
    else:
        problem = None
    if wanted == "tensorrt" or (wanted == "auto" and problem is None):
        if problem:
            raise InputError(
                f"--backend tensorrt: {problem}; build with --target tensorrt, or use --backend onnxruntime"
            )
        return "tensorrt", f"a plan of TensorRT {manifest.target.version} for {manifest.target.gpu or 'any GPU'}"
    return "onnxruntime", problem or "asked for"


def _most(manifest: Manifest, backend: Backend, wanted: int | None) -> int:
    """Triton's max_batch_size."""
    if backend == "onnxruntime":
        return wanted or _MOST_WITHOUT_PLAN
    assert manifest.engine is not None
    ranges = sorted((profile["min"], profile["max"]) for profile in manifest.engine["profiles"])
    least = ranges[0][0]
    most: int = max(end for _, end in ranges)
    if least > 1:
        raise InputError(
            f"the plan takes batches of {least} and more, and Triton sends single images too; build it with --batch 1,"
            f"OPT,{most}, or use --backend onnxruntime"
        )
    if wanted and wanted > most:
        raise InputError(f"--max-batch {wanted}: the plan takes up to {most}")
    # Triton pads no batch: a size that no profile takes would fail when it comes.
    covered = 0
    for begin, end in ranges:
        if begin <= covered + 1:
            covered = max(covered, end)
    if covered < (wanted or most):
        raise InputError(
            f"the plan takes no batch of {covered + 1}, and Triton sends any size; pass --max-batch {covered}, build "
            "it with profiles that leave none out, or use --backend onnxruntime"
        )
    return wanted or most


def _check_target(target: Path, overwrite: bool) -> None:
    bundles.check_outside(target)
    if not (target.exists() or target.is_symlink()):
        return
    if target.is_symlink() or not (target / _CONFIG).is_file():
        raise InputError(f"output {target}: exists and is no model of Triton's; choose another with -o or --name")
    if not overwrite:
        raise InputError(f"output {target}: exists; choose another with --name, or pass --overwrite")


def _config(manifest: Manifest, name: str, backend: Backend, most: int, max_delay_ms: float, labelled: bool) -> str:
    (image,), (logits,) = manifest.inputs, manifest.outputs
    lines = [
        *_about(manifest, backend),
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend)}",
        f"max_batch_size: {most}",
        f"input [ {{ {_tensor(image)} }} ]",
        f"output [ {{ {_tensor(logits)}{' label_filename: ' + json.dumps(bundles.LABELS) if labelled else ''} }} ]",
        f"dynamic_batching {{ {_batching(manifest, backend, most, max_delay_ms)} }}",
        f"instance_group [ {{ count: 1 {_instances(manifest, backend)} }} ]",
    ]
    if backend == "tensorrt":
        lines.append("optimization { cuda { graphs: true } }")
    return "\n".join(lines) + "\n"


def _about(manifest: Manifest, backend: Backend) -> list[str]:
    inputs = manifest.preprocessing
    flagged = backend == "tensorrt" and (manifest.engine or {}).get("version_compatible")
    return [
        f"# {_one_line(manifest.model)}, {manifest.precision}, by rxdeploy "
        f"{_one_line(manifest.tools.get('rxdeploy', 'of unknown version'))}; bundle {manifest.digest}",
        f"# What clients send: RGB, the shorter side resized to {int(inputs.image_size / inputs.crop_pct)} "
        f"({inputs.interpolation}, antialiased as Pillow does), the centre {inputs.image_size} x {inputs.image_size}; "
        + (
            "0 to 255, normalised in the model."
            if manifest.normalisation_in_graph
            else f"divided by 255, less {list(inputs.mean)}, divided by {list(inputs.std)}."
        ),
        *(["# Triton loads the plan with --backend-config=tensorrt,version-compatible=true only."] if flagged else []),
    ]


def _one_line(text: str) -> str:
    """Fit for a comment: what a manifest says may not become configuration."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _tensor(tensor: bundles.Tensor) -> str:
    sides = ", ".join(str(side) for side in tensor.shape[1:])
    return f"name: {json.dumps(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: [ {sides} ]"


def _batching(manifest: Manifest, backend: Backend, most: int, max_delay_ms: float) -> str:
    delay = f"max_queue_delay_microseconds: {round(1000 * max_delay_ms)}"
    if backend == "onnxruntime":
        return delay
    assert manifest.engine is not None
    # The scheduler sends a preferred size at once, leaving the rest for later, and gathers none beyond the largest one
    # (GetDynamicBatch in triton-inference-server/core, dynamic_batch_scheduler.cc): so never 1, and always the most.
    best = sorted({most} | {profile["opt"] for profile in manifest.engine["profiles"] if profile["opt"] < most})
    best = [size for size in best if size > 1]
    return f"preferred_batch_size: [ {', '.join(map(str, best))} ] {delay}" if best else delay


def _instances(manifest: Manifest, backend: Backend) -> str:
    if backend == "tensorrt":
        assert manifest.engine is not None
        profiles = ", ".join(f'"{index}"' for index, _ in enumerate(manifest.engine["profiles"]))
        return f"kind: KIND_GPU profile: [ {profiles} ]"
    if manifest.precision == "int8":
        # Placed for TensorRT, Q/DQ means rounding between float kernels, which ONNX Runtime does on a GPU; on a CPU it
        # would make integer kernels of it, and Triton has no way to tell it not to.
        return "kind: KIND_CPU" if manifest.for_integers else "kind: KIND_GPU"
    return "kind: KIND_AUTO"
