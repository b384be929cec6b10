"""Every file that rxdeploy reads, spoilt in every ordinary way: the table of docs/reliability.md, first part.

A row says what is spoilt and how, and what has to come of it: the exit code of docs, one error on stderr, and nothing
written or lost. `reliability/inputs.py` prints the table from what these tests saw.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TEBI = 1 << 40


class Input(NamedTuple):
    """A file, a command that reads it, and what comes of each fault: its name, the exit code, part of the error."""

    file: str
    command: str
    faults: str


EXPORT = "export card.toml --weights weights.safetensors --fp32 -o out.onnx"
EVALUATE = "evaluate bundle --data"
# Of a file in a bundle every byte counts; {file} is its name.
IN_A_BUNDLE = """
missing        2  {file} is missing
empty          2  {file} has 0 bytes, the manifest says
truncated      2  {file} has
flipped        2  {file} was altered: its sha256 begins
head_flipped   2  {file} was altered: its sha256 begins
oversized      2  {file} has 1099511627776 bytes, the manifest says
long_line      2  {file} has 10000000 bytes, the manifest says
zeros          2  {file} has 10000 bytes, the manifest says
utf16          2  {file} has 24 bytes, the manifest says
not_utf8       2  {file} has 3 bytes, the manifest says
folder         2  {file} is not a plain file
pipe           2  {file} is not a plain file
device         2  {file} is not a plain file
link           2  {file} is not a plain file
"""

INPUTS = {
    "weights, safetensors": Input(
        "weights.safetensors",
        EXPORT,
        """
