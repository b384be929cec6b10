"""Names of classes to indices of logits.

The wrong order of classes makes a good model look useless, and a small slip in it makes it look a little worse. So a
name is looked up where it can be, and the order of the names is trusted only where nothing speaks against it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence

from rxdeploy.cards.registry import BUILTIN
from rxdeploy.errors import InputError, printable

_IMAGENET = BUILTIN / "imagenet1k.tsv"  # WordNet id, tab, name; sorted by id, as the models' logits are
SORTED = "sorted order of the names"
_SHOWN = 3
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")
_WORDNET_ID = re.compile(r"n\d{8}")


def class_indices(
    names: Collection[str],
    used: Collection[str],
    num_classes: int,
    class_names: Sequence[str] | None,
    what: str,
    folders: bool = True,
) -> tuple[dict[str, int], str]:
    """The index of every name in `used`, and in words how it was found.

    `names` are all there are, `used` those that have images. In this order: class names of the model and WordNet ids
    of ImageNet, when every used name is one; numbers; the sorted order, when there are `num_classes` names. `what`
    begins the errors, "data val: its class folders", say. InputError when none of these fits, when the model has class
    names and none of `names` is one of them, and when numbers could mean two things: the names of some classes and
    the indices of others, or, of `folders`, their places in the order as text.
    """
    known = known_classes(num_classes, class_names)
    if all(name in known for name in used):
        if not _are_names(names, class_names, folders):
            _check_not_numbers(used, known, num_classes, what)
        return {name: known[name] for name in used}, "names that the model's classes have"
    if all(is_number(name) for name in used):
        if folders and not class_names:
            _check_text_order(names, what)
        return _numbers(used, num_classes, what), "numbers"
    in_order = {name: index for index, name in enumerate(sorted(names))}
    if len(names) != num_classes:
        raise InputError(f"{what}: {len(names)} classes, and the model has {num_classes}{_unknown(used, known)}")
    if class_names and not any(name in known for name in names) and not _are_wordnet_ids(names, num_classes):
        raise InputError(
            f"{what}: none of {_listed(sorted(names))} is a class name of the model, as {_listed(class_names)} are; "
            "rename them, or give indices of the logits in a labels file"
        )
    wrong = [name for name in sorted(names) if known.get(name, in_order[name]) != in_order[name]]
    if wrong:
        raise InputError(
            f"{what}: {printable(wrong[0])} is class {known[wrong[0]]} of the model and would be "
            f"{in_order[wrong[0]]} in sorted order{_unknown(used, known)}; rename them to the model's class names"
        )
    return in_order, SORTED


def known_classes(num_classes: int, class_names: Sequence[str] | None) -> dict[str, int]:
    """Names that say their class: the model's own, where no two classes share one, and ImageNet's WordNet ids.

    WordNet ids count for a model of 1000 classes with ImageNet's names or none. A name with spaces is known with
    underscores too, as folders often have it, unless that is the name of another class.
    """
    known: dict[str, int] = {}
    if class_names:
        count = Counter(class_names)
        aliases = Counter(name.replace(" ", "_") for name in class_names)
        for index, name in enumerate(class_names):
            alias = name.replace(" ", "_")
            if count[name] == 1:
                known[name] = index
                if alias not in count and aliases[alias] == 1:
                    known[alias] = index
    ids, names = _imagenet()
    if num_classes == len(ids) and (not class_names or tuple(class_names) == names):
        known.update((wnid, index) for index, wnid in enumerate(ids))
    return known


@functools.cache
def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    lines = [line.split("\t") for line in _IMAGENET.read_text(encoding="utf-8").splitlines()]
    return tuple(line[0] for line in lines), tuple(line[1].strip() for line in lines)


def _numbers(names: Collection[str], num_classes: int, what: str) -> dict[str, int]:
    indices = {name: int(name) for name in names}
    low, high = min(indices.values()), max(indices.values())
    if low < 0 or high >= num_classes:
        hint = "; they must count from 0" if (low, high) == (1, num_classes) else ""
        raise InputError(
            f"{what}: numbers {low} to {high}, and the model has {num_classes} classes, 0 to {num_classes - 1}{hint}"
        )
    return indices


def _check_text_order(names: Collection[str], what: str) -> None:
    """InputError when folders that are numbers are in another order as text: models are trained in either."""
    as_text = sorted(names)
    if all(is_number(name) for name in names) and as_text != sorted(as_text, key=int):
        raise InputError(
            f"{what}: numbers whose order as text ({_listed(as_text)}) is not that of their values, and the model has "
            "no class names to say which of the two its logits have (torchvision's ImageFolder sorts as text); give "
            "indices of the logits in a labels file, or build the bundle with class names (--labels)"
        )


def _are_wordnet_ids(names: Collection[str], num_classes: int) -> bool:
    return num_classes == len(_imagenet()[0]) and all(_WORDNET_ID.fullmatch(name) for name in names)


def _are_names(names: Collection[str], class_names: Sequence[str] | None, folders: bool) -> bool:
    """Whether numbers can only be names: all the model's are there, or they are folders and all the model's numbers."""
    if not class_names:
        return False
    return set(class_names) <= set(names) or (folders and all(is_number(name) for name in class_names))


def _check_not_numbers(names: Collection[str], known: dict[str, int], num_classes: int, what: str) -> None:
    """InputError when known names could as well be numbers of classes, and would mean others."""
    if all(is_number(name) and 0 <= int(name) < num_classes for name in names):
        other = sorted(name for name in names if int(name) != known[name])
        if other:
            raise InputError(
                f"{what}: {other[0]} is the number of one class and the name of another, class {known[other[0]]}; give "
                "the classes other names"
            )


def is_number(name: str) -> bool:
    """Whether a name is a whole number, of nine digits at most."""
    return _NUMBER.fullmatch(name) is not None


def _unknown(used: Collection[str], known: Collection[str]) -> str:
    """What to add to an error about names of which the model knows some, or none."""
    unknown = sorted(name for name in used if name not in known)
    if not known or not unknown:
        return ""
    return f"; not among its class names: {_listed(unknown)}"


def _listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
