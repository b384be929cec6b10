"""Lines of text files that name images."""

from __future__ import annotations

import re
from pathlib import Path

from rxdeploy.datasets.folders import ENDINGS
from rxdeploy.errors import InputError
from rxdeploy.plainfile import read_plain

MOST_BYTES = 256 << 20  # of such a file: the training set of ImageNet takes 50 MB
_NAME_THEN_LABEL = re.compile(
    rf"(.+?(?:{'|'.join(re.escape(ending) for ending in sorted(ENDINGS, key=len, reverse=True))}))\s+(\S.*)",
    re.IGNORECASE,
)


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without the empty ones; `what` begins the errors."""
    return text_lines(read_plain(path, f"{what} {path}", MOST_BYTES), f"{what} {path}")


def text_lines(data: bytes, what: str) -> list[str]:
    """As `read_lines`, of a file's content."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: cannot be read as UTF-8 text: {error}") from None
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def split_line(line: str) -> tuple[str, str | None]:
    """ "name label" to name and label: after the name's ending where it has one, else at the first white space."""
    match = _NAME_THEN_LABEL.fullmatch(line)
    if match:
        return match[1], match[2]
    name, _, label = line.partition("\t" if "\t" in line else " ")
    return name, label.strip() or None
