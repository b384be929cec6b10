"""Which images of a data set to use: a seeded sample, or those that a list names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rxdeploy.datasets.dataset import Dataset, Item, base_name, same_folders
from rxdeploy.datasets.textfile import read_lines, split_line
from rxdeploy.errors import InputError, printable


def sample(dataset: Dataset, count: int, seed: int = 0) -> tuple[Item, ...]:
    """`count` images (all when there are fewer), the same ones for the same `seed`, in a shuffled order.

    Stratified by class, or by folder where classes are not known: of each there are as many as its share says,
    rounded up or down, and every image is as likely as any other. (Systematic sampling of the images sorted by
    class, in random order within each: Cochran, Sampling Techniques, 3rd ed., section 8.)
    """
    if count < 1:
        raise InputError(f"a sample of {count} images: it must be at least 1")
    if seed < 0:
        raise InputError(f"seed {seed}: it must be at least 0")
    items = dataset.items
    # The bit generator's stream is guaranteed by NumPy; its distributions' are not.
    bits = np.random.PCG64(seed)
    chosen = np.argsort(bits.random_raw(len(items)), kind="stable")
    if count < len(items):
        strata = _strata(items)
        rank = np.argsort(np.argsort(bits.random_raw(int(strata.max()) + 1), kind="stable"))  # classes in random order
        by_class = chosen[np.argsort(rank[strata[chosen]], kind="stable")]
        # The k-th is at floor((start + k * n) / count) with a whole start below n: integers, so exact everywhere.
        start = int(bits.random_raw()) % len(items)
        places = [(start + k * len(items)) // count for k in range(count)]
        chosen = by_class[places]
        chosen = chosen[np.argsort(bits.random_raw(count), kind="stable")]
    return tuple(items[index] for index in chosen)


def _strata(items: tuple[Item, ...]) -> np.ndarray:
    keys = [str(item.label) if item.label is not None else item.name.rpartition("/")[0] for item in items]
    number = {key: index for index, key in enumerate(sorted(set(keys)))}
    return np.array([number[key] for key in keys])


def _matches(name: str, by_base: dict[str, list[Item]]) -> list[Item]:
    return [item for item in by_base.get(base_name(name), []) if same_folders(name, item.name)]


def listed(dataset: Dataset, file: Path) -> tuple[Item, ...]:
    """The images that a text file names, in its order: an item's name or base name a line.

    Folders before a base name must be the item's, as far as both have them. "name label" lines are taken too, as
    MLPerf publishes them; a numeric label must be the image's. InputError for a name that is not in the data set or
    fits several images, one that comes twice, and a list without names.
    """
    by_name = {item.name: item for item in dataset.items}
    by_base: dict[str, list[Item]] = {}
    for item in dataset.items:
        by_base.setdefault(base_name(item.name), []).append(item)
    found: dict[str, Item] = {}
    missing: list[str] = []
    for line in read_lines(file, "list"):
        name, label = (line, None) if line in by_name or line in by_base else split_line(line)
        name = name.removeprefix("./")
        matches = [by_name[name]] if name in by_name else _matches(name, by_base)
        if len(matches) > 1:
            raise InputError(f"list {file}: {printable(name)} fits {len(matches)} images; give its folder too")
        if not matches:
            missing.append(name)
            continue
        item = matches[0]
        if item.name in found:
            raise InputError(f"list {file}: {printable(item.name)} comes twice")
        if label is not None and label.isdecimal() and item.label not in (None, int(label)):
            raise InputError(
                f"list {file}: {printable(item.name)} has class {label} there and {item.label} in the data set: the "
                "classes are in another order"
            )
        found[item.name] = item
    if missing:
        raise InputError(
            f"list {file}: {len(missing)} of its images are not in {dataset.root}, {printable(missing[0])} first"
        )
    if not found:
        raise InputError(f"list {file}: it names no images")
    return tuple(found.values())
