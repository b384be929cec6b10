"""The development kit's ground truth, whose class order is its own, and the MATLAB file that has it.

The MATLAB files are written by SciPy, and some by MATLAB itself (they come with SciPy).
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rxdeploy.datasets import Dataset, open_dataset
from rxdeploy.datasets.matfile import read_structs
from rxdeploy.errors import InputError

scipy_io = pytest.importorskip("scipy.io")

VAL = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3, 4)]
# (ILSVRC2012_ID, WNID, index in sorted WordNet order), and a synset above the classes, as meta.mat has them too.
SYNSETS = [(1, "n02119789", 278), (2, "n02100735", 212), (3, "n15075141", 999), (4, "n01440764", 0)]
ABOVE = (1001, "n00001740", None)
TRUTH = [4, 1, 1, 3]
LABELS = [0, 278, 278, 999]
NAME = "ILSVRC2012_validation_ground_truth.txt"


def meta(compressed: bool = True, number_type: type = np.uint16) -> bytes:
    """A meta.mat with the fields of the kit's."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(SYNSETS) + 1, 1), [(field, object) for field in fields])
    for row, (number, wnid, index) in enumerate([*SYNSETS, ABOVE]):
        children = np.zeros((1, 0)) if index is not None else np.array([[1, 2, 3]], np.uint16)
        values = (number_type(number), wnid, "kit fox, Vulpes macrotis", "a gloss \u00e9", children.size, children, 0)
        synsets[row, 0] = values
    buffer = io.BytesIO()
    scipy_io.savemat(
        buffer, {"other": np.arange(3), "more": synsets[:2], "synsets": synsets}, do_compression=compressed
    )
    return buffer.getvalue()


@pytest.fixture
def kit(tmp_path: Path) -> Callable[..., Path]:
    """Writes the ground truth and other files to a folder, and returns the ground truth's path."""

    def write(truth: list[int] = TRUTH, **files: bytes) -> Path:
        folder = tmp_path / "kit" / "data"
        folder.mkdir(parents=True)
        (folder / NAME).write_text("".join(f"{number}\n" for number in truth))
        for name, content in files.items():
            (folder / name.replace("_", ".", 1)).write_bytes(content)
        return folder / NAME

    return write


def labels(root: Path, file: Path) -> list[int | None]:
    dataset: Dataset = open_dataset(root, 1000, labels=file)
    assert [item.name for item in dataset.items] == sorted(path.name for path in root.iterdir())
    return [item.label for item in dataset.items]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("number_type", [np.uint8, np.uint16, np.float64])
def test_ground_truth_beside_meta(
    tree: Callable[..., Path], kit: Callable[..., Path], compressed: bool, number_type: type
) -> None:
    data = meta(compressed, np.uint16 if number_type is np.uint8 else number_type)
    assert labels(tree(*VAL), kit(meta_mat=data)) == LABELS


def test_some_of_the_images(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    """An image's line is the one of its number, not of its place in the folder."""
    assert labels(tree(VAL[0], VAL[3]), kit(meta_mat=meta())) == [LABELS[0], LABELS[3]]


def test_kit_folder_and_archive(tree: Callable[..., Path], kit: Callable[..., Path], tmp_path: Path) -> None:
    truth = kit(meta_mat=meta())
    root = tree(*VAL)
    assert labels(root, truth.parent) == LABELS
    assert labels(root, truth.parent.parent) == LABELS
    assert labels(root, truth.parent.parent.parent) == LABELS
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "kit", "ILSVRC2012_devkit_t12")
    assert labels(root, tmp_path / "ILSVRC2012_devkit_t12.tar.gz") == LABELS


