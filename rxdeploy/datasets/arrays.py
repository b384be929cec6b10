"""Images that are arrays already: in memory, or in an .npz file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.datasets.dataset import Dataset, Item, Layout
from rxdeploy.errors import EnvironmentLacks, InputError, first_line, printable

_NPY = b"\x93NUMPY"
_PACKED = 100  # times smaller: photographs hardly get smaller, drawings 10 or 20 times
_HARMLESS_BYTES = 256 << 20


@dataclass(frozen=True)
class _ArraySource:
    images: NDArray[np.uint8]

    def read(self, index: int, item: Item) -> NDArray[np.uint8]:
        return self.images[index]


def from_arrays(images: NDArray[np.uint8], labels: NDArray | None = None, num_classes: int | None = None) -> Dataset:
    """A data set of arrays: `images` uint8 (n, height, width, 3), RGB; `labels` integers (n,), indices of the logits.

    `num_classes` is one more than the largest label when None. The arrays are not copied. InputError for other
    dtypes and shapes, no images, and labels out of range.
    """
    return _dataset(Path("arrays"), "arrays", images, labels, num_classes, stamp=0)


def open_npz(path: Path, num_classes: int, labelled: bool) -> Dataset:
    """The data set in an .npz file with `images` and `labels`, as for `from_arrays`; it is read whole.

    `labels` may be absent when `labelled` is False.
    """
    try:
        with path.open("rb") as file:  # NumPy would leave it open when it fails
            if file.read(len(_NPY)) == _NPY:
                raise InputError(f"data {path}: one array, and an .npz file must hold images and labels")
            if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle, and say how to run that
                raise InputError(f"data {path}: cannot be read as an .npz file: it is no zip, or cut off")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            _refuse_bomb(path, arrays.zip)
            found = {name: arrays[name] for name in ("images", "labels") if name in arrays}
            names = printable(", ".join(sorted(arrays.files))) or "nothing"
    except InputError:
        raise
    except MemoryError:
        raise EnvironmentLacks(f"data {path}: there is not enough memory for its arrays; use image files") from None
    except Exception as error:  # what a damaged file leads NumPy and zlib to
        reason = printable(first_line(error))
        raise InputError(f"data {path}: cannot be read as an .npz file: {reason}") from None
    if "images" not in found or (labelled and "labels" not in found):
        raise InputError(f"data {path}: it holds {names}, and must hold images and labels")
    return _dataset(path, "npz", found["images"], found.get("labels"), num_classes, path.stat().st_mtime_ns)


def _refuse_bomb(path: Path, archive: zipfile.ZipFile) -> None:
    """InputError for arrays that are large and were packed to next to nothing: no pictures can be."""
    for member in archive.infolist():
        if member.file_size > max(_PACKED * member.compress_size, _HARMLESS_BYTES):
            raise InputError(
                f"data {path}: {printable(member.filename)} has {member.compress_size:,} bytes and unpacks to "
                f"{member.file_size:,}: a decompression bomb, and no pictures"
            )


def _dataset(root: Path, layout: Layout, images: Any, labels: Any, num_classes: int | None, stamp: int) -> Dataset:
    where = "images" if layout == "arrays" else f"data {root}: images"
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{where}: got {got}, expected uint8 (n, height, width, 3), RGB")
    if not images.size:
        raise InputError(f"{where}: got an empty array {images.shape}")
    indices = _indices(where, labels, len(images), num_classes)
    width = max(6, len(str(len(images))))  # so that the names' order is the arrays'
    items = tuple(Item(f"{index:0{width}}", label, images[index].nbytes, stamp) for index, label in enumerate(indices))
    if num_classes is None:
        num_classes = 1 + max((label for label in indices if label is not None), default=0)
    return Dataset(root, layout, items, num_classes, _ArraySource(images), "indices")


def _indices(where: str, labels: Any, count: int, num_classes: int | None) -> list[int] | list[None]:
    if labels is None:
        return [None] * count
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{where}: labels are {labels.dtype} {labels.shape}, expected integers ({count},)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "" if num_classes is None else f", and the model has {num_classes} classes, 0 to {num_classes - 1}"
        raise InputError(f"{where}: labels are {low} to {high}{limit}")
    return labels.tolist()
