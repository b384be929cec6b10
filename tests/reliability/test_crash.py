"""Killed at each operation that changes a file, or out of room at each write, a build loses and leaves nothing.

`job.py` is what is killed: a build that writes what a real one does. reliability/crash.py kills real ones.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("filelock", reason="the cache needs filelock")

import rxdeploy
from rxdeploy import atomic
from rxdeploy.cache import Cache, recipe_digest
from rxdeploy.engines.bundle import open_bundle
from rxdeploy.errors import RxDeployError

JOB = Path(__file__).with_name("job.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(rxdeploy.__file__).parents[1])}
FEWEST = 60  # operations of the job, or they are not seen
ROOM = 10**9


def load_job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", JOB)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


job = load_job()


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """What an older build left."""
    folder = tmp_path / "work"
    job.prepare(folder)
    return folder


@pytest.fixture
def after(before: Path) -> dict[str, str]:
    """All that a build leaves which nobody disturbs."""
    folder = before.with_name("undisturbed")
    shutil.copytree(before, folder)
    job.build(folder)
    return tree(folder)


def check_what_is_there(folder: Path, before: dict[str, str], after: dict[str, str]) -> None:
    """Under every name there is what was there, or what is to be there."""
    open_bundle(folder / "bundle")
    found = tree(folder)
    whole = [{n: d for n, d in files.items() if n.startswith("bundle/")} for files in (before, after)]
    assert {n: d for n, d in found.items() if n.startswith("bundle/")} in whole
    for name, digest in found.items():
        if "/." not in f"/{name}":  # else a temporary
            assert digest in (before.get(name), after.get(name)), name
    for path in (folder / "cache" / "stages").glob("[!.]*"):
        assert sorted(file.name for file in path.iterdir()) == ["entry.json", "model.onnx"]


def test_killed_at_any_operation(
    before: Path, after: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, str(JOB), str(before), "1", "1000"]
    kills = int(subprocess.run(command, stdout=subprocess.PIPE, env=ENVIRONMENT, check=True, timeout=120).stdout)
    assert kills >= FEWEST
    was, left_something = tree(before), 0
    for number in range(1, kills + 1):
        folder = tmp_path / f"work-{number}"
        check_what_is_there(folder, was, after)
        left_something += any(atomic._MARK in path.name for path in folder.rglob("*"))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        job.build(folder)  # would wait for ever for a lock that nobody frees
        assert tree(folder) == after, number
        assert not [path for path in folder.rglob("*") if ".rxdeploy-" in path.name], number
    assert left_something > kills / 4


@pytest.mark.parametrize("disk", ["full", "broken"])
def test_no_room_at_any_write(
    before: Path, after: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device") if disk == "full" else OSError(errno.EIO, "I/O error")
    was, failures = tree(before), 0
    for number in range(1, 100):
        folder = tmp_path / f"work-{number}"
        shutil.copytree(before, folder)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with monkeypatch.context() as patch:
            no_room_at(number, error, patch)
            try:
                job.build(folder)
            except (OSError, RxDeployError) as caught:
                assert str(error.strerror) in str(caught)
                failures += 1
            else:
                break
        check_what_is_there(folder, was, after)
        assert not [path for path in folder.rglob("*") if ".rxdeploy-" in path.name], number
        job.build(folder)
        assert tree(folder) == after, number
    assert failures >= 10


def no_room_at(number: int, error: OSError, patch: pytest.MonkeyPatch) -> None:
    """The `number`-th file, folder or rename fails; a file of which half is there by then."""
    left = number

    def failing(original: Callable[..., Any], write: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                write(*arguments)
                raise error
            return original(*arguments, **options)

        return call

    def half(path: Path, data: bytes | str, *_: Any) -> None:
        with path.open("wb") as file:
            file.write((data.encode() if isinstance(data, str) else data)[: len(data) // 2])

    patch.setattr(Path, "write_bytes", failing(Path.write_bytes, half))
    patch.setattr(Path, "write_text", failing(Path.write_text, half))
    patch.setattr(Path, "mkdir", failing(Path.mkdir))
    patch.setattr(shutil, "copyfile", failing(shutil.copyfile, lambda _, to: to.touch()))
    patch.setattr(os, "replace", failing(os.replace))


# Caches that cannot be written


class Refused:
    """Stands before mkdir and access, as for a folder in which this user may not write."""

    def __init__(self, folder: Path, number: int, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.number = folder, number
        self._mkdir, self._access = Path.mkdir, os.access
        patch.setattr(Path, "mkdir", lambda path, *a, **o: self.mkdir(path, *a, **o))
        patch.setattr(os, "access", self.access)

    def mkdir(self, path: Path, *arguments: Any, **options: Any) -> None:
        if self.folder in (path, *path.parents) and not path.exists():
            raise OSError(self.number, os.strerror(self.number), str(path))
        self._mkdir(path, *arguments, **options)

    def access(self, path: Path, mode: int) -> bool:
        return self.folder not in (path, *path.parents) and self._access(path, mode)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, filled: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, key = tmp_path / "cache", recipe_digest(a=1)
    if filled:
        cache = Cache(folder, ROOM)
        cache.stage("export", key, lambda new: job.produce(new, "export"))
        cache.close()
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        Refused(folder, number, patch)
        patch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(OSError(number, "no")))
        cache = Cache(folder, ROOM)
        entries = [
            cache.stage("export", key, lambda new: job.produce(new, "export")),
            *(cache.stage("engine", key, lambda new: job.produce(new, "engine")) for _ in range(2)),
        ]
        assert [entry.reused for entry in entries] == [filled, False, False]
        contents = [(entry.folder / "model.onnx").read_bytes() for entry in entries]
        assert contents == [job.content("export"), job.content("engine"), job.content("engine")]
        cache.close()
    assert tree(tmp_path) == before and not any(atomic._MARK in path.name for path in tmp_path.iterdir())
    assert [record.getMessage() for record in caplog.records] == [
        f"the cache {folder} cannot be written: what it has is used, nothing is added; set RXDEPLOY_CACHE to another "
        "folder"
    ]


def test_a_full_disk_is_not_taken_for_a_read_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Refused(tmp_path / "cache", errno.ENOSPC, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        Cache(tmp_path / "cache", ROOM).stage("export", "0", lambda new: {})


# What is swept


def test_a_cache_sweeps_what_calibrations_left_that_nobody_came_back_to(tmp_path: Path) -> None:
    calibrating = tmp_path / "calibrating"
    for key in ("old", "new"):
        (calibrating / key).mkdir(parents=True)
        (calibrating / key / "pass.npz").write_bytes(b"counts so far")
        (calibrating / key / ".pass.npz.rxdeploy-tmp-1").write_bytes(b"half")
    os.utime(calibrating / "old", (0, 0))
    (tmp_path / "stages").mkdir()
    Cache(tmp_path, ROOM).close()
    assert sorted(str(path.relative_to(calibrating)) for path in calibrating.rglob("*.npz")) == ["new/pass.npz"]
    assert not list(calibrating.rglob(".*")), "temporaries"


def test_clear_sweeps_too(tmp_path: Path) -> None:
    for folder in ("stages/.x.rxdeploy-tmp-1", "stages/.y.rxdeploy-tmp-2"):
        (tmp_path / folder).mkdir(parents=True)
    held = os.open(tmp_path / "stages" / ".y.rxdeploy-tmp-2", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    Cache(tmp_path, ROOM).clear()
    os.close(held)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == [".y.rxdeploy-tmp-2"]
