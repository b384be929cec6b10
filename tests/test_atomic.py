"""Files and folders appear whole or not at all, whatever happens in the middle; killed writers are swept up after.

The reference is the file system itself: what another thread, or another process after a SIGKILL, finds there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rxdeploy
from rxdeploy import atomic

EXCHANGES = 200
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(rxdeploy.__file__).parents[1])}

# Starts writing, says so, and goes on when its stdin is closed.
WRITER = """
import sys
from pathlib import Path
from rxdeploy import atomic
with getattr(atomic, sys.argv[1])(Path(sys.argv[2])) as new:
    (new / "half" if sys.argv[1] == "new_folder" else new).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""

# Replaces a folder without renameat2, and is killed after so many renames.
KILLED = """
import ctypes, os, signal, sys
from pathlib import Path
from rxdeploy import atomic
rename, left = os.rename, int(sys.argv[1])
def killed(source, target):
    global left
    left -= 1
    try:
        rename(source, target)
    finally:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
ctypes.CDLL = lambda *_, **__: None
os.rename = killed
with atomic.new_folder(Path(sys.argv[2])) as folder:
    for name in "ab":
        (folder / name).write_text("new")
"""


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    for name in "ab":
        (folder / name).write_text(text)


@pytest.fixture
def writer() -> Iterator[Callable[[str, Path], subprocess.Popen[str]]]:
    """Starts a process that is in the middle of new_folder or new_file."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, destination: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(destination)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        started.append(process)
        assert process.stdout and process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# new_folder


def test_a_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    destination = tmp_path / "parent" / "new"
    with atomic.new_folder(destination) as folder:
        assert folder.parent == destination.parent, "on another file system it could not be renamed"
        fill(folder, "1")
        assert not destination.exists()
    assert content(destination) == {"a": "1", "b": "1"}
    assert names(tmp_path / "parent") == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic.new_folder(tmp_path / "new") as folder:
        (folder / "sub").mkdir()
        fill(folder / "sub", "1")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    destination = tmp_path / "old"
    destination.mkdir()
    fill(destination, "old")
    with pytest.raises(error), atomic.new_folder(destination) as folder:
        (folder / "a").write_text("new")
        raise error
    assert content(destination) == {"a": "old", "b": "old"}
    assert names(tmp_path) == ["old"]


def test_a_replaced_folder_has_only_the_new_files(tmp_path: Path) -> None:
    destination = tmp_path / "it"
    destination.mkdir()
    fill(destination, "old")
    (destination / "sub").mkdir()
    with atomic.new_folder(destination) as folder:
        (folder / "c").write_text("new")
        assert content_of_files(destination) == {"a": "old", "b": "old"}
    assert content(destination) == {"c": "new"}
    assert names(tmp_path) == ["it"]


def content_of_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("a file")
    with pytest.raises(OSError), atomic.new_folder(tmp_path / "it") as folder:
        fill(folder, "new")
    assert (tmp_path / "it").read_text() == "a file"
    assert names(tmp_path) == ["it"]


def can_exchange(folder: Path) -> bool:
    """Whether renameat2 swaps two folders here, asked of the kernel without atomic's help."""
    for name in "xy":
        (folder / name).mkdir()
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    works = renameat2 is not None and renameat2(-100, bytes(folder / "x"), -100, bytes(folder / "y"), 2) == 0
    for name in "xy":
        (folder / name).rmdir()
    return works


def test_a_reader_never_finds_a_folder_missing_or_half(tmp_path: Path) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this file system has no renameat2 with RENAME_EXCHANGE")
    destination = tmp_path / "it"
    problems: list[str] = []
    reads = 0
    started, stop = threading.Event(), threading.Event()

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            try:
                held = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                problems.append("missing")
                continue
            try:
                found = os.listdir(held)
                texts = set()
                for name in found:
                    file = os.open(name, os.O_RDONLY, dir_fd=held)
                    texts.add(os.read(file, 100))
                    os.close(file)
            except FileNotFoundError:
                found, texts = [], set()  # replaced meanwhile and being removed, or there is a problem:
            # a folder that still stands under its name after it was read was whole all the time.
            if os.stat(destination).st_ino == os.fstat(held).st_ino:
                reads += 1
                if sorted(found) != ["a", "b"] or len(texts) != 1:
                    problems.append(f"half: {found} {texts}")
            os.close(held)
            started.set()

    with atomic.new_folder(destination) as folder:
        fill(folder, "0")
    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert started.wait(10)
        index, deadline = 0, time.monotonic() + 10
        while index < EXCHANGES or (reads < EXCHANGES and time.monotonic() < deadline):
            index += 1
            with atomic.new_folder(destination) as folder:
                fill(folder, str(index))
    finally:
        stop.set()
        reader.join()
    assert not problems, problems[:5]
    assert reads > EXCHANGES / 10, "the reader hardly ran"
    assert content(destination) == {"a": str(index), "b": str(index)}
    assert names(tmp_path) == ["it"]


