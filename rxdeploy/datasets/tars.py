"""Images in tars, read where they lie: one pass over the headers at first, then one read for an image."""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from rxdeploy.datasets.dataset import Item
from rxdeploy.datasets.folders import is_hidden, is_image_name
from rxdeploy.errors import InputError, first_line, from_os_error, printable

_BLOCK = tarfile.BLOCKSIZE
_LARGEST_HEADER = 16 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class TarSource:
    """Members by tar and place in it. A read opens the tar anew: no more than one open file for each thread."""

    tars: Sequence[Path]
    tar_of: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def read(self, index: int, item: Item) -> bytes:
        path = self.tars[self.tar_of[index]]
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_mtime_ns != item.stamp:
                raise InputError(f"{path} has changed since it was opened")
            offset, data = int(self.offsets[index]), bytearray()
            while len(data) < item.size:
                more = os.pread(file, item.size - len(data), offset + len(data))
                if not more:
                    raise InputError(f"{path} ends within it")
                data += more
            return bytes(data)
        finally:
            os.close(file)


class Members:
    """The images in one tar or several, added before any is asked for.

    `nested`: they are in class tars, called `classes`. `others`: number of members that are no images.
    """

    def __init__(self) -> None:
        self.nested = False
        self.classes: list[str] = []
        self.others = 0
        self._tars: list[Path] = []
        self._stamps: list[int] = []
        self._found: dict[str, tuple[int, int, int]] = {}  # name: tar, offset, size

    def add_tar(self, path: Path, stamp: int) -> None:
        """The tar that the members added next are in."""
        self._tars.append(path)
        self._stamps.append(stamp)

    def add(self, name: str, offset: int, size: int) -> None:
        """A member; of two with one name the later counts, as for tar itself."""
        self._found[name] = (len(self._tars) - 1, offset, size)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._found)

    def facts(self) -> list[tuple[str, int, int]]:
        """Name, size and stamp of each image, sorted by name."""
        return [(name, size, self._stamps[tar]) for name, (tar, _, size) in self._in_order]

    def source(self) -> TarSource:
        """What reads them, in the same order."""
        places = [place for _, place in self._in_order]
        tar_of = np.array([tar for tar, _, _ in places], np.int32)
        return TarSource(tuple(self._tars), tar_of, np.array([offset for _, offset, _ in places], np.int64))

    @functools.cached_property
    def _in_order(self) -> list[tuple[str, tuple[int, int, int]]]:
        return sorted(self._found.items())


def index_tar(path: Path) -> Members:
    """The images in a tar, or in the tars in it. InputError for what is no tar, is compressed, or is cut off."""
    members = Members()
    with _opened(path) as file:
        members.add_tar(path, os.fstat(file.fileno()).st_mtime_ns)
        inner: list[tuple[str, int, int]] = []
        for name, offset, size in _members(file, f"data {path}"):
            if is_image_name(name):
                members.add(name, offset, size)
            elif name.endswith(".tar") and not is_hidden(name):
                inner.append((name, offset, size))
            else:
                members.others += 1
        if inner and len(members):
            raise InputError(f"data {path}: both images and tars in it; give one kind")
        for name, offset, size in inner:
            members.nested = True
            stem = name.rpartition("/")[2].removesuffix(".tar")
            members.classes.append(stem)
            with io.BufferedReader(_Section(file, offset, size)) as section:
                _add_class(members, section, stem, f"data {path}: {printable(name)}", offset)
    if members.nested and not len(members):
        raise InputError(f"data {path}: no images in it")
    return members


def index_tars(paths: Sequence[Path]) -> Members:
    """The images in class tars; the name of each begins with its tar's, without the ending."""
    members = Members()
    members.nested = True
    for path in paths:
        with _opened(path) as file:
            members.add_tar(path, os.fstat(file.fileno()).st_mtime_ns)
            members.classes.append(path.stem)
            _add_class(members, file, path.stem, f"data {path}", 0)
    if not len(members):
        raise InputError(f"data {paths[0].parent}: no images in the {len(paths)} tars in it")
    return members


def _add_class(members: Members, file: BinaryIO, stem: str, what: str, base: int) -> None:
    for name, offset, size in _members(file, what):
        if is_image_name(name):
            members.add(f"{stem}/{name}", base + offset, size)
        else:
            members.others += 1


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise from_os_error(error, f"reading data {path}") from None


def _members(file: BinaryIO, what: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each plain file in a tar, which must be whole. Links are passed over."""
    try:
        with tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as tar:
            at = -1
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # or it keeps them all
                if tar.offset <= at or member.size < 0:
                    raise tarfile.ReadError("a header that leads back")  # round and round, or before the beginning
                at = tar.offset
                if member.isreg() and not member.issparse():
                    yield _safe_name(member.name, what), member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise InputError(f"{what}: damaged or cut off at byte {tar.offset:,}; fetch it again")
    except tarfile.TarError as error:
        file.seek(0)
        kind = _COMPRESSED.get(file.read(2))
        if kind:
            raise InputError(f"{what}: compressed with {kind}, so one image cannot be read; uncompress it") from None
        raise InputError(f"{what}: cannot be read as a tar: {printable(first_line(error))}") from None
    except OSError as error:
        raise from_os_error(error, f"reading {what}") from None
    except InputError:
        raise
    except Exception as error:  # what a damaged header leads tarfile to: numbers that are none, endless nesting
        raise InputError(f"{what}: cannot be read as a tar: {printable(first_line(error))}") from None


def _safe_name(name: str, what: str) -> str:
    """The name without a leading "./" or "/". Nothing is unpacked, so ".." could do no harm, but is no honest name."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InputError(f"{what}: the member {printable(name)} points out of it; that is no tar of images to trust")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what}: the member {name!a} has a name that is not UTF-8") from None
    return "/".join(parts)


class _Headers:
    """A tar's file, for reading headers: nothing large, as a header could ask for that says how long it is itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


class _Section(io.RawIOBase):
    """Part of a file as a file. Closing it leaves the file open."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._offset + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