def test_order_as_text(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    truth = kit(map_clsloc_txt=b"n15075141 3 toilet_tissue\nn02119789 1 kit_fox\nn01440764 4 tench\n")
    (truth.parent / "map.clsloc_txt").rename(truth.parent / "map_clsloc.txt")
    assert labels(tree(*VAL), truth) == LABELS
    (truth.parent / "map_clsloc.txt").unlink()
    (truth.parent / "synsets.txt").write_text("n02119789\nn02100735\nn15075141\nn01440764\n")
    assert labels(tree(*VAL), truth) == LABELS


def refused(root: Path, file: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(root, 1000, labels=file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_order(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    """The numbers fit the model, and would be wrong."""
    text = refused(tree(*VAL), kit())
    assert "not indices of logits" in text
    assert "meta.mat" in text


def test_order_that_is_the_logits(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    """The synsets.txt that comes with Caffe's models is sorted."""
    truth = kit(synsets_txt=b"n01440764\nn02100735\nn02119789\nn15075141\n")
    assert "sorted" in refused(tree(*VAL), truth)


def test_images_without_numbers(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    assert "1.png is not named like" in refused(tree("1.png"), kit(meta_mat=meta()))


def test_number_without_a_line(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    assert "3 lines, none for ILSVRC2012_val_00000004.JPEG" in refused(tree(*VAL), kit(TRUTH[:3], meta_mat=meta()))


def test_class_that_meta_has_not(tree: Callable[..., Path], kit: Callable[..., Path]) -> None:
    assert "no class 7" in refused(tree(*VAL), kit([1, 7, 1, 1], meta_mat=meta()))


def test_folder_that_is_no_kit(tree: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert NAME in refused(tree(*VAL), tmp_path / "empty")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8bnothing")
    assert "cannot be read as a tar" in refused(tree(*VAL), tmp_path / "broken.tar.gz")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz"):
        pass
    assert NAME in refused(tree(*VAL), tmp_path / "other.tar.gz")


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_meta(tree: Callable[..., Path], kit: Callable[..., Path], compressed: bool) -> None:
    whole = meta(compressed)
    truth = kit()
    root = tree(*VAL)
    draw = np.random.default_rng(4)
    for cut in (0, 5, 127, 128, 140, 200, len(whole) // 2, len(whole) - 20):
        (truth.parent / "meta.mat").write_bytes(whole[:cut])
        assert "meta.mat" in refused(root, truth)
    for _ in range(200):
        data = bytearray(whole)
        for place in draw.integers(0, len(data), 3):
            data[place] = draw.integers(0, 256)
        (truth.parent / "meta.mat").write_bytes(data)
        try:
            open_dataset(root, 1000, labels=truth)
        except InputError:
            continue


def matlab_files() -> list[Path]:
    from scipy.io import matlab

    folder = Path(matlab.__file__).parent / "tests" / "data"
    return sorted(path for path in folder.glob("teststructarr_*.mat"))


@pytest.mark.parametrize("path", matlab_files(), ids=lambda path: path.stem)
def test_files_written_by_matlab(path: Path) -> None:
    """Versions 6 and 7, of both byte orders: {'one': 1, 'two': 2}, {'one': 'number 1', 'two': 'number 2'}."""
    assert read_structs(path.read_bytes(), "teststructarr") == [
        {"one": 1.0, "two": 2.0},
        {"one": "number 1", "two": "number 2"},
    ]


def test_cut_anywhere_or_without_fields() -> None:
    whole = meta(compressed=False)
    assert len(read_structs(whole, "synsets")) == 5
    for cut in range(len(whole) - 200, len(whole)):
        with pytest.raises(ValueError, match="damaged"):
            read_structs(whole[:cut], "synsets")
    length_of_names = b"\x05\x00\x04\x00"  # a short element: 4 bytes of int32
    at = whole.rindex(length_of_names, 0, whole.rindex(b"ILSVRC2012_ID"))
    for length in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(ValueError, match="without fields"):
            read_structs(whole[: at + 4] + length + whole[at + 8 :], "synsets")


def test_variables_of_other_kinds() -> None:
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"synsets": np.arange(4)})
    for data in (buffer.getvalue(), buffer.getvalue().replace(b"synsets", b"synsetz")):
        with pytest.raises(ValueError, match="no variable synsets"):
            read_structs(data, "synsets")


@pytest.mark.parametrize("mode", ["gz", "xz", "bz2"])
def test_a_damaged_archive(tree: Callable[..., Path], kit: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    kit(meta_mat=meta() + np.random.default_rng(0).bytes(50_000).hex().encode())
    archive = tmp_path / "kit.tar.gz"  # the ending is not looked at to tell the compression
    with tarfile.open(archive, f"w:{mode}") as file:  # type: ignore[call-overload]
        file.add(tmp_path / "kit", "kit")
    whole = archive.read_bytes()
    root = tree(*VAL)
    for content in (whole[:20] + bytes(50) + whole[70:], whole[: len(whole) // 2], whole[:40], b""):
        archive.write_bytes(content)
        with pytest.raises(InputError, match=r"labels .*kit\.tar\.gz"):
            labels(root, archive)
    for at in range(30, len(whole), len(whole) // 20):  # wherever the decompressor stumbles, if it does
        archive.write_bytes(whole[:at] + b"\xff" * 10 + whole[at + 10 :])
        with contextlib.suppress(InputError):
            labels(root, archive)
