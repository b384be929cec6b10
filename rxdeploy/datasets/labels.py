"""Labels files: which class each image has.

The file names images; an image of the data set is found by its name, its base name, or its base name without the
ending, in this order. Folders before a base name must be the image's, as far as both have them. No file is opened
because a labels file names it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from rxdeploy.datasets import devkit
from rxdeploy.datasets.classes import class_indices, is_number
from rxdeploy.datasets.dataset import base_name, same_folders
from rxdeploy.datasets.folders import is_image_name
from rxdeploy.datasets.textfile import read_lines, split_line
from rxdeploy.errors import InputError, from_os_error, printable

# Of the columns of a CSV file with a header, lower case.
_NAME_COLUMNS = ("filename", "file_name", "file", "image", "image_name", "imageid", "image_id", "name", "path", "id")
_LABEL_COLUMNS = ("label", "labels", "class", "class_id", "class_name", "wnid", "synset", "category", "target")
_KAGGLE_COLUMN = "predictionstring"  # of LOC_val_solution.csv: "n03995372 85 1 499 272": WordNet id, box
_NAMES, _LABELS = frozenset(_NAME_COLUMNS), frozenset((*_LABEL_COLUMNS, _KAGGLE_COLUMN))
_WORDNET_ID_FIRST = re.compile(r"(n\d{8})\s.*")


def label_images(
    names: Sequence[str], file: Path, num_classes: int, class_names: Sequence[str] | None, what: str
) -> tuple[list[int], str, list[str]]:
    """The class of each image of `names`, in words how names became indices, and notes for the user.

    `what` begins errors about the data set. InputError for a file that cannot be read as one of the forms in
    docs/datasets.md, leaves an image out, or does not fit a model of `num_classes` classes.
    """
    try:
        if not file.exists():
            raise InputError(f"labels file {file}: no such file")
        if not file.is_file() and not file.is_dir():
            raise InputError(f"labels file {file}: neither a plain file nor a folder")
    except OSError as error:
        raise from_os_error(error, f"labels file {file}") from None
    notes: list[str] = []
    if devkit.is_kit(file):
        truth, order = devkit.read_kit(file)
        labels = _of_kit(names, truth, order, file)
    else:
        lines = read_lines(file, "labels file")
        if not lines:
            raise InputError(f"labels file {file}: it is empty")
        if all(is_number(line) for line in lines):
            labels = _of_kit(names, lines, devkit.order_beside(file), file)
        elif all(is_image_name(line) for line in lines):
            raise InputError(f"labels file {file}: names without labels; its lines must be file name, label")
        elif not any(re.search(r"[\s,]", line) for line in lines):
            labels = devkit.by_number(names, lines, f"labels file {file}")
        else:
            labels, notes = _by_name(names, _rows(lines, file, names), file, what)
    indices, order_in_words = _indices(labels, num_classes, class_names, f"labels file {file}: its labels")
    return indices, order_in_words, notes


def _indices(
    labels: list[str], num_classes: int, class_names: Sequence[str] | None, what: str
) -> tuple[list[int], str]:
    distinct = set(labels)
    indices, order = class_indices(distinct, distinct, num_classes, class_names, what, folders=False)
    return [indices[label] for label in labels], order


def _of_kit(names: Sequence[str], truth: Sequence[str], order: dict[int, str], file: Path) -> list[str]:
    """WordNet ids by the development kit's ground truth."""
    picked = devkit.by_number(names, truth, f"labels file {file}")
    for text in set(picked):
        if not is_number(text) or int(text) not in order:
            raise InputError(f"labels file {file}: the development kit has no class {printable(text)}")
    return [order[int(text)] for text in picked]


