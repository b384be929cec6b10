"""The C library's reader of manifests against the Python runtime's: what one takes the other takes."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rxdeploy_c import Failed, Library

from rxdeploy.engines.bundle import UNSEALED, read_manifest
from rxdeploy.errors import InputError

Build = Callable[..., Path]
MUTATIONS = 3000
# Values that a key could have by mistake. (No float without a fraction: JSON of Python and C++ tell it from an integer
# alike, but no whole number beyond 64 bits, which only Python can hold.)
NUMBERS: tuple[Any, ...] = (-1, 0, 1, 2, 31, 5000, 0.5, 1.0, 1e300)
WRONG: tuple[Any, ...] = (None, True, False, *NUMBERS, "", "x", "int8", "bicubic", [], {}, [1])
NO_MANIFESTS = (b"", b"{", b"[]", b"3", b'{"schema": 2}', b'{"schema": 1}', b"\xef\xbb\xbf{}", b"[" * 5000)


def sealed(manifest: dict[str, Any]) -> bytes:
    manifest = manifest | {"digest": UNSEALED}
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"digest": digest}).encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a tree lies."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in items for place in places(below, (*path, key)))]


def mutated(manifest: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One value removed, exchanged, or added."""
    changed = copy.deepcopy(manifest)
    *way, last = rng.choice([place for place in places(changed) if place and place[0] not in ("digest", "validation")])
    parent = changed
    for key in way:
        parent = parent[key]
    action = rng.random()
    if action < 0.3:
        del parent[last]
    elif action < 0.4 and isinstance(parent, dict):
        parent["surprise"] = rng.choice(WRONG)
    else:
        parent[last] = rng.choice(WRONG)
    return changed


def refusal_here(library: Library, data: bytes) -> str | None:
    try:
        library.call("check_manifest", data, ctypes.c_size_t(len(data)))
    except Failed as error:
        return str(error).removeprefix("manifest: ")
    return None


def refusal_there(folder: Path, data: bytes) -> str | None:
    (folder / "manifest.json").write_bytes(data)
    try:
        read_manifest(folder)
    except InputError as error:
        return str(error).removeprefix(f"bundle {folder}: ")
    return None


# What the C library checks of a manifest and the Python runtime only meets later: that the tensors are those of the
# preprocessing and the classes, and that what it reads of a plan and of quantisation has the right type.
ONLY_HERE = (
    "The input is not the images",
    "The output is not float32",
    "`array` of length 1",
    "`$.num_classes`",
    "`$.engine.",
    "`$.quantisation.",
    "`$.tuning.cpu.threads`",
    "`$.counts.multiply_adds`",
)
# And what only the Python runtime checks: parts of the tuning that say nothing of a CPU.
ONLY_THERE = ("$.tuning",)


def test_of_a_bundle(library: Library, build_bundle: Build) -> None:
    for key in (("fp32", "uint8"), ("fp16", "float32")):
        assert refusal_here(library, (build_bundle(*key) / "manifest.json").read_bytes()) is None


def test_mutations(library: Library, build_bundle: Build, tmp_path: Path) -> None:
    manifest = json.loads((build_bundle("fp32") / "manifest.json").read_text())
    rng, same, refused = random.Random(6), 0, 0
    for _ in range(MUTATIONS):
        data = sealed(mutated(manifest, rng))
        here, there = refusal_here(library, data), refusal_there(tmp_path, data)
        if here and not there:
            assert any(reason in here for reason in ONLY_HERE), here
        elif there and not here:
            assert any(place in there for place in ONLY_THERE), there
        refused += bool(here and there)
        same += bool(here and here == there)
    assert refused > MUTATIONS / 2
    assert same > 0.95 * refused  # in the same words, but for a few


@pytest.mark.parametrize("data", NO_MANIFESTS)
def test_what_is_none(library: Library, tmp_path: Path, data: bytes) -> None:
    assert refusal_here(library, data)
    assert refusal_there(tmp_path, data)


def test_altered(library: Library, build_bundle: Build, tmp_path: Path) -> None:
    """The digest is the Python runtime's: one letter, anywhere, and both say the same."""
    data = (build_bundle("fp32") / "manifest.json").read_bytes()
    altered = data.replace(b'"training_data": [', b'"training_data" : [', 1)
    assert altered != data
    assert refusal_here(library, altered) == refusal_there(tmp_path, altered) is not None
