"""Images in tars, against the bytes that were put in: read at random, by threads, and from damaged files."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rxdeploy.datasets import Dataset, open_dataset
from rxdeploy.errors import InputError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a" * 60 + "/" + "b" * 90 + "/" + "c" * 95 + ".png"  # beyond what a ustar header holds


def content(dataset: Dataset) -> dict[str, bytes]:
    found = {}
    for item in dataset.items:
        data = dataset.read(item)
        assert isinstance(data, bytes)
        found[item.name] = data
        assert item.size == len(data)
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_flat_with_labels(tar: Callable[..., Path], image: Callable[[str], bytes], tmp_path: Path, form: str) -> None:
    """As ILSVRC2012_img_val.tar."""
    names = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (3, 1, 2)]
    path = tar(dict.fromkeys(names), form=FORMATS[form])
    (tmp_path / "val.txt").write_text("".join(f"{name} {name[22:23]}\n" for name in names))
    dataset = open_dataset(path, 4, labels=tmp_path / "val.txt")
    assert dataset.layout == "tar"
    assert [(item.name, item.label) for item in dataset.items] == [(name, int(name[22:23])) for name in sorted(names)]
    assert content(dataset) == {name: image(name) for name in names}
    assert {item.stamp for item in dataset.items} == {path.stat().st_mtime_ns}
    with pytest.raises(InputError, match="labels file"):
        open_dataset(path, 4)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_long_and_odd_names(tar: Callable[..., Path], image: Callable[[str], bytes], form: str) -> None:
    names = [LONG, "./x/\u00e9\u4e2d.png", "/abs/1.png"]
    dataset = open_dataset(tar(dict.fromkeys(names), form=FORMATS[form]), 3, labelled=False)
    assert content(dataset) == {
        name.removeprefix("./").removeprefix("/"): image(name.rpartition("/")[2]) for name in names
    }


def test_made_by_the_system_tar(tree: Callable[..., Path], image: Callable[[str], bytes], tmp_path: Path) -> None:
    if not shutil.which("tar"):
        pytest.skip("no tar program here")
    root = tree(f"val/a/{LONG}", "val/b/1.png", "val/b/2.png")
    (root / "val" / "b" / "3.png").symlink_to("2.png")
    subprocess.run(["tar", "cf", tmp_path / "made.tar", "-C", root, "."], check=True)
    dataset = open_dataset(tmp_path / "made.tar", 2)
    assert {item.name: item.label for item in dataset.items} == {
        f"val/a/{LONG}": 0,
        "val/b/1.png": 1,
        "val/b/2.png": 1,
    }
    assert content(dataset)[f"val/a/{LONG}"] == image("c" * 95 + ".png")


def test_class_folders_in_a_tar(tar: Callable[..., Path]) -> None:
    for prefix in ("", "./", "val/", "data/imagenet/val/"):
        dataset = open_dataset(tar(dict.fromkeys([f"{prefix}dog/1.png", f"{prefix}cat/1.png"])), 2)
        assert dataset.layout == "tar"
        assert [item.label for item in dataset.items] == [0, 1]
        assert [item.name.rpartition("/")[0].rpartition("/")[2] for item in dataset.items] == ["cat", "dog"]
    # One known class is a class, not a folder around them.
    dataset = open_dataset(tar({"n02119789/1.png": None}), 1000)
    assert [item.label for item in dataset.items] == [278]


def test_passed_over(tar: Callable[..., Path]) -> None:
    path = tar({"a/1.png": None, "a/._1.png": b"x", ".b/1.png": None, "a/readme.txt": b"x"})
    dataset = open_dataset(path, 1, ("a",))
    assert [item.name for item in dataset.items] == ["a/1.png"]
    assert dataset.notes[0].endswith(": 3")


def test_name_that_comes_twice(tar: Callable[..., Path], image: Callable[[str], bytes]) -> None:
    """The later one counts, as when unpacked: tar --append writes it so."""
    path = tar({"1.png": None})
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("1.png")
        info.size = len(image("other"))
        file.addfile(info, io.BytesIO(image("other")))
    dataset = open_dataset(path, 1, labelled=False)
    assert content(dataset) == {"1.png": image("other")}


CLASS_TARS = {"n01440764.tar": ["n01440764_1.JPEG", "n01440764_22.JPEG"], "n02119789.tar": ["n02119789_5.JPEG"]}


def test_folder_of_class_tars(tar: Callable[..., Path], image: Callable[[str], bytes]) -> None:
    for name, members in CLASS_TARS.items():
        root = tar(dict.fromkeys(members), name=f"train/{name}").parent
    check_class_tars(open_dataset(root, 1000), image)


def test_tar_of_class_tars(tar: Callable[..., Path], image: Callable[[str], bytes]) -> None:
    """As ILSVRC2012_img_train.tar."""
    inner = {name: tar(dict.fromkeys(members), name=name).read_bytes() for name, members in CLASS_TARS.items()}
    check_class_tars(open_dataset(tar(inner, name="train.tar"), 1000), image)


def check_class_tars(dataset: Dataset, image: Callable[[str], bytes]) -> None:
    assert dataset.layout == "class tars"
    assert [(item.name, item.label) for item in dataset.items] == [
        ("n01440764/n01440764_1.JPEG", 0),
        ("n01440764/n01440764_22.JPEG", 0),
        ("n02119789/n02119789_5.JPEG", 278),
    ]
    assert content(dataset) == {item.name: image(item.name.partition("/")[2]) for item in dataset.items}


def test_folders_in_class_tars(tar: Callable[..., Path], tmp_path: Path) -> None:
    inner = {
        name: tar({f"./part/{member}": None for member in members}, name=f"train/{name}").read_bytes()
        for name, members in CLASS_TARS.items()
    }
    for path in (tmp_path / "train", tar(inner, name="train.tar")):
        assert [(item.name, item.label) for item in open_dataset(path, 1000).items] == [
            ("n01440764/part/n01440764_1.JPEG", 0),
            ("n01440764/part/n01440764_22.JPEG", 0),
            ("n02119789/part/n02119789_5.JPEG", 278),
        ]


def test_headers_are_not_kept(tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile keeps all it has read, which for the training set of ImageNet is hundreds of megabytes."""
    following = tarfile.TarFile.next
    kept: list[int] = []

    def counted(file: tarfile.TarFile) -> tarfile.TarInfo | None:
        kept.append(len(file.members))  # type: ignore[attr-defined]
        return following(file)

    path = tar(dict.fromkeys(f"{index}.png" for index in range(30)))
    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    assert len(open_dataset(path, 1, labelled=False).items) == 30
    assert max(kept) <= 1


