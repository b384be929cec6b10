"""What somebody made on purpose: code in weights, bombs, paths that lead elsewhere, names that command a terminal.

The second part of the table in docs/reliability.md; see test_faults.py for what a row is. A row's function spoils the
copy that it is run in.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

EXPORT = "export card.toml --weights {} --fp32 -o out.onnx"
EXPORT_CARD = EXPORT.format("weights.safetensors")
EXPORT_INT8 = "export card.toml --weights weights.safetensors --int8 --calibration calibration.json -o out.onnx"
VALIDATE = "validate card.toml --weights weights.safetensors --fp32 --onnx model.onnx"
CLASSIFY = "classify bundle image.png"
CLASSIFY_JPEG = "classify bundle image.jpg"
NPY = "images.npy"
EVALUATE = "evaluate bundle --data"
CANARY = Path("the code was run")
ESCAPE = "\x1b]0;owned\x07\x1b[2J"  # sets a terminal's title and clears its screen


class Row(NamedTuple):
    input: str
    fault: str
    spoil: Callable[[], object]
    command: str
    code: int
    error: str


ROWS: list[Row] = []


def row(input: str, fault: str, command: str, error: str, code: int = 2) -> Callable[..., Any]:
    """Makes a row of the function below it."""

    def add(spoil: Callable[[], object]) -> Callable[[], object]:
        ROWS.append(Row(input, fault, spoil, command, code, error))
        return spoil

    return add


# Weights


class Code:
    """Pickles to a call of os.mkdir."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(CANARY),)


def _state() -> dict[str, Any]:
    import torch

    return torch.load("weights.pth", weights_only=True)


@row("weights", "code in a .pth", EXPORT.format("weights.pth"), "contains pickled code")
def code_in_pth() -> None:
    import torch

    torch.save({**_state(), "extra": Code()}, "weights.pth")


@row("weights", "code in an old .pth", EXPORT.format("weights.pth"), "contains pickled code")
def code_in_old_pth() -> None:
    import torch

    torch.save({**_state(), "extra": Code()}, "weights.pth", _use_new_zipfile_serialization=False)


@row("weights", "a bare pickle", EXPORT.format("weights.pth"), "nothing of it was run")
def bare_pickle() -> None:
    Path("weights.pth").write_bytes(pickle.dumps(Code()))


@row("weights", "a pickle called .safetensors", EXPORT_CARD, "weights file weights.safetensors")
def pickle_as_safetensors() -> None:
    Path("weights.safetensors").write_bytes(pickle.dumps({"fc.weight": Code()}, protocol=0))


@row("weights", "a bomb: compressed members", EXPORT.format("weights.pth"), "unpacks to 67,1")
def bomb_pth() -> None:
    import torch

    torch.save(_state(), "plain.pth")
    with zipfile.ZipFile("plain.pth") as plain, zipfile.ZipFile("weights.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
        with bomb.open("archive/data/bomb", "w") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))


