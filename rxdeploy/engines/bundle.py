"""The bundle: a directory with the model, the plan and a manifest that vouches for every byte of both.

Reading and writing it needs neither torch nor onnx, since serving hosts do the former.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec

from rxdeploy import atomic
from rxdeploy.cards import ModelCard
from rxdeploy.cards.card import Accuracy, Figures, Input, Source
from rxdeploy.engines import sbom
from rxdeploy.engines.external import keeps_weights_elsewhere
from rxdeploy.errors import CheckFailed, InputError, from_os_error, inert, printable
from rxdeploy.plainfile import open_plain, read_plain
from rxdeploy.signing.keys import PublicKey, TrustedKeys, read_public_keys
from rxdeploy.signing.signature import LARGEST_SIGNATURE, SIGNATURE, Signed, check_signature

SCHEMA: Literal[1] = 1
UNSEALED = "0" * 64
MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 24  # bytes; one has some 10,000
MODEL = "model.onnx"
PLAN = "engine.plan"
LABELS = "labels.txt"
CALIBRATION = "calibration.json"
SBOM = "sbom.cdx.json"

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
    threads: Annotated[int, msgspec.Meta(le=1024)] = 0  # that compute a node together; 0: one a core
    sessions: Annotated[int, msgspec.Meta(le=1024)] = 1  # that a batch is split over, each with `threads`
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
    num_classes: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    inputs: Annotated[tuple[Tensor, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[Tensor, ...], msgspec.Meta(min_length=1)]
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
    signed_by: str | None = None  # the fingerprint of the trusted key, where it was opened with some

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files; KeyError when it has none of that name."""
        if name not in self.manifest.files:
            raise KeyError(name)
        return self.path / name

    def read(self, name: str) -> bytes:
        """A file's contents, read once and checked, which is what engines are given: what lies at a path may change.

        KeyError when it has none of that name; InputError, of a signed bundle CheckFailed, when it has changed.
        """
        return _checked(self.path, name, self.manifest.files[name], self.signed_by is not None)

    def labels(self) -> tuple[str, ...] | None:
        """Class names in the order of the logits, or None."""
        if LABELS not in self.manifest.files:
            return None
        return tuple(self.read(LABELS).decode("utf-8").splitlines())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`, without checking the files it lists."""
    return parse_manifest(path, manifest_bytes(path))


def manifest_bytes(path: Path) -> bytes:
    """What manifest.json of the bundle at `path` holds; InputError when there is none."""
    if not os.path.lexists(path / MANIFEST):
        raise InputError(f"bundle {path}: not a bundle (there is no {MANIFEST}); `rxdeploy build` makes one")
    if (path / MANIFEST).is_symlink():
        raise InputError(f"bundle {path}: {MANIFEST} is a link, which no bundle has; copy the files themselves")
    return read_plain(path / MANIFEST, f"bundle {path}: {MANIFEST}", _LARGEST_MANIFEST)


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """The manifest in `data`, which is of the bundle at `path`; InputError when it is damaged, altered or newer."""
    try:
        head = msgspec.json.decode(data)
        if isinstance(head, dict) and type(head.get("schema")) is int and head["schema"] > SCHEMA:
            raise InputError(
                f"bundle {path}: it has schema {head['schema']}, this rxdeploy reads up to {SCHEMA}; "
                f"{_newer_version(head)}"
            )
        manifest = msgspec.convert(_inert(head), Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"bundle {path}: {MANIFEST} is damaged: {error}; build the bundle again") from None
    if _seal(data.replace(manifest.digest.encode(), UNSEALED.encode(), 1)) != manifest.digest:
        raise InputError(
            f"bundle {path}: {MANIFEST} was altered: it no longer has its own digest; build the bundle again"
        )
    return manifest


def _inert(value: Any) -> Any:
    """The same JSON value, its texts without control characters: they are printed, and may be from anybody."""
    if isinstance(value, dict):
        return {inert(key): _inert(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_inert(each) for each in value]
    return inert(value) if isinstance(value, str) else value


def strange_manifest(path: Path, error: Exception) -> InputError:
    """What to raise where a part of a manifest that has no fixed form lacks what it always has."""
    what = f"{type(error).__name__}: {printable(str(error))}"
    return InputError(f"bundle {path}: {MANIFEST} does not say what it has to ({what}); build the bundle again")


def _newer_version(manifest: dict[str, Any]) -> str:
    """What to install to read a manifest of a later schema, of which nothing is known but where versions stand."""
    tools = manifest.get("tools")
    version = tools.get("rxdeploy") if isinstance(tools, dict) else None
    if not isinstance(version, str) or not re.fullmatch(r"[0-9][0-9A-Za-z.+!]{0,40}", version):
        return "install a newer one"
    return f"rxdeploy {version} wrote it: pip install 'rxdeploy>={version}'"


def _seal(unsealed: bytes) -> str:
    return hashlib.sha256(unsealed).hexdigest()


def open_bundle(path: Path, trusted_keys: TrustedKeys | str | Path | bytes | None = None) -> Bundle:
    """Open a bundle and check every file against its digest before a byte of it is used.

    With `trusted_keys` (files of public keys, or their PEM) it must be signed with one of them as well, and hold
    nothing besides: the signature is checked before anything else of it is read.

    InputError names the file that is missing, of another size, altered, or no plain file; with `trusted_keys` that is
    CheckFailed, as it is for an unsigned bundle and another key's. InputError for keys that are none; EnvironmentLacks
    where `cryptography` is not installed.
    """
    if trusted_keys is None:
        signed, manifest = None, read_manifest(path)
    else:
        keys, data = read_public_keys(trusted_keys), manifest_bytes(path)
        signed, manifest = check_signed(path, _signature(path), data, keys)
        if stranger := find_stranger(path, manifest):
            raise CheckFailed(
                f"bundle {path}: holds {printable(stranger)}, which is not signed; take it out, or sign it again"
            )
    for name, expected in manifest.files.items():
        _checked(path, name, expected, signed is not None, keep=False)
    if MODEL not in manifest.files:
        raise InputError(f"bundle {path}: {MANIFEST} lists no {MODEL}; build the bundle again")
    if keeps_weights_elsewhere(path / MODEL):
        raise InputError(f"bundle {path}: {MODEL} has weights in other files, which no digest covers; build it again")
    return Bundle(path, manifest, signed.key.fingerprint if signed else None)


def check_signed(path: Path, signature: bytes, data: bytes, keys: Sequence[PublicKey]) -> tuple[Signed, Manifest]:
    """The manifest in `data`, of the bundle at `path`, when one of `keys` signed it and the files that it lists.

    CheckFailed otherwise. The files themselves are not looked at.
    """
    try:
        signed = check_signature(signature, keys)
    except CheckFailed as error:
        raise CheckFailed(f"bundle {path}: {error}") from None
    if signed.files.get(MANIFEST) != _seal(data):
        raise CheckFailed(f"bundle {path}: {MANIFEST} is not the one that was signed; sign the bundle again")
    manifest = parse_manifest(path, data)
    digests = {name: file.sha256 for name, file in manifest.files.items()}
    if digests != {name: digest for name, digest in signed.files.items() if name != MANIFEST}:
        raise CheckFailed(f"bundle {path}: {SIGNATURE} and {MANIFEST} list different files; sign the bundle again")
    return signed, manifest


def find_stranger(path: Path, manifest: Manifest) -> str | None:
    """The first name in the bundle's folder that is none of the bundle's; None when there is none."""
    return min({entry.name for entry in os.scandir(path)} - {MANIFEST, SIGNATURE, *manifest.files}, default=None)


def _signature(path: Path) -> bytes:
    file = path / SIGNATURE
    if not os.path.lexists(file):
        raise CheckFailed(
            f"bundle {path}: is not signed (there is no {SIGNATURE}), and only signed ones are trusted here; "
            "`rxdeploy sign` signs it"
        )
    if file.is_symlink():
        raise CheckFailed(f"bundle {path}: {SIGNATURE} is a link, which no bundle has; sign the bundle again")
    try:
        return read_plain(file, f"bundle {path}: {SIGNATURE}", LARGEST_SIGNATURE)
    except InputError as error:
        raise CheckFailed(f"{error}; sign the bundle again") from None


def _checked(folder: Path, name: str, expected: FileDigest, signed: bool, keep: bool = True) -> bytes:
    """A file's contents (nothing without `keep`) when they are what the manifest says."""
    try:
        return _check_file(folder, name, expected, keep)
    except InputError as error:
        if not signed:
            raise
        raise CheckFailed(str(error).replace("build the bundle again", "it is not what was signed")) from None


def _check_file(folder: Path, name: str, expected: FileDigest, keep: bool) -> bytes:
    where = f"bundle {folder}: {printable(name)}"
    if name in ("", ".", "..", MANIFEST, SIGNATURE) or set(name) & set("/\\\0"):
        raise InputError(f"bundle {folder}: {MANIFEST} lists a file named {name!r}, which no bundle has")
    try:
        file = open_plain(folder / name, os.O_NOFOLLOW)
    except OSError as error:
        known = dict.fromkeys((errno.EINVAL, errno.ELOOP, errno.ENXIO), "not a plain file")  # ELOOP: a link
        known |= dict.fromkeys((errno.ENOENT, errno.ENAMETOOLONG), "missing")
        state = known.get(error.errno or 0, f"not readable ({error.strerror})")
        raise InputError(f"{where[:300]} is {state}; build the bundle again") from None
    with file:
        if (size := os.fstat(file.fileno()).st_size) != expected.bytes:
            raise InputError(f"{where} has {size} bytes, the manifest says {expected.bytes}; build the bundle again")
        data = file.read(expected.bytes) if keep else b""
        actual = hashlib.sha256(data).hexdigest() if keep else _digest_of(file)
    if actual != expected.sha256:
        raise InputError(
            f"{where} was altered: its sha256 begins {actual[:8]}, the manifest says {expected.sha256[:8]}; "
            "build the bundle again"
        )
    return data


def write_bundle(destination: Path, manifest: Manifest, files: dict[str, Path | bytes], overwrite: bool) -> Bundle:
    """Write a bundle beside `destination` and rename it into place; the manifest's `files` are filled in here.

    `files` maps names to contents or to files to copy; the bill of materials is made here, in place of one among them.
    See `check_destination` for what may be replaced; a signature there goes with what it was of.
    """
    check_destination(destination, manifest.model, manifest.precision, overwrite)
    files = {name: content for name, content in files.items() if name != SBOM}
    with atomic.new_folder(destination) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        digests = {name: file_digest(folder / name) for name in sorted(files)}
        (folder / SBOM).write_bytes(sbom.bill_of_materials(manifest, digests))
        digests[SBOM] = file_digest(folder / SBOM)
        manifest = msgspec.structs.replace(manifest, files=dict(sorted(digests.items())), digest=UNSEALED)
        manifest = msgspec.structs.replace(manifest, digest=_seal(manifest_json(manifest).encode()))
        (folder / MANIFEST).write_text(manifest_json(manifest), encoding="utf-8")
    return Bundle(destination, manifest)


def manifest_json(manifest: Manifest) -> str:
    """The manifest as the text of manifest.json: readable, and the same for the same build."""
    return json.dumps(msgspec.to_builtins(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_destination(destination: Path, model: str, precision: str, overwrite: bool) -> None:
    """InputError unless a bundle of `model` may be written to `destination`.

    It may be absent, an empty folder, or an earlier build of the same model and precision; any other bundle
    needs `overwrite`. What is no bundle, or holds a file that no bundle has, is never replaced; nor is anything put
    into a bundle, whose signature would not be of it.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise InputError(f"output {destination}: exists and is not a folder; choose another with -o")
    if Path.cwd().is_relative_to(destination.resolve()):
        raise InputError(f"output {destination}: is the working directory or above it; choose a folder inside with -o")
    check_outside(destination)
    try:
        atomic.check_writable(destination)
    except OSError as error:
        raise from_os_error(error, f"output {destination}") from None
    if not destination.exists() or not any(destination.iterdir()):
        return
    ours = {MANIFEST, MODEL, PLAN, LABELS, CALIBRATION, SBOM, SIGNATURE}
    foreign = {path.name for path in destination.iterdir()} - ours
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


def check_outside(output: Path) -> None:
    """InputError when `output` lies in a bundle: its signature would not be of what is put there."""
    for folder in output.resolve().parents:
        if not (folder / MANIFEST).is_file() or not (folder / MODEL).exists():
            continue
        try:  # other programs have a manifest.json, too
            manifest = msgspec.json.decode(manifest_bytes(folder))
            ours = "schema" in manifest and MODEL in manifest["files"]
        except (InputError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError, TypeError, KeyError):
            ours = False
        if ours:
            raise InputError(f"output {output}: lies in the bundle {folder}; choose a place outside with -o")


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
    with path.open("rb") as file:
        return _digest_of(file)


def file_digest(path: Path) -> FileDigest:
    """The digest and size of a file, as the manifest has them."""
    return FileDigest(sha256_of(path), path.stat().st_size)


def _digest_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