def test_threads(tar: Callable[..., Path], image: Callable[[str], bytes]) -> None:
    names = [f"{index}.png" for index in range(60)]
    dataset = open_dataset(tar(dict.fromkeys(names)), 1, labelled=False)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(dataset.read, dataset.items * 5))
    assert read == [image(item.name) for item in dataset.items] * 5


def test_more_tars_than_files_may_be_open(tar: Callable[..., Path]) -> None:
    import resource

    for index in range(40):
        root = tar({"1.png": None}, name=f"train/class{index:02}.tar").parent
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, in_use + 10), hard))
    try:
        assert len(content(open_dataset(root, 40))) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def refused(path: Path, classes: int = 2) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(path, classes, labelled=False)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cut_off(tar: Callable[..., Path]) -> None:
    """Anywhere: a download that was interrupted must not pass for a smaller data set."""
    path = tar({"1.png": None, "2.png": None, "3.png": None})
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        end = max(member.offset_data + member.size for member in file)
    for cut in sorted({*range(0, end, 256), *range(end - 3, end + 1), *range(512, end, 512)}):
        path.write_bytes(whole[:cut])
        assert refused(path)


def test_damaged_header(tar: Callable[..., Path]) -> None:
    path = tar({"1.png": None, "2.png": None})
    with tarfile.open(path) as file:
        second = file.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[second + 20] ^= 0x55
    path.write_bytes(data)
    assert f"byte {second:,}" in refused(path)


def test_points_out_of_it(tar: Callable[..., Path]) -> None:
    assert "points out of it" in refused(tar({"a/../../etc/1.png": None}))


@pytest.mark.parametrize("data", [b"", b"text", bytes(100), b"\x89PNG" * 1000])
def test_no_tar(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "data.tar").write_bytes(data)
    refused(tmp_path / "data.tar")


def test_compressed(tar: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "data.tar.gz").write_bytes(gzip.compress(tar({"1.png": None}).read_bytes()))
    assert "gzip" in refused(tmp_path / "data.tar.gz")
    # A member's name is the first thing in a tar, so these two bytes prove nothing.
    assert open_dataset(tar({"BZ.png": None}), 1, labelled=False).items


def test_no_images(tar: Callable[..., Path]) -> None:
    assert "no images" in refused(tar({"a.txt": b"x"}))
    inner = tar({"a.txt": b"x"}, name="inner.tar").read_bytes()
    assert "no images" in refused(tar({"inner.tar": inner}))
    (tar({"a.txt": b"x"}, name="train/inner.tar"))
    with pytest.raises(InputError, match="no images"):
        open_dataset(tar({"a.txt": b"x"}, name="train/inner.tar").parent, 1)


def test_images_and_tars(tar: Callable[..., Path]) -> None:
    inner = tar({"1.png": None}, name="inner.tar").read_bytes()
    assert "both images and tars" in refused(tar({"inner.tar": inner, "2.png": None}))


def test_damaged_class_tar(tar: Callable[..., Path]) -> None:
    inner = tar({"1.png": None}, name="inner.tar").read_bytes()
    assert "n1.tar" in refused(tar({"n0.tar": inner, "n1.tar": inner[:700]}))
    assert "n1.tar" in refused(tar({"n0.tar": inner, "n1.tar": b""}))


def test_changed_or_shortened_after_opening(tar: Callable[..., Path]) -> None:
    path = tar({"1.png": None})
    dataset = open_dataset(path, 1, labelled=False)
    stamp = dataset.items[0].stamp
    os.utime(path, ns=(0, 1))
    with pytest.raises(InputError, match="changed"):
        dataset.read(dataset.items[0])
    with path.open("r+b") as file:
        file.truncate(600)
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(InputError, match="ends within it"):
        dataset.read(dataset.items[0])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        dataset.read(dataset.items[0])
