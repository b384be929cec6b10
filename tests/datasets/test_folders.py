"""Folders of image files: what is found, in which order, with which class."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.datasets import Dataset, open_dataset
from rxdeploy.errors import InputError


def labels_of(dataset: Dataset) -> dict[str, int | None]:
    return {item.name: item.label for item in dataset.items}


def test_class_folders(tree: Callable[..., Path], image: Callable[[str], bytes]) -> None:
    root = tree("b/2.png", "a/1.png", "b/1.JPEG", "a/deep/er/3.webp", "c/1.png")
    dataset = open_dataset(root, 3)
    assert dataset.layout == "folders"
    assert dataset.labelled
    assert labels_of(dataset) == {"a/1.png": 0, "a/deep/er/3.webp": 0, "b/1.JPEG": 1, "b/2.png": 1, "c/1.png": 2}
    assert [item.name for item in dataset.items] == sorted(labels_of(dataset))
    for item in dataset.items:
        path = root / item.name
        assert dataset.read(item) == image(path.name)
        assert (item.size, item.stamp) == (len(image(path.name)), path.stat().st_mtime_ns)


def test_what_is_passed_over(tree: Callable[..., Path], tmp_path: Path) -> None:
    root = tree("a/1.png", "b/1.png", "a/.hidden.png", "a/._1.png", ".git/1.png", "b/.thumbs/1.png")
    (root / "a" / "notes.txt").write_text("no image")
    (root / "checksums").write_text("no image")
    os.mkfifo(root / "a" / "pipe.png")
    dataset = open_dataset(root, 2, ("a", "b"))
    assert labels_of(dataset) == {"a/1.png": 0, "b/1.png": 1}
    assert len(dataset.notes) == 1
    assert dataset.notes[0].endswith(": 3")


def test_links(tree: Callable[..., Path], image: Callable[[str], bytes]) -> None:
    """Links are followed, wherever they lead: subsets of ImageNet are often made of them."""
    store = tree("real.png", "folder/x.png", folder="store")
    root = tree("a/1.png")
    (root / "a" / "2.png").symlink_to(store / "real.png")
    (root / "b").symlink_to(store / "folder")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    (root / "b" / "nowhere.png").symlink_to(store / "gone.png")
    dataset = open_dataset(root, 2)
    assert labels_of(dataset) == {"a/1.png": 0, "a/2.png": 0, "a/self.png": 0, "b/nowhere.png": 1, "b/x.png": 1}
    by_name = {item.name: item for item in dataset.items}
    assert dataset.read(by_name["a/2.png"]) == image("real.png")
    for broken in ("a/self.png", "b/nowhere.png"):
        assert by_name[broken].size == 0
        with pytest.raises(OSError, match=broken):
            dataset.read(by_name[broken])


def refused(root: Path, classes: int = 2, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(root, classes, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert str(root) in text
    assert "\n" not in text
    return text


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such" in refused(tmp_path / "nowhere")
    assert "no images" in refused(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "readme.txt").write_text("text")
    assert "no images in it; the 1 files in it are something else" in refused(tmp_path)


def test_folder_that_cannot_be_read(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("a/1.png", "b/1.png")
    scan = os.scandir

    def denied(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "Permission denied" in refused(root)


def test_number_of_classes(tree: Callable[..., Path]) -> None:
    root = tree(*(f"class{index}/1.png" for index in range(5)))
    text = refused(root, 1000)
    assert "5 classes" in text
    assert "1000" in text
    (root / "class5").mkdir()  # a class without images is one all the same, or those after it would move up
    assert "6 classes, and the model has 5" in refused(root, 5)
    assert open_dataset(root, 6).items[4].label == 4


def test_a_folder_too_high(tree: Callable[..., Path]) -> None:
    assert "(train, val)" in refused(tree("train/a/1.png", "val/a/1.png"), 10)


def test_images_beside_folders(tree: Callable[..., Path]) -> None:
    root = tree("1.png", "a/1.png", "b/1.png")
    assert "1 images in the folder itself and 2 in subfolders" in refused(root)
    assert len(open_dataset(root, 2, labelled=False).items) == 3


def test_without_labels(tree: Callable[..., Path]) -> None:
    root = tree("1.png", "2.png")
    assert "labels file" in refused(root)
    dataset = open_dataset(root, 2, labelled=False)
    assert not dataset.labelled
    assert dataset.layout == "flat"
    assert labels_of(dataset) == {"1.png": None, "2.png": None}
    # Folders that do not fit the model are no classes; those that fit are.
    folders = tree("a/1.png", "b/1.png", folder="folders")
    assert set(labels_of(open_dataset(folders, 7, labelled=False)).values()) == {None}
    assert set(labels_of(open_dataset(folders, 2, labelled=False)).values()) == {0, 1}


def test_file_name_that_is_not_utf8(tree: Callable[..., Path]) -> None:
    root = tree("a/1.png")
    with open(os.fsencode(root / "a") + b"/\xff.png", "wb"):
        pass
    with pytest.raises(InputError, match="not UTF-8"):
        open_dataset(root, 1)


def test_neither_folder_nor_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    assert "neither" in refused(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.npz")
    assert "neither" in refused(tmp_path / "pipe.npz")
    assert "File name too long" in refused(tmp_path / ("x" * 300))


@pytest.mark.parametrize(("depth", "width"), [(1200, 1), (20, 250)])
def test_very_deep_folders(tmp_path: Path, image: Callable[[str], bytes], depth: int, width: int) -> None:
    """Deeper than Python's stack, and than a path may be long."""
    root, here = tmp_path / "data", os.getcwd()
    root.mkdir()
    try:
        os.chdir(root)
        for _ in range(depth):
            os.mkdir("d" * width)
            os.chdir("d" * width)
        Path("1.png").write_bytes(image("1.png"))
        os.chdir(here)
        if width == 1:
            assert [item.name for item in open_dataset(root, 1).items] == ["d/" * depth + "1.png"]
        else:
            assert "File name too long" in refused(root)
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", str(root)], check=True)  # Python's own way is not deep enough


def test_item_of_another_data_set(tree: Callable[..., Path]) -> None:
    one = open_dataset(tree("a/1.png", "a/3.png", folder="one"), 1)
    other = open_dataset(tree("a/2.png", "a/4.png", folder="other"), 1)
    for item in other.items:
        with pytest.raises(InputError, match="no image a/"):
            one.read(item)


def test_fingerprint(tree: Callable[..., Path]) -> None:
    root = tree("a/1.png", "b/1.png", "b/2.png")
    first = open_dataset(root, 2)
    assert open_dataset(root, 2).fingerprint() == first.fingerprint()
    assert first.fingerprint(first.items[:2]) != first.fingerprint()
    assert first.fingerprint(first.items[::-1]) != first.fingerprint()
    seen = {first.fingerprint()}
    os.utime(root / "b" / "2.png", ns=(0, 5))
    seen.add(open_dataset(root, 2).fingerprint())
    (root / "b" / "2.png").write_bytes(b"shorter")
    os.utime(root / "b" / "2.png", ns=(0, 5))
    seen.add(open_dataset(root, 2).fingerprint())
    seen.add(open_dataset(root, 2, class_names=("b", "a")).fingerprint())
    (root / "b" / "2.png").rename(root / "b" / "3.png")
    seen.add(open_dataset(root, 2).fingerprint())
    assert len(seen) == 5