def test_a_folder_that_appears_at_the_last_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when two builds to one destination end together."""
    destination, rename = tmp_path / "it", os.rename

    def another_was_first(source: Path, target: Path) -> None:
        monkeypatch.undo()
        destination.mkdir()
        fill(destination, "another's")
        rename(source, target)

    monkeypatch.setattr(os, "rename", another_was_first)
    with atomic.new_folder(destination) as folder:
        fill(folder, "ours")
    assert content(destination) == {"a": "ours", "b": "ours"}


# Without renameat2


@pytest.fixture(params=["missing", "fails"])
def no_exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace() if request.param == "missing" else SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)


@pytest.mark.usefixtures("no_exchange")
def test_without_renameat2_a_folder_is_replaced_too(tmp_path: Path) -> None:
    destination = tmp_path / "it"
    for text in ("1", "2", "3"):
        with atomic.new_folder(destination) as folder:
            fill(folder, text)
        assert content(destination) == {"a": text, "b": text}
        assert names(tmp_path) == ["it"]


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "broken disk"),
        KeyboardInterrupt(),
    ],
    ids=["OSError", "KeyboardInterrupt"],
)
def test_without_renameat2_a_failure_between_the_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    destination = tmp_path / "it"
    with atomic.new_folder(destination) as folder:
        fill(folder, "old")
    rename, calls = os.rename, 0

    def second_fails(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # after the attempt without replacing, and the old folder's move aside
            assert not destination.exists()
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(type(error)), atomic.new_folder(destination) as folder:
        fill(folder, "new")
    assert content(destination) == {"a": "old", "b": "old"}
    assert names(tmp_path) == ["it"]


# new_file, write_bytes


def test_a_file_appears_at_the_end_of_the_block_and_replaces_the_old_one(tmp_path: Path) -> None:
    destination = tmp_path / "parent" / "file"
    for text in ("first", "second"):
        with atomic.new_file(destination) as temporary:
            assert temporary.parent == destination.parent
            temporary.write_text(text)
            assert not destination.exists() or destination.read_text() == "first"
        assert destination.read_text() == text
    assert names(tmp_path / "parent") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_file_or_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    destination = tmp_path / "file"
    for before in ([], ["file"]):
        with pytest.raises(error), atomic.new_file(destination) as temporary:
            temporary.write_text("half")
            raise error
        assert names(tmp_path) == before
        destination.write_text("old")
    assert destination.read_text() == "old"


def test_write_bytes_writes_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "parent" / "file"
    atomic.write_bytes(destination, b"\0old")
    assert destination.read_bytes() == b"\0old"

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(destination, b"new")
    assert destination.read_bytes() == b"\0old"
    assert names(tmp_path / "parent") == ["file"]


# Power cuts


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was forced to the disk, got another name or went, in this order."""
    calls: list[tuple[str, str]] = []

    def listed(module: Any, name: str, naming: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, naming(*arguments)))
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    listed(os, "fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    for name in ("rename", "replace"):
        listed(os, name, lambda _, destination: Path(destination).name)
    listed(atomic, "_exchange", lambda _, old: Path(old).name)
    listed(shutil, "rmtree", lambda *_: "")
    return calls


def test_a_folder_is_on_the_disk_before_the_old_one_goes(tmp_path: Path, journal: list[tuple[str, str]]) -> None:
    for moved in ("rename", "_exchange"):
        journal.clear()
        with atomic.new_folder(tmp_path / "new") as folder:
            (folder / "1").mkdir()
            (folder / "1" / "model").write_text("model")
            (folder / "manifest").write_text("manifest")
        forced = {name for call, name in journal[: journal.index((moved, "new"))] if call == "fsync"}
        assert forced == {"1", "model", "manifest", folder.name}
        after = journal[journal.index((moved, "new")) + 1 :]
        assert after == [("fsync", tmp_path.name)] + [("rmtree", "")] * (moved == "_exchange")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, journal: list[tuple[str, str]]) -> None:
    with atomic.new_file(tmp_path / "file") as temporary:
        temporary.write_text("text")
    assert journal == [("fsync", temporary.name), ("replace", "file"), ("fsync", tmp_path.name)]


def test_what_need_not_be_durable_waits_for_no_disk(tmp_path: Path, journal: list[tuple[str, str]]) -> None:
    with atomic.new_folder(tmp_path / "folder", durable=False) as folder:
        (folder / "file").write_text("text")
    with atomic.new_file(tmp_path / "file", durable=False) as file:
        file.write_text("text")
    assert [call for call, _ in journal] == ["rename", "replace"]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
