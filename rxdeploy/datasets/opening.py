"""open_dataset: what a path holds, by looking at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rxdeploy.datasets.arrays import open_npz
from rxdeploy.datasets.classes import SORTED, class_indices, known_classes
from rxdeploy.datasets.dataset import Dataset, Item, Layout, Source
from rxdeploy.datasets.folders import FolderSource, Listing, list_folder
from rxdeploy.datasets.labels import label_images
from rxdeploy.datasets.tars import Members, index_tar, index_tars
from rxdeploy.errors import InputError, from_os_error, printable


def open_dataset(
    path: Path,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    labels: Path | None = None,
    labelled: bool = True,
) -> Dataset:
    """The images at `path` and, when `labelled`, their classes.

    `path` is one of: a folder with a subfolder for each class ("folders"); a folder of images with a `labels` file
    ("flat"); a tar with either in it ("tar"); a tar of class tars, or a folder of them ("class tars"); an .npz file
    ("npz"). Tars are read without unpacking. docs/datasets.md says how names of classes become indices and
    what a labels file may be.

    With `labelled` False images need no classes, and have them only where labels are given or names tell. InputError
    for what is none of these, has no images, or does not fit a model of `num_classes` classes.
    """
    try:
        if not path.exists():
            raise InputError(f"data {path}: no such file or folder")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise from_os_error(error, f"data {path}") from None
    opening = _Opening(path, num_classes, class_names, labels, labelled)
    if path.is_dir():
        return opening.folder(list_folder(path))
    if not path.is_file():
        raise InputError(f"data {path}: neither a folder nor a plain file")  # reading a pipe might never end
    if path.suffix.lower() == ".npz":
        if labels:
            raise InputError(f"data {path}: an .npz file has its labels in it; leave {labels} out")
        return open_npz(path, num_classes, labelled)
    return opening.tar(index_tar(path))


class _Opening:
    """The arguments of `open_dataset`, and a way for each layout."""

    def __init__(
        self, path: Path, num_classes: int, class_names: Sequence[str] | None, labels: Path | None, labelled: bool
    ) -> None:
        self.path, self.num_classes, self.class_names = path, num_classes, class_names
        self.labels, self.labelled = labels, labelled
        self.notes: list[str] = []

    def folder(self, listing: Listing) -> Dataset:
        if listing.images:
            self.note_others(listing.others + len(listing.tars))
        if not listing.images and listing.tars:
            members = index_tars([self.path / name for name in listing.tars])
            self.note_others(members.others + listing.others)
            classes = [name.removesuffix(".tar") for name in listing.tars]
            return self.make("class tars", members.facts(), members.source(), _top, classes)
        facts, source = listing.images, FolderSource(self.path)
        if not facts:
            others = f"; the {listing.others} files in it are something else" if listing.others else ""
            raise InputError(f"data {self.path}: no images in it{others}")
        direct = sum("/" not in name for name, _, _ in facts)
        if direct and direct < len(facts) and not self.labels and self.labelled:
            raise InputError(
                f"data {self.path}: {direct} images in the folder itself and {len(facts) - direct} in subfolders, so "
                "the subfolders cannot be the classes; move them apart, or give a labels file"
            )
        if direct or self.labels:
            return self.make("flat", facts, source, None, ())
        return self.make("folders", facts, source, _top, listing.folders)

    def tar(self, members: Members) -> Dataset:
        facts, source = members.facts(), members.source()
        self.note_others(members.others)
        if members.nested:
            return self.make("class tars", facts, source, _top, members.classes)
        if not facts:
            raise InputError(f"data {self.path}: no images in it")
        known = known_classes(self.num_classes, self.class_names)
        skip = _common_folders([name for name, _, _ in facts], known)
        depth = {name.count("/") - skip for name, _, _ in facts}
        if self.labels or 0 in depth:
            if not self.labels and self.labelled and depth != {0}:
                raise InputError(f"data {self.path}: images at several depths; give a labels file")
            return self.make("tar", facts, source, None, ())
        classes = sorted({name.split("/")[skip] for name, _, _ in facts})
        return self.make("tar", facts, source, lambda name: name.split("/")[skip], classes)

    def make(
        self,
        layout: Layout,
        facts: Sequence[tuple[str, int, int]],
        source: Source,
        class_of: Callable[[str], str] | None,
        classes: Iterable[str],
    ) -> Dataset:
        """The data set of images with `facts` (name, size, stamp), sorted by name; `class_of` a name its class."""
        names = [name for name, _, _ in facts]
        order = ""
        labels: Sequence[int | None] = [None] * len(names)
        if self.labels:
            labels, order, notes = label_images(
                names, self.labels, self.num_classes, self.class_names, f"data {self.path}"
            )
            self.notes += notes
        elif class_of:
            labels, order = self.by_class([class_of(name) for name in names], list(classes))
        elif self.labelled:
            raise InputError(
                f"data {self.path}: {len(names)} images and no class folders; give their classes in a labels file"
            )
        if order == SORTED:
            self.notes.append(
                f"data {self.path}: nothing says which of its {self.num_classes} classes is which of the model's; "
                "taken in the sorted order of their names"
            )
        items = tuple(Item(name, label, size, stamp) for (name, size, stamp), label in zip(facts, labels, strict=True))
        return Dataset(self.path, layout, items, self.num_classes, source, order, tuple(self.notes))

    def note_others(self, count: int) -> None:
        if count:
            self.notes.append(f"data {self.path}: files passed over because they are no images: {count}")

    def by_class(self, used: list[str], names: list[str]) -> tuple[list[int] | list[None], str]:
        if len(set(names)) != len(names):
            raise InputError(f"data {self.path}: two of its classes have the same name")
        try:
            indices, order = class_indices(
                names, set(used), self.num_classes, self.class_names, f"data {self.path}: its classes{_hint(names)}"
            )
        except InputError:
            if self.labelled:
                raise
            return [None] * len(used), ""
        return [indices[name] for name in used], order


def _top(name: str) -> str:
    return name.partition("/")[0]


def _common_folders(names: Sequence[str], known: Iterable[str]) -> int:
    """How many folders to pass over: those that hold everything, as "val/" in val/n01440764/x.JPEG."""
    known = set(known)
    skip = 0
    while True:
        tops = {name.split("/")[skip] if name.count("/") > skip else "" for name in names}
        if len(tops) != 1 or "" in tops or tops & known:
            return skip
        skip += 1


def _hint(names: list[str]) -> str:
    """What the classes are called, where they are few; the usual mistake is a folder too high."""
    return f" ({', '.join(printable(name) for name in sorted(names))})" if len(names) <= 3 else ""
