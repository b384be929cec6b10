"""Labels files in the forms that people have them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.datasets import Dataset, open_dataset
from rxdeploy.errors import InputError

VAL = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
# Sorted WordNet order: tench 0, kit fox 278, toilet tissue 999.
WNIDS = ["n02119789", "n15075141", "n01440764"]
INDICES = [278, 999, 0]


@pytest.fixture
def opened(tree: Callable[..., Path], tmp_path: Path) -> Callable[..., Dataset]:
    """The data set of VAL with a labels file of this content."""

    def make(content: str | bytes, name: str = "labels.txt", names: list[str] = VAL, classes: int = 1000) -> Dataset:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return open_dataset(tree(*names), classes, labels=file)

    return make


def table(labels: list, separator: str, names: list[str] = VAL) -> str:
    return "".join(f"{name}{separator}{label}\n" for name, label in zip(names, labels, strict=True))


FORMS = {
    "indices": table(INDICES, " "),
    "WordNet ids": table(WNIDS, " "),
    "tabs": table(INDICES, "\t"),
    "several spaces": table(INDICES, "   "),
    "Windows": "\ufeff" + table(INDICES, " ").replace("\n", "\r\n"),
    "another order, empty lines": "\n".join(table(INDICES, " ").splitlines()[::-1]) + "\n\n",
    "./ before": "".join(f"./{line}\n" for line in table(INDICES, " ").splitlines()),
    "absolute paths": "".join(f"/somewhere/else/{line}\n" for line in table(INDICES, " ").splitlines()),
    "paths upwards": "".join(f"../../etc/{line}\n" for line in table(INDICES, " ").splitlines()),
    "Windows paths": "".join(f"C:\\val\\{line}\n" for line in table(INDICES, " ").splitlines()),
    "without endings": table(INDICES, " ", [name.removesuffix(".JPEG") for name in VAL]),
    "twice the same": table(INDICES, " ") * 2,
    "WordNet ids by number": "\n".join(WNIDS),
    "commas": table(INDICES, ","),
    "comma and space": table(INDICES, ", "),
    "CSV with header": "filename,label\n" + table(INDICES, ","),
    "CSV with other header": "Picture,What it shows\n" + table(WNIDS, ","),
    "CSV with columns": "split,label,difficulty,filename\n"
    + "".join(f"val,{label},3,{name}\n" for name, label in zip(VAL, INDICES, strict=True)),
    "CSV with quotes": '"filename","label"\n'
    + "".join(f'"{name}","{label}"\n' for name, label in zip(VAL, WNIDS, strict=True)),
    "Kaggle": "ImageId,PredictionString\n"
    + "".join(f"{name[:-5]},{wnid} 85 1 499 272 \n" for name, wnid in zip(VAL, WNIDS, strict=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(opened: Callable[..., Dataset], form: str) -> None:
    dataset = opened(FORMS[form], "labels.csv" if form.startswith(("CSV", "Kaggle")) else "labels.txt")
    assert dataset.layout == "flat"
    assert dataset.labelled
    assert [item.name for item in dataset.items] == VAL
    assert [item.label for item in dataset.items] == INDICES
    assert dataset.notes == ()


def test_class_names_with_commas_and_spaces(tree: Callable[..., Path], tmp_path: Path) -> None:
    names = ("tench, Tinca tinca", "great white shark", "owl")
    root = tree("1.png", "my picture 2.png", "3.png")
    (tmp_path / "labels.txt").write_text("3.png owl\n1.png tench, Tinca tinca\nmy picture 2.png great white shark\n")
    dataset = open_dataset(root, 3, names, tmp_path / "labels.txt")
    assert {item.name: item.label for item in dataset.items} == {"1.png": 0, "my picture 2.png": 1, "3.png": 2}


def test_sorted_class_names(opened: Callable[..., Dataset]) -> None:
    dataset = opened(table(["cat", "dog", "ant"], " "), classes=3)
    assert [item.label for item in dataset.items] == [1, 2, 0]
    assert "sorted" in dataset.class_order


def test_images_in_subfolders(opened: Callable[..., Dataset]) -> None:
    names = ["x/1.png", "y/1.png", "y/2.png"]
    dataset = opened("./x/1.png 1\ny/1.png 0\n2.png 2\n", names=names, classes=3)
    assert [item.label for item in dataset.items] == [1, 0, 2]
    assert dataset.layout == "flat"


def test_a_folder_in_a_name_counts(opened: Callable[..., Dataset]) -> None:
    """The image of the same name in another folder is another image."""
    found = opened("/data/x/1.png 1\nx/2.png 0\n", names=["x/1.png", "x/2.png"], classes=2)
    assert [item.label for item in found.items] == [1, 0]
    with pytest.raises(InputError, match=r"no label for 1 of 2 images.*x/2\.png first"):
        opened("x/1.png 1\ny/2.png 0\n", names=["x/1.png", "x/2.png"], classes=2)


@pytest.mark.parametrize(
    "form", ["CSV with header", "CSV with other header", "CSV with columns", "CSV with quotes", "Kaggle"]
)
def test_csv_in_a_file_of_another_ending(opened: Callable[..., Dataset], form: str) -> None:
    assert [item.label for item in opened(FORMS[form], "labels.txt").items] == INDICES


def test_more_labels_than_images(opened: Callable[..., Dataset]) -> None:
    dataset = opened(FORMS["indices"], names=VAL[:2])
    assert [item.label for item in dataset.items] == INDICES[:2]
    assert "1 of its 3 images" in dataset.notes[0]


REFUSED = {
    "empty": ("", "empty"),
    "binary": (b"\xff\xfe\x00", "UTF-8"),
    "names without labels": ("\n".join(VAL), "names without labels"),
    "one name without a label": (table(INDICES, " ").replace(" 999", ""), "no label in the line"),
    "of other images": ("a.png 1\nb.png 2\n", r"names none of the images.*first is a\.png.*val_00000001"),
    "an image left out": ("\n".join(table(INDICES, " ").splitlines()[:2]), "no label for 1 of 3 images"),
    "two labels": (table(INDICES, " ") + f"{VAL[0]} 5\n", "two labels, 278 and 5"),
    "out of range": (table([0, 1, 1000], " "), "numbers 0 to 1000, and the model has 1000 classes, 0 to 999"),
    "from 1": (table([1, 1000, 4], " "), "numbers 1 to 1000.*must count from 0"),
    "negative": (table([0, -1, 1], " "), "numbers -1 to 1"),
    "number of classes": (table(["cat", "dog", "ant"], " "), "3 classes, and the model has 1000"),
    "three columns": (table(INDICES, ",1,"), "3 columns"),
    "CSV line cut off": ("filename,label\n" + table(INDICES, ",") + "x.png\n", "no label in the line"),
    "CSV line without": ("filename,label\n" + table(INDICES, ",").replace("999", ""), "no label in the line"),
    "CSV header": ("filename,label\n", "a header and no lines below it"),
    "unfinished quote": ('"filename","label"\n"a', "CSV"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(opened: Callable[..., Dataset], case: str) -> None:
    content, match = REFUSED[case]
    with pytest.raises(InputError, match=match) as caught:
        opened(content, "labels.csv" if case.startswith(("CSV", "unfinished")) else "labels.txt")
    assert "labels file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_base_name_of_two_images(opened: Callable[..., Dataset]) -> None:
    with pytest.raises(InputError, match=r"1\.png fits 2 images, x/1\.png and y/1\.png"):
        opened("1.png 0\n", names=["x/1.png", "y/1.png"], classes=2)


def test_missing_file(tree: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_dataset(tree("1.png"), 2, labels=tmp_path / "none.txt")
    with pytest.raises(InputError, match="File name too long"):
        open_dataset(tree("1.png"), 2, labels=tmp_path / ("x" * 300))
    for name in ("pipe.txt", "pipe.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="neither a plain file nor a folder"):
            open_dataset(tree("1.png"), 2, labels=tmp_path / name)
