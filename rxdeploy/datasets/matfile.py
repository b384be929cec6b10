"""Struct arrays from MATLAB files of level 5 ("MAT-File Format", The MathWorks, chapter 1), for ImageNet's meta.mat.

Only what that file has: structs of texts and real numbers. Other values are read as None.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

Value = str | float | None

_MOST_BYTES = 64 << 20  # of a variable, uncompressed; meta.mat's is below 2 MB
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 16: "utf-8"}  # and 4, 17: UTF-16 in the file's byte order
_STRUCT_CLASS, _CHAR_CLASS = 2, 4
_NUMERIC_CLASSES = range(6, 16)


def read_structs(data: bytes, name: str) -> list[dict[str, Value]]:
    """The elements of the struct array `name`, as dicts. ValueError when the file has none or is damaged."""
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
        raise ValueError("not a MATLAB file of level 5")
    order = "<" if data[126:128] == b"IM" else ">"
    try:
        for kind, content in _elements(data[128:], order, top=True):
            if kind == _COMPRESSED:
                content = _inflated(content)
                kind, content = next(_elements(content, order))
            if kind == _MATRIX:
                found = _structs(content, order, name)
                if found is not None:
                    return found
    except (struct.error, zlib.error, StopIteration, UnicodeDecodeError, IndexError, KeyError) as error:
        raise ValueError(f"damaged: {error!r}") from None
    raise ValueError(f"it has no variable {name} that is a struct array")


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    content = inflater.decompress(data, _MOST_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"a variable of more than {_MOST_BYTES:,} bytes")
    if not inflater.eof:
        raise ValueError("damaged: it ends within a variable")
    return content


def _elements(data: bytes, order: str, top: bool = False) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element; the content of a short one is in its tag."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:
            yield kind & 0xFFFF, data[at + 4 : at + 4 + min(kind >> 16, 4)]
            at += 8
            continue
        if at + 8 + size > len(data):
            raise ValueError("damaged: it ends within a variable")
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size
        if not (top and kind == _COMPRESSED):
            at += -size % 8


def _structs(matrix: bytes, order: str, name: str) -> list[dict[str, Value]] | None:
    parts = _elements(matrix, order)
    flags, dimensions, own_name = next(parts)[1], next(parts)[1], next(parts)[1]
    if own_name.decode("latin-1") != name or _class_of(flags, order) != _STRUCT_CLASS:
        return None
    width = struct.unpack_from(order + "i", next(parts)[1])[0]
    names = next(parts)[1]
    if width < 1 or not names:
        raise ValueError("damaged: a struct without fields")
    fields = [names[at : at + width].partition(b"\0")[0].decode("latin-1") for at in range(0, len(names), width)]
    count = int(np.prod(np.frombuffer(dimensions, order + "i4"), dtype=np.int64))
    return [{field: _value(next(parts)[1], order) for field in fields} for _ in range(count)]


def _class_of(flags: bytes, order: str) -> int:
    return struct.unpack_from(order + "I", flags)[0] & 0xFF


def _value(matrix: bytes, order: str) -> Value:
    """A text, one real number, or None for anything else."""
    parts = list(_elements(matrix, order))
    if len(parts) < 4:
        return None
    kind, content = parts[3]
    if _class_of(parts[0][1], order) == _CHAR_CLASS:
        return content.decode(_TEXTS.get(kind) or ("utf-16-le" if order == "<" else "utf-16-be"))
    if _class_of(parts[0][1], order) in _NUMERIC_CLASSES and kind in _NUMBERS:
        numbers = np.frombuffer(content, order + _NUMBERS[kind])
        return float(numbers[0]) if len(numbers) == 1 else None
    return None
