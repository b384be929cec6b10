"""Samples and lists: shares by arithmetic, MLPerf's list format."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rxdeploy.datasets import Dataset, from_arrays, listed, open_dataset, sample
from rxdeploy.errors import InputError


def uneven(*sizes: int) -> Dataset:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return from_arrays(np.zeros((len(labels), 1, 1, 3), np.uint8), labels)


SIZES = (100, 31, 7, 250, 1)


@pytest.mark.parametrize("count", [1, 2, 10, 64, 128, 388])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_shares(count: int, seed: int) -> None:
    dataset = uneven(*SIZES)
    chosen = sample(dataset, count, seed)
    assert len(set(chosen)) == len(chosen) == count
    drawn = Counter(item.label for item in chosen)
    for label, size in enumerate(SIZES):
        exact = count * size / sum(SIZES)
        assert math.floor(exact) <= drawn[label] <= math.ceil(exact)


def test_balanced() -> None:
    chosen = sample(uneven(*[50] * 20), 100, seed=3)
    assert set(Counter(item.label for item in chosen).values()) == {5}
    assert len({item.label for item in sample(uneven(*[50] * 20), 12)}) == 12


def test_every_image_is_as_likely() -> None:
    """Each of 25 images is in 10 of 25 samples, on average: within 5 standard deviations over 600 seeds."""
    dataset = uneven(12, 3, 10)
    seen = Counter(item.name for seed in range(600) for item in sample(dataset, 10, seed))
    expected, deviation = 600 * 10 / 25, math.sqrt(600 * 0.4 * 0.6)
    assert len(seen) == 25
    assert max(abs(count - expected) for count in seen.values()) < 5 * deviation


def test_seed_and_order() -> None:
    dataset = uneven(*SIZES)
    assert sample(dataset, 50, 1) == sample(uneven(*SIZES), 50, 1)
    assert set(sample(dataset, 50, 1)) != set(sample(dataset, 50, 2))
    # Shuffled: classes are mixed, so that a part of the sample is one too.
    labels = [item.label for item in sample(uneven(50, 50), 60)]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 5


def test_the_same_with_every_version() -> None:
    """Written down once: a change here would change everyone's calibration."""
    assert [int(item.name) for item in sample(uneven(3, 4), 4, 5)] == PINNED


PINNED = [1, 3, 0, 6]


def test_more_than_there_are() -> None:
    dataset = uneven(3, 4)
    chosen = sample(dataset, 100)
    assert sorted(chosen, key=lambda item: item.name) == list(dataset.items)
    assert sample(dataset, 7) == chosen
    with pytest.raises(InputError, match="at least 1"):
        sample(dataset, 0)
    with pytest.raises(InputError, match="seed -1: it must be at least 0"):
        sample(dataset, 3, -1)


def test_by_folder_where_classes_are_not_known(tree: Callable[..., Path]) -> None:
    root = tree(*(f"{folder}/{index}.png" for folder in "abc" for index in range(6)))
    chosen = sample(open_dataset(root, 7, labelled=False), 6)
    assert Counter(item.name[0] for item in chosen) == {"a": 2, "b": 2, "c": 2}


# Lists


@pytest.fixture
def data(tree: Callable[..., Path]) -> Dataset:
    return open_dataset(tree("a/1.png", "a/2 x.png", "b/3.png", "b/1.png"), 2)


@pytest.fixture
def choose(data: Dataset, tmp_path: Path) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        (tmp_path / "list.txt").write_text(text)
        return [item.name for item in listed(data, tmp_path / "list.txt")]

    return names


def test_list(choose: Callable[[str], list[str]]) -> None:
    assert choose("3.png\n\na/2 x.png\r\n./b/1.png\n") == ["b/3.png", "a/2 x.png", "b/1.png"]
    assert choose("/data/val/b/3.png\n") == ["b/3.png"]
    assert choose("b/3.png 1\na/2 x.png 0\na/1.png\t0\n") == ["b/3.png", "a/2 x.png", "a/1.png"]
    assert choose("3.png n02119789\n") == ["b/3.png"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "names no images"),
        ("3.png\nnone.png\n../x.png\n", r"2 of its images are not in .*none\.png first"),
        ("1.png\n", r"1\.png fits 2 images"),
        ("a/3.png\n", r"1 of its images are not in .*, a/3\.png first"),
        ("3.png\nb/3.png\n", "comes twice"),
        ("3.png 0\n", r"class 0 there and 1 in the data set.*another order"),
    ],
)
def test_list_refused(choose: Callable[[str], list[str]], text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        choose(text)


def test_list_that_is_none(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        listed(data, tmp_path / "none")
    with pytest.raises(InputError, match="not a plain file"):
        listed(data, tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        listed(data, tmp_path / "binary")
