"""The development kit of ILSVRC2012: ground truth by image number, in classes of its own order.

Line n of ``ILSVRC2012_validation_ground_truth.txt`` is the ILSVRC2012_ID of image n. These ids are not indices of
logits: they follow an order of the organisers, which ``meta.mat`` has, while models have the WordNet ids sorted. Taken
for indices they would give an accuracy near chance, so without a file that says their order they are refused.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from rxdeploy.datasets.dataset import base_name
from rxdeploy.datasets.matfile import read_structs
from rxdeploy.datasets.textfile import MOST_BYTES, read_lines, text_lines
from rxdeploy.errors import InputError, first_line, from_os_error, printable
from rxdeploy.plainfile import read_plain

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
# The same order as text: "n02119789 1 kit_fox" a line, as later kits have it, or the WordNet ids alone, the first's
# ILSVRC2012_ID being 1.
ORDER_TEXTS = ("map_clsloc.txt", "synsets.txt")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)
_WORDNET_ID = re.compile(r"n\d{8}")


def is_kit(path: Path) -> bool:
    """Whether a path given for labels is the kit itself, unpacked or as the .tar.gz that it comes in."""
    return path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar"))


def read_kit(path: Path) -> tuple[list[str], dict[int, str]]:
    """The lines of the ground truth, and the WordNet id of each ILSVRC2012_ID."""
    if path.is_dir():
        for folder in (path, path / "data", *sorted(path.glob("*/data"))):
            if (folder / GROUND_TRUTH).is_file():
                return read_lines(folder / GROUND_TRUTH, "labels file"), order_beside(folder / GROUND_TRUTH)
        raise InputError(f"labels {path}: a folder without {GROUND_TRUTH}, so not the ILSVRC2012 development kit")
    data = read_plain(path, f"labels {path}", MOST_BYTES)
    try:
        with tarfile.open(fileobj=io.BytesIO(_inflated(data)), mode="r:") as tar:
            members = {base_name(member.name): member for member in tar if member.isreg()}
            content = {}
            for name in (GROUND_TRUTH, META):
                file = tar.extractfile(members[name]) if name in members else None
                if file is None:
                    raise InputError(f"labels {path}: no {name} in it, so not the ILSVRC2012 development kit")
                content[name] = file.read(MOST_BYTES)
    except InputError:
        raise
    except Exception as error:  # TarError, and what a damaged header leads tarfile to: numbers that are none, ...
        raise InputError(f"labels {path}: cannot be read as a tar: {printable(first_line(error))}") from None
    lines = text_lines(content[GROUND_TRUTH], f"labels {path}: {GROUND_TRUTH}")
    return lines, _from_meta(content[META], f"labels {path}: {META}")


def _inflated(data: bytes) -> bytes:
    """The tar in a .tar.gz, or `data` itself. EOFError when it is cut off, ValueError when it is too large."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    unpacked = bytearray()
    while data:  # of one part after the other, as parallel packers write them
        inflater = zlib.decompressobj(wbits=31)
        unpacked += inflater.decompress(data, MOST_BYTES + 1 - len(unpacked))
        if len(unpacked) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        if not inflater.eof:
            raise EOFError("it is cut off")
        data = inflater.unused_data.lstrip(b"\0")
    return bytes(unpacked)


def order_beside(truth: Path) -> dict[int, str]:
    """The WordNet id of each ILSVRC2012_ID, from meta.mat or a text file in the folder of the ground truth."""
    meta = truth.parent / META
    try:
        if meta.is_file():
            return _from_meta(read_plain(meta, f"labels file {meta}"), f"labels file {meta}")
        for name in ORDER_TEXTS:
            if (truth.parent / name).is_file():
                return _from_text(truth.parent / name)
    except OSError as error:
        raise from_os_error(error, f"reading labels {error.filename}") from None
    raise InputError(
        f"labels file {truth}: one number a line is the ground truth of the ILSVRC2012 development kit, whose numbers "
        f"are not indices of logits; put the kit's {META} beside it (or {' or '.join(ORDER_TEXTS)}: WordNet ids in the "
        "kit's order), or give lines of file name and label"
    )


def number_of(name: str) -> int | None:
    """The number in ILSVRC2012_val_00000001.JPEG; None for other names."""
    match = _VAL_NAME.match(base_name(name))
    return int(match[1]) if match else None


def by_number(names: Sequence[str], lines: Sequence[str], what: str) -> list[str]:
    """The line of each image's number."""
    picked = []
    for name in names:
        number = number_of(name)
        if number is None:
            raise InputError(
                f"{what}: it has one label a line, in the order of the images' numbers, and {printable(name)} is not "
                "named like ILSVRC2012_val_00000001.JPEG"
            )
        if not 1 <= number <= len(lines):
            raise InputError(f"{what}: {len(lines)} lines, none for {printable(name)}")
        picked.append(lines[number - 1])
    return picked


def _from_meta(data: bytes, what: str) -> dict[int, str]:
    try:
        synsets = read_structs(data, "synsets")
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None
    order: dict[int, str] = {}
    for synset in synsets:
        number, wnid = synset.get("ILSVRC2012_ID"), synset.get("WNID")
        if not isinstance(number, float) or not isinstance(wnid, str):
            raise InputError(f"{what}: its synsets have no ILSVRC2012_ID and WNID")
        order[int(number)] = wnid
    return order


def _from_text(path: Path) -> dict[int, str]:
    rows = [line.split() for line in read_lines(path, "labels file")]
    if not rows or not all(_WORDNET_ID.fullmatch(row[0]) for row in rows):
        raise InputError(f"labels file {path}: its lines do not begin with WordNet ids (n02119789)")
    if all(len(row) > 1 and row[1].isdecimal() for row in rows):
        return {int(row[1]): row[0] for row in rows}
    wnids = [row[0] for row in rows]
    if wnids == sorted(wnids):
        raise InputError(
            f"labels file {path}: its WordNet ids are sorted, which is the order of the logits and not the development "
            f"kit's; put the kit's {META} there instead"
        )
    return dict(enumerate(wnids, start=1))