missing        2  weights file weights.safetensors: no such file
empty          2  damaged or in no format we read
truncated      2  damaged or in no format we read
flipped        0
head_flipped   2  damaged or in no format we read
oversized      2  1,099,511,627,776 bytes; no model that one ONNX file can hold has so many
long_line      2  damaged or in no format we read
zeros          2  damaged or in no format we read
utf16          2  damaged or in no format we read
not_utf8       2  damaged or in no format we read
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "weights, PyTorch": Input(
        "weights.pth",
        "export card.toml --weights weights.pth --fp32 -o out.onnx",
        """
missing        2  weights file weights.pth: no such file
empty          2  damaged or in no format we read
truncated      2  weights file weights.pth: damaged
flipped        0
head_flipped   2  nothing of it was run
oversized      2  1,099,511,627,776 bytes; no model that one ONNX file can hold has so many
long_line      2  weights file weights.pth: damaged
zeros          2  nothing of it was run
utf16          2  nothing of it was run
not_utf8       2  nothing of it was run
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "card": Input(
        "card.toml",
        EXPORT,
        """
missing        2  card card.toml: no such file
empty          2  Object missing required field `schema`
truncated      2  not a TOML file
flipped        2  not a TOML file
head_flipped   2  not a TOML file
oversized      2  1,099,511,627,776 bytes, more than the 1,048,576 that such a file may have
long_line      2  10,000,000 bytes, more than the 1,048,576 that such a file may have
zeros          2  not a TOML file
utf16          2  not a TOML file
not_utf8       2  not a TOML file
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "class names": Input(
        "names.txt",
        "classify bundle image.png --labels names.txt",
        """
missing        2  labels file names.txt: no such file
empty          2  0 lines, but the model has 3 classes
truncated      2  2 lines, but the model has 3 classes
flipped        0
head_flipped   2  cannot be read as UTF-8 text
oversized      2  1,099,511,627,776 bytes, more than the 67,108,864 that such a file may have
long_line      2  1 lines, but the model has 3 classes
zeros          2  1 lines, but the model has 3 classes
utf16          2  cannot be read as UTF-8 text
not_utf8       2  cannot be read as UTF-8 text
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "ONNX model": Input(
        "model.onnx",
        "validate card.toml --weights weights.safetensors --fp32 --onnx model.onnx",
        """
missing        2  ONNX file model.onnx: no such file
empty          2  ONNX Runtime cannot load model.onnx
truncated      2  ONNX Runtime cannot load model.onnx
flipped        1  validation of the fp32 model on CPUExecutionProvider failed
head_flipped   2  ONNX Runtime cannot load model.onnx
oversized      2  ONNX Runtime cannot load model.onnx
long_line      2  ONNX Runtime cannot load model.onnx
zeros          2  ONNX Runtime cannot load model.onnx
utf16          2  ONNX Runtime cannot load model.onnx
not_utf8       2  ONNX Runtime cannot load model.onnx
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "calibration file": Input(
        "calibration.json",
        "export card.toml --weights weights.safetensors --int8 --calibration calibration.json -o out.onnx",
        """
missing        2  calibration calibration.json: no such file
empty          2  damaged, or not made by rxdeploy
truncated      2  damaged, or not made by rxdeploy
flipped        2  damaged, or not made by rxdeploy
head_flipped   2  damaged, or not made by rxdeploy
oversized      2  1,099,511,627,776 bytes, more than the 67,108,864 that such a file may have
long_line      2  damaged, or not made by rxdeploy
zeros          2  damaged, or not made by rxdeploy
utf16          2  damaged, or not made by rxdeploy
not_utf8       2  damaged, or not made by rxdeploy
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "manifest": Input(
        "bundle/manifest.json",
        "classify bundle image.png",
        """
missing        2  not a bundle (there is no manifest.json)
empty          2  manifest.json is damaged
truncated      2  manifest.json is damaged
flipped        2  manifest.json
head_flipped   2  manifest.json is damaged
oversized      2  1,099,511,627,776 bytes, more than the 16,777,216 that such a file may have
long_line      2  manifest.json is damaged
zeros          2  manifest.json is damaged
utf16          2  manifest.json is damaged
not_utf8       2  manifest.json is damaged
folder         2  manifest.json: not a plain file
pipe           2  manifest.json: not a plain file
device         2  manifest.json is a link, which no bundle has
link           2  manifest.json is a link, which no bundle has
""",
    ),
    "model in a bundle": Input(
        "bundle/model.onnx", "classify bundle image.png", IN_A_BUNDLE.replace("{file}", "model.onnx")
    ),
    "plan in a bundle": Input(
        "planned/engine.plan", "classify planned image.png", IN_A_BUNDLE.replace("{file}", "engine.plan")
    ),
    "labels in a bundle": Input(
        "bundle/labels.txt", "classify bundle image.png", IN_A_BUNDLE.replace("{file}", "labels.txt")
    ),
    "image, PNG": Input(
        "image.png",
        "classify bundle image.png",
        """
missing        2  image image.png: no such file
empty          2  not an image in a format rxdeploy reads
truncated      2  cannot be decoded
flipped        2  cannot be decoded
head_flipped   2  not an image in a format rxdeploy reads
oversized      0
long_line      2  not an image in a format rxdeploy reads
zeros          2  not an image in a format rxdeploy reads
utf16          2  not an image in a format rxdeploy reads
not_utf8       2  not an image in a format rxdeploy reads
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "image, JPEG": Input(
        "image.jpg",
        "classify bundle image.jpg",
        """
missing        2  image image.jpg: no such file
empty          2  not an image in a format rxdeploy reads
truncated      2  cannot be decoded
flipped        0
head_flipped   2  not an image in a format rxdeploy reads
oversized      0
long_line      2  not an image in a format rxdeploy reads
zeros          2  not an image in a format rxdeploy reads
utf16          2  not an image in a format rxdeploy reads
not_utf8       2  not an image in a format rxdeploy reads
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "data, tar": Input(
        "data.tar",
        f"{EVALUATE} data.tar",
        """
missing        2  data data.tar: no such file or folder
empty          2  cannot be read as a tar
truncated      2  damaged or cut off at byte
flipped        2  damaged or cut off at byte
head_flipped   2  cannot be read as a tar
oversized      0
long_line      2  cannot be read as a tar
zeros          2  no images in it
utf16          2  cannot be read as a tar
not_utf8       2  cannot be read as a tar
folder         2  no images in it
pipe           2  neither a folder nor a plain file
device         2  neither a folder nor a plain file
link           0
""",
    ),
    "data, npz": Input(
        "data.npz",
        f"{EVALUATE} data.npz",
        """
missing        2  data data.npz: no such file or folder
empty          2  it is no zip, or cut off
truncated      2  it is no zip, or cut off
flipped        2  cannot be read as an .npz file
head_flipped   2  cannot be read as an .npz file
oversized      2  it is no zip, or cut off
long_line      2  it is no zip, or cut off
zeros          2  it is no zip, or cut off
utf16          2  it is no zip, or cut off
not_utf8       2  it is no zip, or cut off
folder         2  no images in it
pipe           2  neither a folder nor a plain file
device         2  neither a folder nor a plain file
link           0
""",
    ),
    "labels of images": Input(
        "labels.csv",
        f"{EVALUATE} flat --labels labels.csv",
        """
missing        2  labels file labels.csv: no such file
empty          2  it is empty
truncated      2  no label in the line 'bee1.'
flipped        2  no label for 1 of 12 images in data flat, bee1.png first
head_flipped   2  cannot be read as UTF-8 text
oversized      2  1,099,511,627,776 bytes, more than the 268,435,456 that such a file may have
long_line      2  it has one label a line, in the order of the images' numbers
zeros          2  it has one label a line, in the order of the images' numbers
utf16          2  cannot be read as UTF-8 text
not_utf8       2  cannot be read as UTF-8 text
folder         2  not the ILSVRC2012 development kit
pipe           2  neither a plain file nor a folder
device         2  neither a plain file nor a folder
link           0
""",
    ),
    "list of images": Input(
        "list.txt",
        "calibrate card.toml --weights weights.safetensors --calibration-data data --calibration-list list.txt"
        " -o out.json",
        """
missing        2  list list.txt: no such file
empty          2  it names no images
truncated      2  6 images to calibrate with; at least 8 are needed
flipped        2  1 of its images are not in data
head_flipped   2  cannot be read as UTF-8 text
oversized      2  1,099,511,627,776 bytes, more than the 268,435,456 that such a file may have
long_line      2  1 of its images are not in data
zeros          2  1 of its images are not in data
utf16          2  cannot be read as UTF-8 text
not_utf8       2  cannot be read as UTF-8 text
folder         2  not a plain file
pipe           2  not a plain file
device         2  not a plain file
link           0
""",
    ),
    "baseline": Input(
        "baseline.json",
        f"{EVALUATE} data --baseline baseline.json",
        """
missing        2  no such file or bundle
empty          2  neither a bundle nor a baseline
truncated      2  neither a bundle nor a baseline
flipped        2  neither a bundle nor a baseline
head_flipped   2  neither a bundle nor a baseline
oversized      2  1,099,511,627,776 bytes, more than the 1,073,741,824 that such a file may have
long_line      2  neither a bundle nor a baseline
zeros          2  neither a bundle nor a baseline
utf16          2  neither a bundle nor a baseline
not_utf8       2  neither a bundle nor a baseline
folder         2  not a bundle (there is no manifest.json)
pipe           2  neither a bundle nor a plain file
device         2  neither a bundle nor a plain file
link           0
""",
    ),
    "predictions": Input(
        "predictions.jsonl",
        f"{EVALUATE} data --predictions predictions.jsonl",
        """
missing        0
empty          2  exists and is no predictions file
truncated      2  is damaged
flipped        2  is damaged
head_flipped   2  exists and is no predictions file
oversized      2  line 14 is damaged
long_line      2  exists and is no predictions file
zeros          2  exists and is no predictions file
utf16          2  exists and is no predictions file
not_utf8       2  exists and is no predictions file
folder         2  is a folder; give a file name
pipe           2  exists and is no plain file
device         2  exists and is no plain file
link           0
""",
    ),
}


# What may happen to a file.


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def head_flipped(path: Path) -> None:
    """The highest bit of each of the first eight bytes."""
    data = bytearray(path.read_bytes())
    data[:8] = bytes(byte ^ 0x80 for byte in data[:8])
    path.write_bytes(data)


def oversized(path: Path) -> None:
    """A terabyte, nearly all of it a hole."""
    os.truncate(path, TEBI)


def long_line(path: Path) -> None:
    path.write_bytes(b"a" * 10_000_000)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(10_000))


def utf16(path: Path) -> None:
    path.write_bytes("schema = 1\n".encode("utf-16"))


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xfd")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """One that nobody writes to: opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    """An endless one, through a link."""
    path.unlink()
    path.symlink_to("/dev/zero")


def link(path: Path) -> None:
    """To a good file of the same content elsewhere."""
    elsewhere = Path("../elsewhere").resolve()
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


FAULTS = (
    *(missing, empty, truncated, flipped, head_flipped, oversized, long_line, zeros, utf16, not_utf8),
    *(folder, pipe, device, link),
)


def rows() -> list[Any]:
    """Input, fault, exit code and part of the error of each row."""
    found = []
    for name, spoilt in INPUTS.items():
        for line in spoilt.faults.strip().splitlines():
            fault, code, *error = line.split(maxsplit=2)
            found.append(pytest.param(name, fault, int(code), "".join(error), id=f"{name}-{fault}"))
    return found


def test_no_cell_is_left_out() -> None:
    cells = {row.values[:2] for row in rows()}
    assert cells == {(name, fault.__name__) for name in INPUTS for fault in FAULTS}
    assert len(rows()) == len(cells)


@pytest.mark.parametrize(("name", "fault", "code", "error"), rows())
def test_fault(name: str, fault: str, code: int, error: str, place: Any, record_property: Any) -> None:
    spoilt = INPUTS[name]
    next(each for each in FAULTS if each.__name__ == fault)(Path(spoilt.file))
    before = place.contents()
    result = place.run(*spoilt.command.split())
    record_property("row", (name, fault.replace("_", " "), result.code, *result.errors))
    if code == 0:
        assert (result.code, result.errors) == (0, [])
        return
    place.assert_refused(result, code, error)
    assert place.contents() == before
