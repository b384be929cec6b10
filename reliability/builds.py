"""Commands to kill, or to run side by side, on models that build in seconds; and what must be so after them."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rxdeploy
from rxdeploy.cards.digits_images import choose, split, write_files
from rxdeploy.engines.bundle import MANIFEST, PLAN, SBOM, open_bundle
from rxdeploy.runtime import load

CARD = """\
schema = 1
name = "small"
[architecture]
layers = [1, 2, 1]
channels = [16, 32, 48]
cardinality = 4
base_width = 8
stem_width = 16
num_classes = 10
[input]
image_size = 48
crop_pct = 0.875
interpolation = "bicubic"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
"""
SMALL = ("small.toml", "--weights", "synthetic:1")
CALIBRATED = ("--calibration-data", "images", "--calibration-images", "24", "--method", "minmax")
# Root, but without leave to read and write what belongs to others: to it modes mean what they mean to everybody.
ORDINARY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
_TICK = 0.2
_VICTIM = Path(__file__).with_name("victim.py")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str
    killed_in: str = ""  # the stage


@dataclass
class Timeline:
    """What a command did when nobody disturbed it: seconds and changing operations of each stage, entries computed."""

    seconds: dict[str, float] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)


class Place:
    """A working directory with a card, images, a cache and a folder for temporaries of its own."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        self.folder, self.cache, self.temporary = folder, folder / "cache", folder / "tmp"
        self._inputs, self._working = inputs, folder
        folder.mkdir(parents=True)
        self.temporary.mkdir()
        self._link()

    def _link(self) -> None:
        for name in ("small.toml", "images"):
            (self._working / name).symlink_to(self._inputs / name)

    def within(self, folder: Path) -> Place:
        """The same place with another working directory."""
        there = copy.copy(self)
        there._working = folder
        there._link()
        return there

    def environment(self, **changes: str) -> dict[str, str]:
        return os.environ | {
            "RXDEPLOY_CACHE": str(self.cache),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(Path(rxdeploy.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",  # models this small take longer with threads that wait for each other
            "PYTHONDONTWRITEBYTECODE": "1",
            **changes,
        }

    def run(self, *arguments: str, patience: float, ordinary: bool = False, **changes: str) -> Finished:
        """`rxdeploy ARGUMENTS` here; TimeoutError when it takes longer than that."""
        command = [*(ORDINARY if ordinary else ()), sys.executable, "-m", "rxdeploy", *arguments]
        with (self.folder / "out").open("w+") as out, (self.folder / "err").open("w+") as err:
            process = subprocess.Popen(
                command,
                cwd=self._working,
                env=self.environment(**changes),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            wait(process, patience)
            out.seek(0), err.seek(0)
            return Finished(process.returncode, out.read(), err.read())

    def start(
        self, kill: str, *arguments: str, **changes: str
    ) -> tuple[subprocess.Popen, Iterator[tuple[float, str, str]]]:
        """`victim.py` here, and its marks with the time at which each came."""
        read, write = os.pipe()
        with (self.folder / "out").open("a") as out:
            process = subprocess.Popen(
                [sys.executable, str(_VICTIM), str(write), kill, *arguments],
                cwd=self._working,
                env=self.environment(**changes),
                pass_fds=[write],
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        os.close(write)

        def marks() -> Iterator[tuple[float, str, str]]:
            with open(read, encoding="utf-8") as lines:
                for line in lines:
                    kind, _, what = line.rstrip("\n").partition(" ")
                    yield time.monotonic(), kind, what

        return process, marks()

    def timeline(self, *arguments: str, patience: float, **changes: str) -> Timeline:
        """What the command does."""
        process, marks = self.start("-", *arguments, **changes)
        found, stage, since = Timeline(), "start", time.monotonic()
        for at, kind, what in marks:
            if kind == "stage":
                found.seconds[stage] = found.seconds.get(stage, 0.0) + at - since
                stage, since = what, at
            elif kind == "op":
                found.operations[stage] = found.operations.get(stage, 0) + 1
            else:
                found.computed.append(what)
        found.seconds[stage] = found.seconds.get(stage, 0.0) + time.monotonic() - since
        wait(process, patience)
        if process.returncode:
            raise RuntimeError(
                f"{' '.join(arguments)}: exit code {process.returncode}\n{(self.folder / 'out').read_text()}"
            )
        return found

    def leftovers(self, interrupted: bool = False) -> list[str]:
        """Temporaries of rxdeploy, and whatever else is in the folder for them.

        Of a command that did not end well, what it had counted of a calibration is none: the next one goes on from it.
        """
        found = {path for path in self.folder.rglob("*") if ".rxdeploy-" in path.name}
        calibrating = self.cache / "calibrating"
        found |= {path for path in self.temporary.iterdir() if not _is_probe(path)}
        found |= set(calibrating.iterdir() if calibrating.is_dir() and not interrupted else ())
        return sorted(str(path.relative_to(self.folder)) for path in found)

    def locked(self) -> list[str]:
        """Locks that somebody holds: of stages, of entries, of what is being written."""
        paths = [*self.cache.glob("locks/*"), *self.cache.glob("stages/*/entry.json")]
        paths += [path for path in self.folder.rglob("*") if ".rxdeploy-" in path.name]
        return [str(path.relative_to(self.folder)) for path in paths if _is_locked(path)]


def _is_probe(path: Path) -> bool:
    """Whether it is the four bytes by which Python's tempfile tries out a folder, killed before it removes them."""
    return path.is_file() and path.read_bytes() in (b"", b"blat")


def _is_locked(path: Path) -> bool:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def wait(process: subprocess.Popen, patience: float) -> None:
    """Wait for its end in small steps (so that time for which this machine was stopped counts once), then give up."""
    for _ in range(int(patience / _TICK)):
        try:
            process.wait(_TICK)
            return
        except subprocess.TimeoutExpired:
            continue
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    raise TimeoutError(f"{' '.join(map(str, process.args))}: still running after {patience:g} s")


def write_inputs(folder: Path) -> Path:
    """The card and the images that every place links to."""
    folder.mkdir(parents=True)
    (folder / "small.toml").write_text(CARD, encoding="utf-8")
    write_files(choose(split()[0], 60, 0), folder / "images", by_class=True)
    return folder


def tree(folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> dict[str, str]:
    """sha256 of every file below a folder, by its relative path."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not leave_out(name := str(path.relative_to(folder)))
    }


def bundle_facts(folder: Path) -> dict[str, Any]:
    """Everything in a bundle, which is verified and loaded first, but for what no two builds have in common.

    That is a TensorRT-RTX plan, whose symbols are numbered differently each time, and so its digest, the manifest's and
    the number of the bill of materials.
    """
    bundle = open_bundle(folder)
    load(folder, "onnxruntime").close()
    files = tree(folder)
    if PLAN in bundle.manifest.files:
        texts = {}
        for name in (MANIFEST, SBOM):
            text = (folder / name).read_text(encoding="utf-8")
            texts[name] = json.loads(text.replace(bundle.manifest.files[PLAN].sha256, "differs"))
        manifest = texts[MANIFEST]
        manifest["digest"] = manifest["files"][PLAN]["bytes"] = texts[SBOM]["serialNumber"] = "differs"
        manifest["files"][SBOM] = "differs"
        files |= {name: json.dumps(text) for name, text in texts.items()} | {PLAN: "differs"}
    return files


def entries(cache: Path, measured: bool = False) -> dict[str, str]:
    """The cache's entries, but for those that hold a plan or measured times: of these, that they are whole.

    With `measured` that is so of all: what follows from measured times is another graph each time.
    """
    by_chance = ("[!.]*",) if measured else ("engine-*", "tuning-*")
    found = {} if measured else tree(cache / "stages", lambda name: name.startswith((".", "engine-", "tuning-")))
    for pattern in by_chance:
        for folder in (cache / "stages").glob(pattern):
            found[folder.name] = _whole(folder)
    return found


def _whole(folder: Path) -> str:
    digest, _, body = (folder / "entry.json").read_text().partition("\n")
    files = {name: sha256 for name, (_, sha256) in json.loads(body)["files"].items()}
    there = tree(folder, lambda name: name == "entry.json")
    return "whole" if digest == hashlib.sha256(body.encode()).hexdigest() and there == files else "damaged"
