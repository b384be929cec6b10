"""Image files in folders: what is listed, and reading it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rxdeploy.datasets.dataset import Item
from rxdeploy.errors import InputError, from_os_error

# Of the formats that rxdeploy.runtime.preprocess decodes. What has another ending is no image here.
ENDINGS = frozenset(
    f".{ending}"
    for ending in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2", "j2k"),
        *("png", "webp", "avif", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "pbm"),
    )
)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return name.startswith(".") or "/." in name


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its ending, and not hidden."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in ENDINGS


@dataclass(frozen=True)
class FolderSource:
    """Files below a folder; an item's name is the path from there."""

    root: Path

    def read(self, index: int, item: Item) -> bytes:
        return (self.root / item.name).read_bytes()


@dataclass(frozen=True)
class Listing:
    """What lies in a folder. `folders`: its non-hidden subfolders, the empty ones too. `images`: name, size, stamp,
    sorted by name. `others`: number of files that are no images; `tars`: names of tar files directly in it.
    """

    folders: tuple[str, ...]
    images: tuple[tuple[str, int, int], ...]
    others: int
    tars: tuple[str, ...]


def list_folder(root: Path) -> Listing:
    """Everything below `root`. Links are followed, each folder once on the way down, so that loops end.

    Hidden files and folders are passed over. An image that cannot be examined (a link to nowhere, say) is listed
    with size 0, and reading it will say why. InputError for a folder that cannot be read.
    """
    folders: list[str] = []
    tars: list[str] = []
    images: list[tuple[str, int, int]] = []
    others = 0
    for name, entry in _walk(root):
        if entry is None:
            folders.append(name)
        elif is_image_name(name):
            facts = _facts(entry)
            if facts:
                images.append((name, *facts))
            else:
                others += 1
        elif name.endswith(".tar") and "/" not in name:
            tars.append(name)
        else:
            others += 1
    return Listing(tuple(sorted(folders)), tuple(sorted(images)), others, tuple(sorted(tars)))


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
    """Names from the root with their entries; the folders directly in the root with None. Not recursive: a tree may be
    deeper than Python's stack.
    """
    # Folders to read, with those that they lie in, as a linked list.
    left: list[tuple[str, _Above | None]] = [("", None)]
    while left:
        prefix, above = left.pop()
        folder = root / prefix
        try:
            here = _Above(*_identity(folder), above)
            if above is not None and above.holds(here):
                continue  # a link to a folder that we are in
            with os.scandir(folder) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise from_os_error(error, f"reading data {root}") from None
        for entry in found:
            name = prefix + entry.name
            try:
                name.encode()
            except UnicodeEncodeError:
                raise InputError(f"data {folder}: the file name {name!r} is not UTF-8; rename it") from None
            if _is_folder(entry):
                if not prefix:
                    yield name, None
                left.append((f"{name}/", here))
            else:
                yield name, entry


@dataclass(frozen=True)
class _Above:
    """A folder, by device and number, and the one that it was found in."""

    device: int
    number: int
    above: _Above | None

    def holds(self, other: _Above) -> bool:
        """Whether `other` is this folder or one above it."""
        at: _Above | None = self
        while at is not None:
            if (at.device, at.number) == (other.device, other.number):
                return True
            at = at.above
        return False


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _facts(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Size and time of change; None for what is no plain file."""
    try:
        facts = entry.stat()
    except OSError:
        return 0, 0
    return (facts.st_size, facts.st_mtime_ns) if stat.S_ISREG(facts.st_mode) else None
