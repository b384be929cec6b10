"""The bundle: a directory with the model, the plan and a manifest that vouches for every byte of both.

Reading and writing it needs neither torch nor onnx, since serving hosts do the former.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from rxdeploy import atomic
from rxdeploy.cards import ModelCard
from rxdeploy.cards.card import Accuracy, Figures, Input, Source
from rxdeploy.errors import InputError, from_os_error

SCHEMA: Literal[1] = 1
UNSEALED = "0" * 64
MANIFEST = "manifest.json"
MODEL = "model.onnx"
PLAN = "engine.plan"
LABELS = "labels.txt"
CALIBRATION = "calibration.json"

Precision = Literal["fp32", "fp16", "int8"]
InputKind = Literal["uint8", "float32"]


class _Part(msgspec.Struct, frozen=True):
    """A part of the manifest. Unknown keys are ignored, so that later versions of one schema may add some.

    (Not so in `preprocessing` and in what `card` repeats of the card: those are the card's own strict parts.)
    """


class FileDigest(_Part, forbid_unknown_fields=True, frozen=True):
    sha256: str
    bytes: int


class WeightsOrigin(_Part, kw_only=True, frozen=True):
    """Which weights are inside."""

    kind: Literal["published", "file", "synthetic"]
    source: str  # URL, file name, or synthetic:SEED
    sha256: str | None  # of the weights file; None for synthetic weights
    licence: str | None = None


class CardFacts(_Part, kw_only=True, frozen=True):
    """What the card claims, carried as it was at build time."""

    sha256: str
    description: str
    figures: Figures
    accuracy: Accuracy | None
    source: Source


class Tensor(_Part, kw_only=True, frozen=True):
    """An input or output. In `shape` the batch is null; `batch` has the smallest and largest an engine takes."""

    name: str
    dtype: str
    layout: str
    shape: tuple[int | None, ...]
    batch: tuple[int, int] | None = None


class Counts(_Part, kw_only=True, frozen=True):
    """Counted on the graph, for one image."""

    parameters: int
    multiply_adds: int


class TargetFacts(_Part, kw_only=True, frozen=True):
    """Which engine was chosen and why."""

    name: Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
    version: str | None
    reason: str
    gpu: str | None  # the GPU of the build machine


class CpuSettings(_Part, kw_only=True, frozen=True):
    """How a CPU runs model.onnx."""

    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    threads: int = 0  # that compute a node together; 0: one a core
    sessions: int = 1  # that a batch is split over, each with `threads`
    split_from: int = 0  # OpenVINO: smaller batches are not split, but computed by all of these threads together
    spinning: bool = True  # ONNX Runtime: threads wait for each other busily
    arena: bool = True  # ONNX Runtime: memory is kept from one run to the next
    denormals_as_zero: bool = False


class Tuning(_Part, kw_only=True, frozen=True):
    """Which of the graphs that compute the same model.onnx is, and how it is best run; see docs/tuning.md."""

    tuned: bool  # False: by rule, not by measuring
    device: str  # what it was measured on
    cores: int | None
    versions: dict[str, str]
    batch: tuple[int, ...]
    groups: dict[str, int]  # channels a group of each packed layer
    passes: tuple[str, ...]
    cpu: CpuSettings | None
    report: dict[str, Any]  # what was measured


class Manifest(_Part, kw_only=True, frozen=True):
    """manifest.json; see docs/bundle.md."""

    schema: Literal[1]
    digest: str = UNSEALED  # sha256 of the manifest's own bytes with this value set to 64 zeros
    model: str
    precision: Precision
    target: TargetFacts
    weights: WeightsOrigin
    card: CardFacts
    counts: Counts
    preprocessing: Input
    normalisation_in_graph: bool
    num_classes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    validation: dict[str, Any]
    quantisation: dict[str, Any] | None = None  # int8: how, and the error that it left
    tuning: Tuning | None = None
    engine: dict[str, Any] | None
    tools: dict[str, str]
    command: tuple[str, ...]
    files: dict[str, FileDigest]

    @property
    def for_integers(self) -> bool:
        """Whether ONNX Runtime is to compute between Q/DQ in integers: not what was quantised for TensorRT."""
        return self.quantisation is None or self.quantisation.get("scheme") == "onnxruntime"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files matched their digests when it was opened."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files; KeyError when it has none of that name."""
        if name not in self.manifest.files:
            raise KeyError(name)
        return self.path / name

    def labels(self) -> tuple[str, ...] | None:
        """Class names in the order of the logits, or None."""
        if LABELS not in self.manifest.files:
            return None
        return tuple(self.file(LABELS).read_text(encoding="utf-8").splitlines())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`, without checking the files it lists."""
    try:
        data = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"bundle {path}: not a bundle (there is no {MANIFEST}); `rxdeploy build` makes one") from None
    except OSError as error:
        raise InputError(f"bundle {path}: {MANIFEST} cannot be read: {error.strerror}") from None
    try:
        head = msgspec.json.decode(data)
        if isinstance(head, dict) and type(head.get("schema")) is int and head["schema"] > SCHEMA:
            raise InputError(
                f"bundle {path}: it has schema {head['schema']}, this rxdeploy reads up to {SCHEMA}; "
                "install a newer one"
            )
        manifest = msgspec.convert(head, Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"bundle {path}: {MANIFEST} is damaged: {error}; build the bundle again") from None
    if _seal(data.replace(manifest.digest.encode(), UNSEALED.encode(), 1)) != manifest.digest:
        raise InputError(
            f"bundle {path}: {MANIFEST} was altered: it no longer has its own digest; build the bundle again"
        )
    return manifest


def _seal(unsealed: bytes) -> str:
    return hashlib.sha256(unsealed).hexdigest()


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check every file against its digest before a byte of it is used.

    InputError names the file that is missing, of another size, altered, or no plain file.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        _check_file(path, name, expected)
    if MODEL not in manifest.files:
        raise InputError(f"bundle {path}: {MANIFEST} lists no {MODEL}; build the bundle again")
    return Bundle(path, manifest)


def _check_file(folder: Path, name: str, expected: FileDigest) -> None:
    path = folder / name
    where = f"bundle {folder}: {name}"
    if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name:
        raise InputError(f"bundle {folder}: {MANIFEST} lists a file named {name!r}, which no bundle has")
    if len(name) > 255 or path.is_symlink() or not path.is_file():
        state = "not a plain file" if len(name) <= 255 and os.path.lexists(path) else "missing"
        raise InputError(f"{where[:300]} is {state}; build the bundle again")
    if (size := path.stat().st_size) != expected.bytes:
        raise InputError(f"{where} has {size} bytes, the manifest says {expected.bytes}; build the bundle again")
    if (actual := sha256_of(path)) != expected.sha256:
        raise InputError(
            f"{where} was altered: its sha256 begins {actual[:8]}, the manifest says {expected.sha256[:8]}; "
            "build the bundle again"
        )


def write_bundle(destination: Path, manifest: Manifest, files: dict[str, Path | bytes], overwrite: bool) -> Bundle:
    """Write a bundle beside `destination` and rename it into place; the manifest's `files` are filled in here.

    `files` maps names to contents or to files to copy. See `check_destination` for what may be replaced.
    """
    check_destination(destination, manifest.model, manifest.precision, overwrite)
    with atomic.new_folder(destination) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        digests = {name: FileDigest(sha256_of(folder / name), (folder / name).stat().st_size) for name in sorted(files)}
        manifest = msgspec.structs.replace(manifest, files=digests, digest=UNSEALED)
        manifest = msgspec.structs.replace(manifest, digest=_seal(manifest_json(manifest).encode()))
        (folder / MANIFEST).write_text(manifest_json(manifest), encoding="utf-8")
    return Bundle(destination, manifest)


def manifest_json(manifest: Manifest) -> str:
    """The manifest as the text of manifest.json: readable, and the same for the same build."""
    return json.dumps(msgspec.to_builtins(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_destination(destination: Path, model: str, precision: str, overwrite: bool) -> None:
    """InputError unless a bundle of `model` may be written to `destination`.

    It may be absent, an empty folder, or an earlier build of the same model and precision; any other bundle
    needs `overwrite`. What is no bundle, or holds a file that no bundle has, is never replaced.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise InputError(f"output {destination}: exists and is not a folder; choose another with -o")
    if Path.cwd().is_relative_to(destination.resolve()):
        raise InputError(f"output {destination}: is the working directory or above it; choose a folder inside with -o")
    try:
        atomic.check_writable(destination)
    except OSError as error:
        raise from_os_error(error, f"output {destination}") from None
    if not destination.exists() or not any(destination.iterdir()):
        return
    foreign = {path.name for path in destination.iterdir()} - {MANIFEST, MODEL, PLAN, LABELS, CALIBRATION}
    if foreign or not (destination / MANIFEST).exists():
        found = f" (it holds {min(foreign)})" if foreign else ""
        raise InputError(f"output {destination}: the folder exists and is no bundle{found}; choose another with -o")
    try:
        there = read_manifest(destination)
        same = (there.model, there.precision) == (model, precision)
        what = f"a bundle of {there.model} in {there.precision}"
    except InputError:
        same, what = False, "a damaged or newer bundle"
    if not same and not overwrite:
        raise InputError(f"output {destination}: holds {what}; choose another with -o, or pass --overwrite")


def card_facts(card: ModelCard) -> CardFacts:
    """The card's claims as the manifest carries them."""
    return CardFacts(
        sha256=card.digest,
        description=card.description,
        figures=card.figures,
        accuracy=card.accuracy,
        source=card.source,
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
