"""What a build writes, without what it computes: run as `python job.py FOLDER FROM TO` it is killed at each of its
operations from FROM to TO, in a copy of FOLDER for each; `python job.py FOLDER` runs it to its end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from rxdeploy import atomic
from rxdeploy.cache import Cache, recipe_digest
from rxdeploy.engines.bundle import Manifest, write_bundle

STAGES = ("export", "precision", "engine")
# Operations that change a file or take a lock; each is counted before it happens.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "fcntl.flock"}
OLD = recipe_digest(build="an older one")
ROOM = 3 * 3000  # bytes: for what the build makes, less than with what an older one made


def manifest(description: str) -> Manifest:
    """Of a bundle that says so."""
    image = {"name": "image", "dtype": "uint8", "layout": "NHWC", "shape": [None, 32, 32, 3]}
    facts = {
        "schema": 1,
        "model": "tiny",
        "precision": "fp16",
        "target": {"name": "onnxruntime", "version": None, "reason": "asked for", "gpu": None},
        "weights": {"kind": "synthetic", "source": "synthetic:0", "sha256": None},
        "card": {
            "sha256": "0" * 64,
            "description": description,
            "figures": {},
            "accuracy": None,
            "source": {"collection": "tests", "training_data": []},
        },
        "counts": {"parameters": 1, "multiply_adds": 1},
        "preprocessing": {
            "image_size": 32,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": [0.1, 0.2, 0.3],
            "std": [1.0, 1.0, 1.0],
        },
        "normalisation_in_graph": True,
        "num_classes": 2,
        "inputs": [image],
        "outputs": [{"name": "logits", "dtype": "float32", "layout": "NC", "shape": [None, 2]}],
        "validation": {},
        "engine": None,
        "tools": {},
        "command": [],
        "files": {},
    }
    return msgspec.convert(facts, Manifest)


def content(stage: str) -> bytes:
    """What a stage computes."""
    return stage.encode() * (2000 // len(stage))


def produce(folder: Path, stage: str) -> dict[str, Any]:
    """Compute it."""
    (folder / "model.onnx").write_bytes(content(stage))
    return {"stage": stage}


def prepare(folder: Path) -> None:
    """What an older build left: a bundle, and entries of a cache, which has no room for more."""
    cache = Cache(folder / "cache", limit=10**9)
    for stage in STAGES:
        os.utime(cache.stage(stage, OLD, lambda new, of=f"old {stage}": produce(new, of)).folder / "entry.json", (1, 1))
    cache.close()
    write_bundle(folder / "bundle", manifest("old"), {"model.onnx": content("old")}, overwrite=False)


def build(folder: Path) -> None:
    """Three stages that need each other, a bundle of the last, a file beside it, and eviction."""
    cache = Cache(folder / "cache", limit=ROOM)
    try:
        for stage in STAGES:
            entry = cache.stage(stage, recipe_digest(build="this one"), lambda new, of=stage: produce(new, of))
        files: dict[str, Path | bytes] = {"model.onnx": entry.folder / "model.onnx", "labels.txt": b"cat\ndog\n"}
        write_bundle(folder / "bundle", manifest("new"), files, overwrite=False)
        with atomic.scratch_folder("tune") as scratch:
            (scratch / "model.onnx").write_bytes(content("tune"))
        atomic.write_bytes(folder / "baseline.json", b"{}")
    finally:
        cache.close()


@contextlib.contextmanager
def halves() -> Iterator[None]:
    """Every file that is written at once is written in two."""
    write = Path.write_bytes

    def in_two(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            sys.audit("os.utime", "half")  # an operation: here too it may be killed
            file.write(data[len(data) // 2 :])
        return len(data)

    Path.write_bytes = in_two  # type: ignore[assignment]
    try:
        yield
    finally:
        Path.write_bytes = write  # type: ignore[method-assign]


def main(folder: Path, first: int, last: int) -> None:
    """Kill a build at each operation; prints the number of the last at which there was one to kill."""
    left = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if left and (writing or event in CHANGES):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    for number in range(first, last):
        there = folder.with_name(f"{folder.name}-{number}")
        shutil.copytree(folder, there)
        child = os.fork()
        if not child:
            tempfile.tempdir = str(there)
            left = number
            with halves():
                build(there)
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            shutil.rmtree(there)
            print(number - 1, flush=True)
            return
    print(last - 1, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
