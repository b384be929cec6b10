"""Names of classes to indices: WordNet's sorted order, the model's own names, numbers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.cards import find_card
from rxdeploy.datasets import open_dataset
from rxdeploy.errors import InputError

# From the list of ILSVRC2012 classes, 0-based in sorted WordNet order.
TENCH, GOLDFISH, KIT_FOX, TOILET_TISSUE = "n01440764", "n01443537", "n02119789", "n15075141"
IMAGENET_INDEX = {TENCH: 0, GOLDFISH: 1, KIT_FOX: 278, TOILET_TISSUE: 999}


def labels(root: Path, classes: int, names: tuple[str, ...] | None = None) -> dict[str, int | None]:
    return {item.name.partition("/")[0]: item.label for item in open_dataset(root, classes, names).items}


@pytest.mark.parametrize("with_names", [True, False])
def test_wordnet_ids_of_some_classes(tree: Callable[..., Path], with_names: bool) -> None:
    names = find_card("gluon_resnext50_32x4d").class_names() if with_names else None
    root = tree(*(f"{wnid}/{wnid}_1.JPEG" for wnid in IMAGENET_INDEX))
    assert labels(root, 1000, names) == IMAGENET_INDEX


def test_wordnet_ids_for_another_model(tree: Callable[..., Path]) -> None:
    """1000 classes of a user's own are not ImageNet's."""
    root = tree(f"{TENCH}/1.png")
    with pytest.raises(InputError, match=r"1 classes, and the model has 1000"):
        open_dataset(root, 1000, tuple(f"own {index}" for index in range(1000)))


def test_class_names_in_their_own_order(tree: Callable[..., Path]) -> None:
    root = tree("zebra/1.png", "great_white_shark/1.png", "ant/1.png")
    names = ("zebra", "ant", "great white shark", "owl")
    assert labels(root, 4, names) == {"zebra": 0, "ant": 1, "great_white_shark": 2}


def test_numbers(tree: Callable[..., Path]) -> None:
    root = tree(*(f"{index:02}/1.png" for index in range(12)))
    assert labels(root, 12) == {f"{index:02}": index for index in range(12)}
    assert labels(root, 20)["11"] == 11
    ten = tree(*(f"{index}/1.png" for index in range(10)), folder="ten")
    assert labels(ten, 10) == {str(index): index for index in range(10)}


def test_numbers_in_another_order_as_text(tree: Callable[..., Path], tmp_path: Path) -> None:
    """torchvision's ImageFolder, by which many models are trained, would have 10 before 2."""
    root = tree(*(f"{index}/1.png" for index in range(12)))
    with pytest.raises(InputError, match=r"order as text \(0, 1, 10 \.\.\.\) .*ImageFolder sorts as text.*labels file"):
        open_dataset(root, 12)
    trained = tuple(sorted(str(index) for index in range(12)))  # as ImageFolder.classes
    assert labels(root, 12, trained) == {name: index for index, name in enumerate(trained)}
    assert labels(tree("10/1.png", "2/1.png", folder="part"), 12, trained) == {"10": 2, "2": 4}
    # A model whose classes have other names: its logits' indices.
    assert labels(root, 12, tuple("abcdefghijkl"))["10"] == 10
    # Numbers in a labels file are indices.
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"{index}/1.png {index}\n" for index in range(12)))
    assert {item.name: item.label for item in open_dataset(root, 12, labels=file).items}["10/1.png"] == 10


def test_numbers_out_of_range(tree: Callable[..., Path]) -> None:
    root = tree(*(f"{index}/1.png" for index in range(1, 5)))
    with pytest.raises(InputError, match=r"numbers 1 to 4.*4 classes, 0 to 3; they must count from 0"):
        open_dataset(root, 4)


def test_numbers_that_are_names_too(tree: Callable[..., Path]) -> None:
    root = tree("1/1.png", "2/1.png")
    assert labels(root, 3, ("0", "1", "2")) == {"1": 1, "2": 2}
    assert labels(root, 2, ("1", "2")) == {"1": 0, "2": 1}  # 2 can only be a name
    assert labels(root, 3, ("1", "2", "3")) == {"1": 0, "2": 1}
    with pytest.raises(InputError, match="1 is the number of one class and the name of another, class 0"):
        open_dataset(root, 3, ("1", "2", "three"))


def test_numbers_in_a_labels_file_that_are_names_too(tree: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("1.png 1\n2.png 2\n")
    root = tree("1.png", "2.png")
    with pytest.raises(InputError, match="1 is the number of one class and the name of another, class 0"):
        open_dataset(root, 3, ("1", "2", "3"), file)
    found = open_dataset(root, 2, ("2", "1"), file)
    assert [item.label for item in found.items] == [1, 0]


def test_sorted_order(tree: Callable[..., Path]) -> None:
    root = tree("b/1.png", "a/1.png", "C/1.png")
    assert labels(root, 3) == {"C": 0, "a": 1, "b": 2}
    assert "taken in the sorted order of their names" in open_dataset(root, 3).notes[0]
    assert labels(root, 3, ("C", "y", "z")) == {"C": 0, "a": 1, "b": 2}
    with pytest.raises(InputError, match=r"none of C, a, b is a class name of the model, as x, y, z are"):
        open_dataset(root, 3, ("x", "y", "z"))


def test_sorted_wordnet_ids_of_other_class_names(tree: Callable[..., Path]) -> None:
    """ImageNet's folders for a model of 1000 classes that calls them something else."""
    root = tree(f"{TENCH}/1.png")
    for index in range(999):
        (root / f"n{20000000 + index}").mkdir()
    dataset = open_dataset(root, 1000, tuple(f"own {index}" for index in range(1000)))
    assert dataset.items[0].label == 0 and "sorted order" in dataset.notes[0]


def test_an_underscore_that_is_no_space(tree: Callable[..., Path]) -> None:
    root = tree("great_white/1.png", "ant/1.png")
    assert labels(root, 3, ("great white", "great_white", "ant")) == {"great_white": 1, "ant": 2}
    # Two classes that it could be: neither.
    with pytest.raises(InputError, match="not among its class names: a_b_c"):
        open_dataset(tree("a_b_c/1.png", folder="two"), 2, ("a b_c", "a_b c"))


def test_sorted_order_against_the_class_names(tree: Callable[..., Path]) -> None:
    """One misspelt name must not put all the others into an order that is not the model's."""
    root = tree("zebra/1.png", "antt/1.png", "owl/1.png")
    with pytest.raises(InputError) as caught:
        open_dataset(root, 3, ("zebra", "ant", "owl"))
    assert "owl is class 2 of the model and would be 1 in sorted order" in str(caught.value)
    assert "antt" in str(caught.value)
    assert labels(root, 3, ("ant", "owl", "zebra")) == {"antt": 0, "owl": 1, "zebra": 2}


def test_unknown_names_are_listed(tree: Callable[..., Path]) -> None:
    root = tree("ant/1.png", "bee/1.png")
    with pytest.raises(InputError, match="2 classes, and the model has 3; not among its class names: bee"):
        open_dataset(root, 3, ("ant", "beetle", "owl"))


def test_a_name_of_two_classes(tree: Callable[..., Path]) -> None:
    """ImageNet has two classes "crane"."""
    names = find_card("gluon_resnext50_32x4d").class_names()
    assert names is not None
    assert names.count("crane") == 2
    with pytest.raises(InputError, match="not among its class names: crane"):
        open_dataset(tree("crane/1.png"), 1000, names)
