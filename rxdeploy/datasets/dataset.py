"""Dataset: which images there are, what their classes are, and how to read one.

Nothing is decoded and nothing is kept here but names and numbers, so a data set of a million images opens in the
memory that their names take; `Stream` reads the images, a batch at a time.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rxdeploy.errors import InputError

Layout = Literal["folders", "flat", "tar", "class tars", "npz", "arrays"]

_IMAGENET_VAL = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
_VAL_IMAGES, _VAL_CLASSES = 50_000, 1000  # and 50 of each class: Russakovsky et al. 2015, table 2


@dataclass(frozen=True, slots=True)
class Item:
    """One image, not yet read.

    `name`: unique in its data set, the same each time it is opened ("n01440764/n01440764_18.JPEG"). `label`: index
    of its class in the logits, None where it is not known. `size`: bytes of the file or array. `stamp`: when the
    file, or the tar or npz that it lies in, was changed, in ns since 1970; 0 for arrays.
    """

    name: str
    label: int | None
    size: int
    stamp: int


class Source(Protocol):
    """Where the images lie. Reads are independent of one another, so threads may share it."""

    def read(self, index: int, item: Item) -> bytes | NDArray[np.uint8]:
        """The image of `item`, which is number `index` in the data set; InputError or OSError when it cannot be."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in the order of their names; made by `open_dataset` and `from_arrays`.

    `labelled`: every image has its class. `class_order`: how names of classes became indices of logits, in words.
    `notes`: what was found that its user should hear about, in whole sentences.
    """

    root: Path
    layout: Layout
    items: tuple[Item, ...]
    num_classes: int
    source: Source
    class_order: str = ""
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def labelled(self) -> bool:
        """Whether every image has its class."""
        return all(item.label is not None for item in self.items)

    def read(self, item: Item) -> bytes | NDArray[np.uint8]:
        """The file's bytes, or the array, uint8 (height, width, 3), of one item.

        InputError or OSError when it cannot be read. May be called from several threads at once.
        """
        index = bisect.bisect_left(self.items, item.name, key=_name)
        if index == len(self.items) or self.items[index].name != item.name:
            raise InputError(f"data {self.root}: it has no image {item.name}")
        return self.source.read(index, item)

    def fingerprint(self, items: Iterable[Item] | None = None) -> str:
        """sha256 over names, labels, sizes and stamps of `items` in their order, of all when None.

        It tells whether anything has changed without reading the images; of arrays, which are in memory anyway, the
        content is in it instead of the file's time of change.
        """
        digest = hashlib.sha256()
        for item in self.items if items is None else items:
            facts: list[Any] = [item.name, item.label, item.size]
            facts += [0, digest_of(self.read(item))] if self.layout in ("arrays", "npz") else [item.stamp]
            digest.update(json.dumps(facts).encode() + b"\n")
        return digest.hexdigest()

    @property
    def is_imagenet_val(self) -> bool:
        """Whether it is the validation set of ILSVRC2012, whole, as far as names and labels tell."""
        return not self.not_imagenet_val

    @functools.cached_property
    def not_imagenet_val(self) -> str:
        """Why it is not the validation set of ILSVRC2012: half a sentence; empty when it is."""
        if self.num_classes != _VAL_CLASSES:
            return f"the model has {self.num_classes} classes, not {_VAL_CLASSES}"
        if len(self.items) != _VAL_IMAGES:
            return f"it has {len(self.items)} images, not {_VAL_IMAGES}"
        matches = [_IMAGENET_VAL.fullmatch(base_name(item.name)) for item in self.items]
        numbers = {int(match[1]) for match in matches if match}
        if numbers != set(range(1, _VAL_IMAGES + 1)):
            return "its images are not named ILSVRC2012_val_00000001.JPEG and so on"
        if not self.labelled:
            return "its images have no labels"
        count = Counter(item.label for item in self.items)
        if set(count.values()) != {_VAL_IMAGES // _VAL_CLASSES}:
            return f"it has not {_VAL_IMAGES // _VAL_CLASSES} images of each class"
        return ""


def _name(item: Item) -> str:
    return item.name


def base_name(name: str) -> str:
    """The last part of an item's name."""
    return name.rpartition("/")[2]


def same_folders(written: str, name: str) -> bool:
    """Whether what a file calls an image may be the item `name`, by the folders that both have, from the last one up.

    A path from above the data's folder ("/data/val/a/1.png" of "a/1.png"), or from within it, may; "b/1.png" not.
    """
    folders = ([part for part in path.split("/")[:-1] if part not in ("", ".")] for path in (written, name))
    return all(one == other for one, other in zip(*map(reversed, folders), strict=False))


def digest_of(image: bytes | NDArray[np.uint8]) -> str:
    """sha256 of a file's bytes; of an array: of its dtype, shape and data."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    digest = hashlib.sha256(f"{image.dtype.str} {image.shape}\n".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