def _safetensors(header: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    Path("weights.safetensors").write_bytes(struct.pack("<Q", size) + header)


@row("weights", "a header of 2^63 bytes", EXPORT_CARD, "damaged or in no format we read")
def long_header() -> None:
    _safetensors(b"{}", 1 << 63)


@row("weights", "deep JSON in the header", EXPORT_CARD, "damaged or in no format we read")
def deep_header() -> None:
    _safetensors(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}")


@row("weights", "offsets outside the file", EXPORT_CARD, "damaged or in no format we read")
def far_offsets() -> None:
    _safetensors(b'{"fc.bias":{"dtype":"F32","shape":[3],"data_offsets":[1099511627776,1099511627788]}}')


@row("weights", "a tensor that says to be 4 EB", EXPORT_CARD, "damaged or in no format we read")
def huge_tensor() -> None:
    _safetensors(b'{"fc.bias":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,12]}}' + bytes(12))


@row("weights", "names with terminal commands", EXPORT_CARD, "unexpected: ?]0;owned??[2J")
def weights_names() -> None:
    import safetensors.numpy

    safetensors.numpy.save_file({ESCAPE: np.zeros(3, np.float32)}, "weights.safetensors")


# Card


def _card(*changes: tuple[str, str]) -> None:
    text = Path("card.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("card.toml").write_text(text)


@row("card", "deep nesting", EXPORT_CARD, "card card.toml: ")
def deep_card() -> None:
    Path("card.toml").write_text("schema = " + "[" * 50_000)


@row("card", "an integer of 10000 digits", EXPORT_CARD, "card card.toml: ")
def huge_integer() -> None:
    _card(("num_classes = 3", f"num_classes = {'9' * 10_000}"))


@row("card", "a billion classes", EXPORT_CARD, "num_classes")
def many_classes() -> None:
    _card(("num_classes = 3", "num_classes = 1000000000"))


@row("card", "a model of 2 PB", EXPORT_CARD, "more than one ONNX file can hold")
def huge_model() -> None:
    _card(
        ("layers = [1, 1]", "layers = [200, 200]"),
        ("channels = [8, 16]", "channels = [16384, 16384]"),
        ("cardinality = 2", "cardinality = 4096"),
    )


@row("card", "NaN", EXPORT_CARD, "crop_pct")
def nan_card() -> None:
    _card(("crop_pct = 1.0", "crop_pct = nan"))


@row("card", "a key twice", EXPORT_CARD, "not a TOML file")
def twice_card() -> None:
    _card(("crop_pct = 1.0", "crop_pct = 1.0\ncrop_pct = 0.5"))


@row("card", "a key with terminal commands", EXPORT_CARD, "unknown field `?]0;owned??[2J`")
def card_key() -> None:
    Path("card.toml").write_text('"\\u001b]0;owned\\u0007\\u001b[2J" = 1\n' + Path("card.toml").read_text())


@row("card", "a name that leads out of the folder", "build card.toml --weights synthetic", "card card.toml: ")
def card_name() -> None:
    _card(('name = "small"', 'name = "../../small"'))


@row("card", "a URL that leads out of the cache", "build card.toml", "its last part is no file name")
def card_url() -> None:
    weights = '[weights]\nurl = "http://127.0.0.1:9/a/..%2f..%2f.."\nsha256_prefix = "01234567"\n'
    Path("card.toml").write_text(Path("card.toml").read_text() + weights)


@row("card", "a URL of a local file", "build card.toml", "url")
def card_file_url() -> None:
    weights = '[weights]\nurl = "file:///etc/passwd"\nsha256_prefix = "01234567"\n'
    Path("card.toml").write_text(Path("card.toml").read_text() + weights)


@row("card", "an endless device for its labels", "build card.toml --weights synthetic", "not a plain file")
def card_labels() -> None:
    Path("card.toml").write_text(Path("card.toml").read_text().replace("[arch", 'labels = "/dev/zero"\n[arch', 1))


# ONNX


def _external(location: str) -> None:
    """A model whose classifier lies in another file."""
    import onnx

    model = onnx.load("model.onnx")
    tensor = next(each for each in model.graph.initializer if each.name == "fc.weight")
    Path("../secret.bin").write_bytes(tensor.raw_data)
    os.link("../secret.bin", "beside.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0")):
        tensor.external_data.add(key=key, value=value)
    Path("model.onnx").write_bytes(model.SerializeToString())


@row("ONNX model", "weights in ../", VALIDATE, "ONNX Runtime cannot load model.onnx")
def external_above() -> None:
    _external("../secret.bin")


@row("ONNX model", "weights at an absolute path", VALIDATE, "ONNX Runtime cannot load model.onnx")
def external_absolute() -> None:
    _external(str(Path("../secret.bin").resolve()))


@row("ONNX model", "weights behind a link", VALIDATE, "ONNX Runtime cannot load model.onnx")
def external_link() -> None:
    _external("link.bin")
    Path("link.bin").symlink_to("../secret.bin")


@row("ONNX model", "another operator set", VALIDATE, "ONNX Runtime cannot load model.onnx")
def onnx_opset() -> None:
    import onnx

    model = onnx.load("model.onnx")
    model.opset_import[0].version = 999_999
    Path("model.onnx").write_bytes(model.SerializeToString())


@row("ONNX model", "an output with terminal commands", VALIDATE, "needs `image` uint8")
def onnx_names() -> None:
    import onnx

    model = onnx.load("model.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = ESCAPE
    Path("model.onnx").write_bytes(model.SerializeToString())


# Calibration file


def _calibration(change: Callable[[Any], object]) -> None:
    record = json.loads(Path("calibration.json").read_text())
    change(record)
    Path("calibration.json").write_text(json.dumps(record))


@row("calibration file", "NaN", EXPORT_INT8, "damaged, or not made by rxdeploy")
def calibration_nan() -> None:
    _calibration(lambda record: record["recipes"]["tensorrt"]["ranges"].update(input=[0, float("nan")]))


@row("calibration file", "a range of 1e300", EXPORT_INT8, "calibrate again")
def calibration_range() -> None:
    def widen(record: Any) -> None:
        ranges = record["recipes"]["tensorrt"]["ranges"]
        ranges.update({name: [0, 1e300] for name in ranges})

    _calibration(widen)


@row("calibration file", "an integer of 5000 digits", EXPORT_INT8, "damaged, or not made by rxdeploy")
def calibration_integer() -> None:
    text = Path("calibration.json").read_text()
    Path("calibration.json").write_text(re.sub(r'"images": \d+', f'"images": {"9" * 5000}', text))


@row("calibration file", "deep JSON", EXPORT_INT8, "damaged, or not made by rxdeploy")
def calibration_deep() -> None:
    Path("calibration.json").write_text('{"schema": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}")


@row("calibration file", "of another model", EXPORT_INT8, "it is of ?]0;owned??[2J, and ranges of one model")
def calibration_model() -> None:
    _calibration(lambda record: record.update(model=ESCAPE, model_sha256="0" * 64))


@row("calibration file", "a layer with terminal commands", EXPORT_INT8, "the bias correction of ?]0;owned??[2J")
def calibration_layer() -> None:
    _calibration(lambda record: record["recipes"]["tensorrt"]["bias"].update({ESCAPE: [0.0]}))


@row("calibration file", "a newer schema", EXPORT_INT8, "install a newer one")
def calibration_schema() -> None:
    _calibration(lambda record: record.update(schema=10**30))


# Manifests, with the digest of what they say: anybody can give them that


def _manifest(change: Callable[[Any], object], bundle: str = "bundle") -> None:
    manifest = json.loads((Path(bundle) / "manifest.json").read_text())
    change(manifest)
    _seal(json.dumps(manifest | {"digest": "0" * 64}), bundle)


def _seal(text: str, bundle: str = "bundle") -> None:
    digest = hashlib.sha256(text.encode()).hexdigest()
    (Path(bundle) / "manifest.json").write_text(text.replace("0" * 64, digest, 1))


NAMES = {
    "../../etc/passwd": "which no bundle has",
    "../card.toml": "which no bundle has",
    "/etc/passwd": "which no bundle has",
    "..\\card.toml": "which no bundle has",
    "..": "which no bundle has",
    "": "which no bundle has",
    "manifest.json": "which no bundle has",
    "model.onnx\0": "is missing",
    "model.onnx\nerror: all is well": "is missing",
    ESCAPE: "?]0;owned??[2J is missing",
    "\x9b2J": "?2J is missing",
    "a" * 5000: "is missing",
}
LISTED = {"sha256": "0" * 64, "bytes": 12}
for name, error in NAMES.items():
    lists = functools.partial(_manifest, lambda manifest, name=name: manifest["files"].update({name: LISTED}))
    shown = repr(name if len(name) < 100 else f"{name[:5]}... of {len(name)} letters")
    ROWS.append(Row("manifest", f"lists {shown}", lists, CLASSIFY, 2, error))


def _set(*path: Any) -> Callable[[Any], object]:
    """Sets a value deep in a manifest: its keys, and then what it becomes."""

    def change(manifest: Any) -> None:
        for key in path[:-2]:
            manifest = manifest[key]
        manifest[path[-2]] = path[-1]

    return change


ANOTHER = "is not what the manifest says; build the bundle again"
SAYS = {
    "10^400 bytes": (
        _set("files", "model.onnx", "bytes", 10**400),
        CLASSIFY,
        "has 23512 bytes, the manifest says 1000",
    ),
    "-1 bytes": (_set("files", "model.onnx", "bytes", -1), CLASSIFY, "has 23512 bytes, the manifest says -1"),
    "a digest of terminal commands": (_set("files", "model.onnx", "sha256", ESCAPE), CLASSIFY, "says ?]0;owne"),
    "NaN": (_set("counts", "parameters", float("nan")), CLASSIFY, "manifest.json is damaged"),
    "no classes": (_set("num_classes", 0), CLASSIFY, "manifest.json is damaged"),
    "a million classes": (_set("num_classes", 1_000_000), CLASSIFY, f"its output {ANOTHER}"),
    "no input": (_set("inputs", []), CLASSIFY, "manifest.json is damaged"),
    "another input": (_set("inputs", 0, "name", "x"), CLASSIFY, f"its input {ANOTHER}"),
    "images of 4096 x 4096": (_set("preprocessing", "image_size", 4096), CLASSIFY, f"its input {ANOTHER}"),
    "normalised input": (_set("normalisation_in_graph", False), CLASSIFY, f"its input {ANOTHER}"),
    "a million threads": (
        lambda manifest: manifest["tuning"].update(
            cpu={"threads": 10**6, "sessions": 1}, cores=len(os.sched_getaffinity(0)), tuned=True
        ),
        CLASSIFY,
        "manifest.json is damaged",
    ),
    "schema 10^30": (_set("schema", 10**30), CLASSIFY, "this rxdeploy reads up to 1"),
    "no figures of the validation": (_set("validation", {}), "inspect bundle", "does not say what it has to"),
    "figures that are texts": (_set("validation", "providers", "x"), "inspect bundle", "does not say what it has to"),
    "an engine without facts": (_set("engine", {}), "inspect bundle", "does not say what it has to"),
    "an engine without profiles": (
        lambda manifest: (manifest["engine"].clear(), manifest["files"].pop("engine.plan")),
        "package planned --format triton -o repository",
        "does not say what it has to",
    ),
}
for fault, (change, command, error) in SAYS.items():
    of = "planned" if "planned" in command else "bundle"
    ROWS.append(
        Row(
            "manifest",
            f"says {fault}",
            functools.partial(_manifest, change, of),
            command,
            2,
            error,
        )
    )


@row("manifest", "a key twice", CLASSIFY, "lists no model.onnx")
def manifest_twice() -> None:
    manifest = json.loads(Path("bundle/manifest.json").read_text()) | {"digest": "0" * 64}
    _seal(json.dumps(manifest)[:-1] + ', "files": {}}')


@row("manifest", "a number of 5000 digits", CLASSIFY, "manifest.json is damaged")
def manifest_number() -> None:
    manifest = json.loads(Path("bundle/manifest.json").read_text()) | {"digest": "0" * 64}
    _seal(json.dumps(manifest).replace('"bytes": 12', f'"bytes": {"9" * 5000}'))


@row("manifest", "deep JSON", CLASSIFY, "manifest.json is damaged")
def manifest_deep() -> None:
    Path("bundle/manifest.json").write_text('{"schema": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}")


@row("bundle", "weights that its manifest does not list", CLASSIFY, "model.onnx has weights in other files")
def bundle_external() -> None:
    _external("beside.bin")
    data = Path("model.onnx").read_bytes()
    Path("bundle/model.onnx").write_bytes(data)
    Path("bundle/beside.bin").write_bytes(Path("beside.bin").read_bytes())
    listed = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    _manifest(lambda manifest: manifest["files"].update({"model.onnx": listed}))


@row("bundle", "a folder for a file", CLASSIFY, "model.onnx is not a plain file")
def bundle_folder() -> None:
    Path("bundle/model.onnx").unlink()
    Path("bundle/model.onnx").symlink_to("../flat")


@row("bundle", "is a link to itself", "inspect loop", "not a bundle")
def bundle_loop() -> None:
    Path("loop").symlink_to("loop")


@row("bundle", "is a pipe", "inspect pipe", "not a bundle")
def bundle_pipe() -> None:
    os.mkfifo("pipe")


# Images


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    made = [struct.pack(">I", len(data)) + kind + data for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in made)


def _header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


@row("image", "a PNG of 4 billion pixels", CLASSIFY, "4294967296 pixels, more than the 178,956,970 allowed")
def png_bomb() -> None:
    Path("image.png").write_bytes(
        _png([_header(65_536, 65_536), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")])
    )


@row("image", "a PNG of 2^62 pixels", CLASSIFY, "image image.png: ")
def png_absurd() -> None:
    Path("image.png").write_bytes(_png([_header(2**31 - 1, 2**31 - 1), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]))


@row("image", "a PNG with a text of 64 MB", CLASSIFY, "image image.png: cannot be decoded")
def png_text() -> None:
    text = zlib.compress(bytes(64 << 20), 1)
    Path("image.png").write_bytes(
        _png([_header(32, 32), (b"zTXt", b"k\0\0" + text), (b"IDAT", zlib.compress(bytes(97 * 32))), (b"IEND", b"")])
    )


@row("image", "a PNG that is 1 pixel high", CLASSIFY, "too long and narrow")
def png_narrow() -> None:
    data = zlib.compress(bytes(1 + 3 * 10_000_000))
    Path("image.png").write_bytes(_png([_header(10_000_000, 1), (b"IDAT", data), (b"IEND", b"")]))


@row(
    "image",
    "a JPEG of 65535 x 65535",
    CLASSIFY_JPEG,
    "4294836225 pixels, more than the 178,956,970 allowed",
)
def jpeg_absurd() -> None:
    data = bytearray(Path("image.jpg").read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff" * 4
    Path("image.jpg").write_bytes(data)


@row("image", "an SVG called .jpg", CLASSIFY_JPEG, "not an image in a format rxdeploy reads")
def svg() -> None:
    Path("image.jpg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')


@row("image", "a PostScript program called .png", CLASSIFY, "not an image in a format rxdeploy reads")
def postscript() -> None:
    Path("image.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile\n%%EOF\n")


@row("image", "a BMP of -2^31 rows", CLASSIFY, "image image.png: ")
def bmp() -> None:
    info = struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)
    Path("image.png").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info)


@row("image", "a TIFF whose directory is its own next", CLASSIFY, "image image.png: ")
def tiff_loop() -> None:
    Path("image.png").write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 8))


@row("image", "a name with terminal commands", CLASSIFY.replace("image.png", ESCAPE), "image ?]0;owned??[2J: ")
def image_name() -> None:
    Path(ESCAPE).write_bytes(b"")


# Data sets


def _tar(*members: tuple[str, dict[str, Any]], data: bytes = b"x" * 100) -> None:
    with tarfile.open("data.tar", "w") as tar:
        for name, facts in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in facts.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)


@row("data, tar", "a member ../x.png", f"{EVALUATE} data.tar", "points out of it")
def tar_above() -> None:
    _tar(("ant/../../x.png", {}))


@row("data, tar", "members that are links", f"{EVALUATE} data.tar", "no images in it")
def tar_links() -> None:
    _tar(
        ("ant/a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("bee/b.png", {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"}),
    )


@row("data, tar", "members that are devices and pipes", f"{EVALUATE} data.tar", "no images in it")
def tar_devices() -> None:
    _tar(
        ("ant/a.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("bee/b.png", {"type": tarfile.BLKTYPE}),
        ("cat/c.png", {"type": tarfile.FIFOTYPE}),
    )


@row("data, tar", "a name with terminal commands", f"{EVALUATE} data.tar", "the member ../?]0;owned??[2J.png")
def tar_escape() -> None:
    _tar((f"../{ESCAPE}.png", {}))


def _pax(records: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    padded = records + bytes(-len(records) % 512)
    Path("data.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + padded + Path("data.tar").read_bytes())


@row("data, tar", "a sparse map that is none", f"{EVALUATE} data.tar", "cannot be read as a tar")
def tar_sparse() -> None:
    _pax(b"27 GNU.sparse.map=a,b,c,d,\n" + b"22 GNU.sparse.major=0\n22 GNU.sparse.minor=1\n")


@row("data, tar", "20000 headers, each about the next", f"{EVALUATE} data.tar", "cannot be read as a tar")
def tar_nested() -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 11
    one = header.tobuf(tarfile.USTAR_FORMAT) + b"11 a=bcdef\n".ljust(512, b"\0")
    Path("data.tar").write_bytes(one * 20_000 + Path("data.tar").read_bytes())


@row("data, tar", "a header of 900 GB", f"{EVALUATE} data.tar", "a header of 899,999,999,488 bytes")
def tar_header() -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 900_000_000_000 - 512
    Path("data.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate("data.tar", 1 << 40)


@row("data, tar", "a member of -1024 bytes", f"{EVALUATE} data.tar", "cannot be read as a tar")
def tar_negative() -> None:
    info = tarfile.TarInfo("a/a.txt")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256, GNU's way to write large numbers, and negative ones
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    Path("data.tar").write_bytes(bytes(block) + bytes(1024))


@row("data, npz", "code", f"{EVALUATE} data.npz", "cannot be read as an .npz file")
def npz_code() -> None:
    np.savez("data.npz", images=np.array([Code()], dtype=object), labels=np.zeros(1, int))


@row("data, npz", "a bare pickle", f"{EVALUATE} data.npz", "it is no zip, or cut off")
def npz_pickle() -> None:
    Path("data.npz").write_bytes(pickle.dumps(Code()))


@row("data, npz", "a bomb", f"{EVALUATE} data.npz", "a decompression bomb")
def npz_bomb() -> None:
    with (
        zipfile.ZipFile("data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
        bomb.open(NPY, "w") as file,
    ):
        head = io.BytesIO()
        shape = (2000, 512, 256, 3)
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(head.getvalue())
        for _ in range(257):
            file.write(bytes(1 << 20))


@row("data, npz", "an array that says to have 4 EB", f"{EVALUATE} data.npz", "data data.npz", code=3)
def npz_shape() -> None:
    head = io.BytesIO()
    shape = (2**40, 1024, 1024, 3)
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile("data.npz", "w") as archive:
        archive.writestr(NPY, head.getvalue() + bytes(1000))


@row("data, folder", "loops and links to nowhere", f"{EVALUATE} data", "images cannot be decoded")
def folder_links() -> None:
    import shutil

    shutil.rmtree("data")
    for name in ("ant", "bee", "cat"):
        (Path("data") / name).mkdir(parents=True)
        (Path("data") / name / "loop").symlink_to("..")
        (Path("data") / name / "x.png").symlink_to("nowhere")


@row("data, folder", "pipes and devices called .png", f"{EVALUATE} data", "no images in it")
def folder_pipes() -> None:
    import shutil

    shutil.rmtree("data")
    for name in ("ant", "bee", "cat"):
        (Path("data") / name).mkdir(parents=True)
        os.mkfifo(Path("data") / name / "pipe.png")
        (Path("data") / name / "zero.png").symlink_to("/dev/zero")


LABELS = f"{EVALUATE} flat --labels"


@row("labels of images", "a quote that never ends", f"{LABELS} labels.csv", "cannot be read as CSV")
def csv_quote() -> None:
    Path("labels.csv").write_text('filename,label\n"ant0.png,ant\n')


@row("labels of images", "a cell of 10 MB", f"{LABELS} labels.csv", "cannot be read as CSV")
def csv_cell() -> None:
    Path("labels.csv").write_text("filename,label\nant0.png," + "a" * 10_000_000)


@row("labels of images", "terminal commands", f"{LABELS} labels.csv", "its first is ?]0;owned??[2J")
def csv_escape() -> None:
    Path("labels.csv").write_text(f"filename,label\n{ESCAPE},ant\n")


@row("labels of images", "a class of 5000 digits", f"{LABELS} labels.csv", "labels file labels.csv: its labels")
def csv_number() -> None:
    Path("labels.csv").write_text(re.sub(",(ant|bee|cat)", f",{'9' * 5000}", Path("labels.csv").read_text()))


@row("labels of images", "the kit as a bomb", f"{LABELS} kit.tar.gz", "it unpacks to more than 268,435,456 bytes")
def kit_bomb() -> None:
    Path("kit.tar.gz").write_bytes(gzip.compress(bytes(16 << 20), 1) * 17)


def _kit(meta: bytes) -> None:
    with tarfile.open("kit.tar.gz", "w:gz") as tar:
        for name, data in (("ILSVRC2012_validation_ground_truth.txt", b"1\n"), ("meta.mat", meta)):
            info = tarfile.TarInfo(f"devkit/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _mat(*elements: tuple[int, bytes]) -> bytes:
    tags = (struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in elements)
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"".join(tags)


@row("labels of images", "meta.mat as a bomb", f"{LABELS} kit.tar.gz", "a variable of more than 67,108,864 bytes")
def mat_bomb() -> None:
    _kit(_mat((15, zlib.compress(bytes(65 << 20), 1))))


@row("labels of images", "a struct of 2^62 elements", f"{LABELS} kit.tar.gz", "meta.mat: ")
def mat_count() -> None:
    parts = (
        (6, struct.pack("<II", 2, 0)),
        (5, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
        (1, b"synsets"),
        (5, struct.pack("<i", 8)),
        (1, b"WNID\0\0\0\0"),
    )
    _kit(_mat((14, _mat(*parts)[128:])))


# Baselines and predictions


@row("baseline", "a class of -1", f"{EVALUATE} data --baseline baseline.json", "neither a bundle nor a baseline")
def baseline_class() -> None:
    text = Path("baseline.json").read_text()
    Path("baseline.json").write_text(re.sub(r'("[0-9a-f]{16}"): \d', r"\1: -1", text))


@row("baseline", "deep JSON", f"{EVALUATE} data --baseline baseline.json", "neither a bundle nor a baseline")
def baseline_deep() -> None:
    Path("baseline.json").write_text('{"a":' * 100_000)


@row("predictions", "of another model", f"{EVALUATE} data --predictions predictions.jsonl", "its model is ?]0;owned??")
def predictions_model() -> None:
    text = Path("predictions.jsonl").read_text()
    Path("predictions.jsonl").write_text(text.replace('"model":"small"', f'"model":{json.dumps(ESCAPE)}', 1))


@row("predictions", "an image twice", f"{EVALUATE} data --predictions predictions.jsonl", "so it was cut off")
def predictions_twice() -> None:
    lines = Path("predictions.jsonl").read_text().splitlines(keepends=True)
    Path("predictions.jsonl").write_text("".join([*lines[:-1], lines[-2]]))


# Options and environment variables: nothing to spoil.

OPTIONS = {
    "--batch 0": ("build card.toml --weights synthetic --batch 0", "must satisfy 1 <= MIN <= OPT <= MAX <= 4096"),
    "--batch 9,1,2": ("build card.toml --weights synthetic --batch 9,1,2", "must satisfy 1 <= MIN <= OPT <= MAX"),
    "--batch 1e3": ("build card.toml --weights synthetic --batch 1e3", "expected MIN,OPT,MAX"),
    "--batch 9 x 9": ("build card.toml --weights synthetic --batch 999999999", "expected MIN,OPT,MAX"),
    "--batch in Arabic digits": ("build card.toml --weights synthetic --batch \u0661", "expected MIN,OPT,MAX"),
    "--batch of bench, empty": ("bench bundle --batch ,", "expected batch sizes with commas between"),
    "--groups -4": ("build card.toml --weights synthetic --groups -4", "--groups -4"),
    "--groups 10^30": (f"build card.toml --weights synthetic --groups {10**30}", f"--groups {10**30}"),
    "--groups \u00b2": ("build card.toml --weights synthetic --groups \u00b2", "--groups \u00b2"),
    "--weights synthetic:-1": ("export card.toml --weights synthetic:-1", "the seed must be a whole number"),
    "--weights of 300 letters": (f"export card.toml --weights {'a' * 300}", "File name too long"),
    "--seconds nan": ("bench bundle --seconds nan", "--seconds nan: must be more than 0"),
    "--seconds inf": ("bench bundle --seconds inf", "--seconds inf: must be more than 0"),
    "--max-drop nan": (f"{EVALUATE} data --baseline baseline.json --max-drop nan", "nan"),
    "--min-sqnr inf": (
        "build card.toml --weights synthetic --int8 --calibration-data data --min-sqnr inf",
        "--min-sqnr inf: it must be a number of dB",
    ),
    "--seed -1": ("calibrate card.toml --weights weights.safetensors --calibration-data data --seed -1", "seed -1"),
    "--keep of no layer": (
        "calibrate card.toml --weights weights.safetensors --calibration-data data --keep nothing",
        "nothing",
    ),
    "--device of none": ("classify bundle image.png --device quantum", "quantum"),
    "--device cpu:-1": ("classify bundle image.png --device cpu:-1", "cpu:-1"),
    "--name ../x": ("package bundle --format triton -o repository --name ../x", "--name ../x"),
    "--max-delay-ms nan": ("package bundle --format triton -o repository --max-delay-ms nan", "--max-delay-ms nan"),
    "-o, a folder of something else": (
        "build card.toml --weights synthetic -o data",
        "the folder exists and is no bundle",
    ),
    "-o, the root": ("build card.toml --weights synthetic -o /", "is the working directory or above it"),
    "-o, below a file": ("export card.toml --weights synthetic -o card.toml/x.onnx", "output card.toml/x.onnx"),
    "-o, a name of 300 letters": (f"build card.toml --weights synthetic -o {'a' * 300}", "File name too long"),
    "MODEL, a device": ("export /dev/zero --weights synthetic", "not a plain file"),
    "MODEL, unknown": ("export gluon_resnext51 --weights synthetic", "did you mean"),
    "BUNDLE, a file": ("inspect card.toml", "not a bundle"),
    "--labels, a device": ("classify bundle image.png --labels /dev/zero", "not a plain file"),
    "--plot, a .exe": ("bench bundle --plot plot.exe", "plot.exe"),
}
for fault, (command, error) in OPTIONS.items():
    ROWS.append(Row("options", fault, lambda: None, command, 2, error))


@pytest.mark.parametrize("each", [pytest.param(each, id=f"{each.input}-{each.fault}") for each in ROWS])
def test_hostile(each: Row, place: Any, record_property: Any) -> None:
    each.spoil()
    before = place.contents()
    result = place.run(*each.command.split())
    record_property("row", (each.input, each.fault, result.code, *result.errors))
    place.assert_refused(result, each.code, each.error)
    assert place.contents() == before
    assert not CANARY.exists()


ENVIRONMENT = {
    "RXDEPLOY_CACHE_LIMIT_GB=nan": (2, "must be a number of gigabytes, 0 or more"),
    "RXDEPLOY_CACHE_LIMIT_GB=-1": (2, "must be a number of gigabytes, 0 or more"),
    "RXDEPLOY_CACHE_LIMIT_GB=1e999": (2, "must be a number of gigabytes, 0 or more"),
    "RXDEPLOY_CACHE_LIMIT_GB=much": (2, "must be a number of gigabytes, 0 or more"),
    "RXDEPLOY_CACHE_LIMIT_GB=": (2, "must be a number of gigabytes, 0 or more"),
    "RXDEPLOY_CACHE=card.toml": (2, "card.toml"),
    "RXDEPLOY_CACHE=/dev/null/cache": (2, "/dev/null"),
    f"RXDEPLOY_CACHE={'a' * 300}": (2, "File name too long"),
    f"RXDEPLOY_CACHE_LIMIT_GB={ESCAPE}": (2, "?]0;owned??[2J"),
    "HTTP_PROXY=quic://127.0.0.1": (3, "HTTP_PROXY"),
    "SSL_CERT_FILE=missing.pem": (3, "SSL_CERT_FILE"),
}


@pytest.mark.parametrize("setting", ENVIRONMENT)
def test_environment(setting: str, place: Any, record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx")
    variable, _, value = setting.partition("=")
    for other in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(other, raising=False)
    if "CACHE" not in variable:
        monkeypatch.setenv("RXDEPLOY_CACHE", "../cache")  # the card's weights are in none, so they are asked for
        url = '[weights]\nurl = "http://127.0.0.1:9/small.pth"\nsha256_prefix = "01234567"\n'
        Path("card.toml").write_text(Path("card.toml").read_text() + url)
    monkeypatch.setenv(variable, value)
    before = place.contents()
    command = "export card.toml --weights weights.safetensors --fp32 -o out.onnx"
    result = place.run(*command.split()[: None if "CACHE" in variable else 2])
    code, error = ENVIRONMENT[setting]
    record_property("row", ("environment", setting, result.code, *result.errors))
    place.assert_refused(result, code, error)
    assert place.contents() == before


def test_a_link_to_a_bundle_is_followed(place: Any) -> None:
    Path("current").symlink_to("bundle")
    result = place.run("classify", "current", "image.png")
    assert (result.code, result.errors) == (0, [])


@pytest.mark.parametrize("command", ["inspect bundle", "inspect bundle --json", "inspect bundle --layers", CLASSIFY])
def test_no_text_of_a_bundle_commands_the_terminal(command: str, place: Any) -> None:
    def change(manifest: Any) -> None:
        for key in ("model", "command", "tools"):
            manifest[key] = {str: ESCAPE, list: [ESCAPE], dict: {ESCAPE: ESCAPE}}[type(manifest[key])]
        for part, key in (("target", "reason"), ("weights", "source"), ("card", "description")):
            manifest[part][key] = f"{ESCAPE}\nfiles          none"
        manifest["inputs"][0]["layout"] = manifest["validation"]["reference"] = ESCAPE

    _manifest(change)
    result = place.run(*command.split())
    assert (result.code, result.errors) == (0, [])
    assert "small" not in result.out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.out + result.err)
    assert "\nfiles " not in result.out