def test_a_disk_that_cannot_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A file system without fsync takes the file all the same; a disk that fails does not."""

    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    if error == errno.EINVAL:
        atomic.write_bytes(tmp_path / "file", b"new")
    else:
        with pytest.raises(OSError, match="Input/output"):
            atomic.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == ("new" if error == errno.EINVAL else "old")
    assert names(tmp_path) == ["file"]


# sweep


@pytest.mark.parametrize("kind", ["new_folder", "new_file"])
def test_what_a_killed_process_left_is_swept(
    tmp_path: Path, writer: Callable[[str, Path], subprocess.Popen[str]], kind: str
) -> None:
    process = writer(kind, tmp_path / "it")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = names(tmp_path)
    assert left != "it", "a half-written result under the final name"
    atomic.sweep(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["new_folder", "new_file"])
def test_what_a_living_process_writes_is_kept(
    tmp_path: Path, writer: Callable[[str, Path], subprocess.Popen[str]], kind: str
) -> None:
    process = writer(kind, tmp_path / "it")
    atomic.sweep(tmp_path)
    process.communicate()  # lets it finish
    assert process.returncode == 0
    assert names(tmp_path) == ["it"]


def test_the_next_new_folder_sweeps_after_a_killed_one(
    tmp_path: Path, writer: Callable[[str, Path], subprocess.Popen[str]]
) -> None:
    process = writer("new_folder", tmp_path / "killed")
    process.kill()
    process.wait()
    with atomic.new_folder(tmp_path / "next") as folder:
        fill(folder, "1")
    assert names(tmp_path) == ["next"]


def test_sweep_keeps_what_this_process_writes(tmp_path: Path) -> None:
    with atomic.new_file(tmp_path / "it") as temporary, atomic.new_folder(tmp_path / "that") as folder:
        temporary.write_text("half")
        fill(folder, "half")
        atomic.sweep(tmp_path)
        assert temporary.read_text() == "half"
        assert content(folder) == {"a": "half", "b": "half"}


def test_sweep_does_not_go_by_process_ids(
    tmp_path: Path, writer: Callable[[str, Path], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another container the writer's process id means nothing, or another process."""
    process = writer("new_folder", tmp_path / "it")
    monkeypatch.setattr(os, "kill", raising_lookup_error)
    atomic.sweep(tmp_path)
    monkeypatch.undo()
    process.communicate()
    assert names(tmp_path) == ["it"]


def raising_lookup_error(*_: object) -> None:
    raise ProcessLookupError


def test_where_there_are_no_locks_sweep_goes_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with atomic.new_folder(tmp_path / "it") as folder:
        atomic.sweep(tmp_path)
        fill(folder, "1")
    for name in (".it.rxdeploy-tmp-1", ".it.rxdeploy-tmp-2"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".it.rxdeploy-tmp-1", (0, 0))
    atomic.sweep(tmp_path)
    assert names(tmp_path) == [".it.rxdeploy-tmp-2", "it"]


@pytest.mark.parametrize("moment", ["open", "flock", "exists"])
def test_a_sweep_between_making_and_locking_costs_a_new_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What is not locked yet looks like a dead process's; whoever made it then makes another."""
    patched, original = {
        "open": (atomic.os, os.open),
        "flock": (atomic.fcntl, fcntl.flock),
        "exists": (Path, Path.exists),
    }[moment]
    swept: list[str] = []

    def after_a_sweep(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        swept.extend(names(tmp_path))
        if moment != "exists":
            atomic.sweep(tmp_path)
        else:  # the sweeper had the lock first, and is done
            shutil.rmtree(tmp_path / names(tmp_path)[0])
        return original(*arguments, **options)

    monkeypatch.setattr(patched, moment, after_a_sweep)
    destination = tmp_path / "it"
    with atomic._held(destination, Path.mkdir) as folder:
        assert folder.is_dir() and names(tmp_path) == [folder.name]
        assert len(swept) == 1 and swept[0] != folder.name
    assert names(tmp_path) == []


def test_a_sweeper_that_has_the_lock_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, others = fcntl.flock, []

    def second(handle: int, how: int) -> None:
        monkeypatch.undo()
        (name,) = names(tmp_path)
        others.append(os.open(tmp_path / name, os.O_RDONLY))
        flock(others[0], fcntl.LOCK_EX)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", second)
    with atomic._held(tmp_path / "it", Path.mkdir) as folder:
        assert folder.is_dir() and len(names(tmp_path)) == 2
    os.close(others[0])


@pytest.mark.parametrize(("calls", "left"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_kill_within_an_exchange_by_renames_loses_neither_folder(tmp_path: Path, calls: int, left: str) -> None:
    destination = tmp_path / "it"
    destination.mkdir()
    fill(destination, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(calls), str(destination)], env=ENVIRONMENT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    atomic.sweep(tmp_path)
    assert content(destination) == {"a": left, "b": left}
    assert names(tmp_path) == ["it"]


# scratch_folder, discard


def test_a_scratch_folder_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / ".rxdeploy-tune.rxdeploy-tmp-0"
    left.mkdir()
    with atomic.scratch_folder("tune") as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        assert not left.exists(), "what a killed process left"
        fill(folder, "1")
    assert names(tmp_path) == []


def test_discard_takes_away_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "it").mkdir()
    fill(tmp_path / "it", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        atomic.discard(tmp_path / "it")
    (left,) = names(tmp_path)
    assert left.startswith(".it.rxdeploy-tmp-")
    atomic.sweep(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        atomic.discard(tmp_path / "it")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_sweep_keeps_everything_else(tmp_path: Path) -> None:
    for name in ("file", ".hidden", ".it.rxdeploy-new-1", "it.rxdeploy-tmp-1"):
        (tmp_path / name).write_text("")
    before = names(tmp_path)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == before
    atomic.sweep(tmp_path / "absent")