def _rows(lines: Sequence[str], file: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """Name and label of each line of the file, the header left out."""
    if not (file.suffix.lower() == ".csv" or _has_commas(lines)):
        pairs = [split_line(line) for line in lines]
        if any(label is None for _, label in pairs):
            line = next(line for line, (_, label) in zip(lines, pairs, strict=True) if label is None)
            raise InputError(
                f"labels file {file}: no label in the line {printable(line)!r}; lines are file name, label"
            )
        return [(name, label or "") for name, label in pairs]
    try:
        table = [[cell.strip() for cell in row] for row in csv.reader(lines, strict=True, skipinitialspace=True)]
    except csv.Error as error:
        raise InputError(f"labels file {file}: cannot be read as CSV: {error}") from None
    name_column, label_column, table = _columns(table, file, names)
    if not table:
        raise InputError(f"labels file {file}: a header and no lines below it; those are file name, label")
    rows = []
    for row in table:
        if len(row) <= max(name_column, label_column) or not row[label_column]:
            raise InputError(f"labels file {file}: no label in the line {printable(','.join(row))!r}")
        label = _WORDNET_ID_FIRST.fullmatch(row[label_column])
        rows.append((row[name_column], label[1] if label else row[label_column]))
    return rows


def _has_commas(lines: Sequence[str]) -> bool:
    """Whether it is CSV in a file of another ending. A comma before the name's ending may belong to the name, one
    after a space to the label; so it is one below a known header, or with a name before it in every line.
    """
    header = [cell.strip('" ').lower() for cell in lines[0].split(",")]
    if not _NAMES.isdisjoint(header) and not _LABELS.isdisjoint(header):
        return True
    # The first line may be a header in words of its own.
    rest = lines[1:] if len(lines) > 1 and "," in lines[0] else lines
    return all(is_image_name(line.partition(",")[0].strip('" ')) for line in rest)


def _columns(table: list[list[str]], file: Path, names: Sequence[str]) -> tuple[int, int, list[list[str]]]:
    """Numbers of the name's and the label's column, and the rows below the header."""
    header = [cell.lower() for cell in table[0]]
    name_columns = [header.index(cell) for cell in _NAME_COLUMNS if cell in header]
    label_columns = [header.index(cell) for cell in (*_LABEL_COLUMNS, _KAGGLE_COLUMN) if cell in header]
    if name_columns and label_columns:
        return name_columns[0], label_columns[0], table[1:]
    if len(table[0]) != 2:
        raise InputError(
            f"labels file {file}: {len(table[0])} columns; it needs a header with {_NAME_COLUMNS[0]} and "
            f"{_LABEL_COLUMNS[0]}, or two columns"
        )
    # Two columns under a header in words of its own: no image is called that.
    known = {*names, *map(base_name, names), *(base_name(name).rpartition(".")[0] for name in names)}
    first = table[0][0]
    is_header = not is_image_name(first) and base_name(first) not in known and len(table) > 1
    return 0, 1, table[1:] if is_header else table


def _by_name(
    names: Sequence[str], rows: Sequence[tuple[str, str]], file: Path, what: str
) -> tuple[list[str], list[str]]:
    finder = _Finder(names)
    labels: dict[str, str] = {}
    absent = 0
    for written, label in rows:
        name = finder.find(written, file)
        if name is None:
            absent += 1
        elif labels.setdefault(name, label) != label:
            two = f"{printable(labels[name])} and {printable(label)}"
            raise InputError(f"labels file {file}: {printable(name)} has two labels, {two}")
    if not labels:
        raise InputError(
            f"labels file {file}: it names none of the images in {what}; its first is {printable(rows[0][0])}, the "
            f"data's {printable(names[0])}"
        )
    without = [name for name in names if name not in labels]
    if without:
        raise InputError(
            f"labels file {file}: no label for {len(without)} of {len(names)} images in {what}, "
            f"{printable(without[0])} first"
        )
    notes = [f"labels file {file}: {absent} of its {len(rows)} images are not in {what}"] if absent else []
    return [labels[name] for name in names], notes


class _Finder:
    """Finds images by what a labels file calls them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._full = set(names)
        self._short: dict[str, list[str]] = {}
        for name in names:
            base = base_name(name)
            for key in {base, base.rpartition(".")[0]}:
                self._short.setdefault(key, []).append(name)

    def find(self, written: str, file: Path) -> str | None:
        """The one image that `written` means, None when there is none."""
        path = written.replace("\\", "/").removeprefix("./")
        if path in self._full:
            return path
        found = [name for name in self._short.get(base_name(path), []) if same_folders(path, name)]
        if len(found) > 1:
            raise InputError(
                f"labels file {file}: {printable(written)} fits {len(found)} images, {printable(found[0])} and "
                f"{printable(found[1])}; write the path from the data's folder"
            )
        return found[0] if found else None
