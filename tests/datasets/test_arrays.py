"""Arrays in memory and in .npz files."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rxdeploy.datasets import from_arrays, open_dataset
from rxdeploy.datasets.dataset import digest_of
from rxdeploy.errors import InputError

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (12, 6, 5, 3), np.uint8)
LABELS = np.arange(12) % 4


def test_from_arrays() -> None:
    dataset = from_arrays(IMAGES, LABELS)
    assert dataset.layout == "arrays"
    assert dataset.num_classes == 4
    assert [item.label for item in dataset.items] == LABELS.tolist()
    assert {type(item.label) for item in dataset.items} == {int}
    assert [item.name for item in dataset.items] == sorted(item.name for item in dataset.items)
    for index in (11, 0, 5):
        np.testing.assert_array_equal(dataset.read(dataset.items[index]), IMAGES[index])
    assert {(item.size, item.stamp) for item in dataset.items} == {(90, 0)}
    assert not from_arrays(IMAGES).labelled


def test_fingerprint_has_the_content() -> None:
    other = IMAGES.copy()
    other[7, 0, 0, 0] ^= 1
    assert from_arrays(other, LABELS).fingerprint() != from_arrays(IMAGES, LABELS).fingerprint()
    assert from_arrays(IMAGES.copy(), LABELS).fingerprint() == from_arrays(IMAGES, LABELS).fingerprint()


def test_digest_is_of_the_shape_too() -> None:
    flat = np.arange(24, dtype=np.uint8)
    assert digest_of(flat.reshape(2, 4, 3)) != digest_of(flat.reshape(4, 2, 3))
    view = IMAGES[0, :, ::-1]
    assert digest_of(view) == digest_of(view.copy())
    assert digest_of(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_fingerprint_of_a_file_is_of_its_content_not_of_its_time(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    other = IMAGES.copy()
    other[7, 0, 0, 0] ^= 1
    found = []
    for images, time in ((IMAGES, 5), (IMAGES, 6), (other, 6)):
        np.savez(path, images=images, labels=LABELS)
        os.utime(path, ns=(0, time))
        found.append(open_dataset(path, 10).fingerprint())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: object) -> None:
    path = tmp_path / "data.npz"
    save(path, images=IMAGES, labels=LABELS, more=np.array("x"))  # type: ignore[operator]
    dataset = open_dataset(path, 10)
    assert dataset.layout == "npz"
    assert [item.label for item in dataset.items] == LABELS.tolist()
    np.testing.assert_array_equal(dataset.read(dataset.items[3]), IMAGES[3])
    assert dataset.items[0].stamp == path.stat().st_mtime_ns
    with pytest.raises(InputError, match="leave"):
        open_dataset(path, 10, labels=path)


def test_npz_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=IMAGES)
    with pytest.raises(InputError, match="holds images, and must hold images and labels"):
        open_dataset(tmp_path / "data.npz", 10)
    assert len(open_dataset(tmp_path / "data.npz", 10, labelled=False).items) == 12


BAD = {
    "float": ({"images": IMAGES.astype(np.float32), "labels": LABELS}, r"float32 \(12, 6, 5, 3\)"),
    "channels first": ({"images": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS}, r"uint8 \(12, 3, 6, 5\)"),
    "grey": ({"images": IMAGES[..., 0], "labels": LABELS}, r"expected uint8 \(n, height, width, 3\)"),
    "empty": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "empty"),
    "no pixels": ({"images": IMAGES[:, :0], "labels": LABELS}, "empty"),
    "fewer labels": ({"images": IMAGES, "labels": LABELS[:5]}, r"labels are int64 \(5,\)"),
    "one-hot": ({"images": IMAGES, "labels": np.eye(4)[LABELS]}, r"labels are float64 \(12, 4\)"),
    "float labels": ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels are float64"),
    "negative": ({"images": IMAGES, "labels": LABELS - 1}, "labels are -1 to 2"),
    "too large": ({"images": IMAGES, "labels": LABELS + 1}, "labels are 1 to 4, and the model has 4 classes, 0 to 3"),
    "objects": ({"images": np.array([object()]), "labels": LABELS}, "cannot be read as an .npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_npz(tmp_path: Path, case: str) -> None:
    arrays, match = BAD[case]
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=match) as caught:
        open_dataset(tmp_path / "data.npz", 4)
    assert str(tmp_path / "data.npz") in str(caught.value)


def test_bad_arrays() -> None:
    with pytest.raises(InputError, match="got list"):
        from_arrays([[1]], None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"labels are -1 to 2$"):
        from_arrays(IMAGES, LABELS - 1)


def test_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, images=IMAGES, labels=LABELS)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)
    np.save(tmp_path / "one.npy", IMAGES)
    for data in (b"", b"text", whole[:200], bytes(damaged), (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(InputError, match=str(path)):
            open_dataset(path, 4)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", b"no array")
        file.writestr("labels.npy", b"no array")
    with pytest.raises(InputError):
        open_dataset(path, 4)
