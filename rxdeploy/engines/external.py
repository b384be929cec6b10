"""Whether an ONNX file keeps weights in other files, told from its bytes: a serving host has no onnx to ask.

A bundle's digests cover the files that it lists, and a tensor of its model could name any other. The fields are those
of onnx/onnx.proto3, the encoding is protobuf's (protobuf.dev, "Encoding"). What breaks its rules, no engine loads.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_ORT_FORMAT = b"ORTM"  # in the place of a flatbuffer's identifier: ONNX Runtime's own format, which it tells by that

# The messages on the way to a tensor: field number to what it holds.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "elsewhere"},  # external_data, which only a tensor has that lies in another file
}
_VARINT, _EIGHT_BYTES, _BYTES, _GROUP, _GROUP_END, _FOUR_BYTES = range(6)


def keeps_weights_elsewhere(path: Path) -> bool:
    """Whether the model at `path` is more than its file: a tensor in it lies in another, or it is not ONNX's format."""
    with path.open("rb") as file:
        if not file.read(1):
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:  # of 300 MB, some pages are looked at
            if data[4:8] == _ORT_FORMAT:
                return True
            try:
                return _holds_elsewhere(data)
            except (IndexError, ValueError):
                return False


def _holds_elsewhere(data: mmap.mmap) -> bool:
    left = [("model", 0, len(data))]
    while left:
        message, at, end = left.pop()
        if message == "elsewhere":
            return True
        known, groups = _FIELDS[message], 0
        while at < end:
            begin = at
            tag, at = _varint(data, at)
            if at - begin > 5:
                raise ValueError("a tag of more bytes than parsers take")
            tag &= 0xFFFFFFFF  # as they do: field 13 + 2**29 is field 13
            kind = tag & 7
            if kind == _VARINT:
                _, at = _varint(data, at)
            elif kind == _BYTES:
                size, at = _varint(data, at)
                if size > end - at:
                    raise ValueError("a field that ends after what it is in")
                if not groups and tag >> 3 in known:
                    left.append((known[tag >> 3], at, at + size))
                at += size
            elif kind in (_GROUP, _GROUP_END):  # of old; ONNX has none, and parsers pass over them
                groups += 1 if kind == _GROUP else -1
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                at += 8 if kind == _EIGHT_BYTES else 4
            else:
                raise ValueError("a field of no kind")
    return False


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the least first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise ValueError("a number of more than ten bytes")
