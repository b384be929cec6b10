"""Files and folders that appear by rename: whole, or not at all.

Everything is written under a temporary name beside its destination, locked by the process that writes it, so that
what a killed process left behind can be told from what is being written, and swept by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_MARK = ".rxdeploy-tmp-"
_UNLOCKED_MARK = ".rxdeploy-new-"  # of what is not locked yet
_STALE_S = 3600  # after which what is not locked yet never will be
_AT_FDCWD = -100  # from fcntl.h: paths are relative to the working directory
_RENAME_EXCHANGE = 2  # from linux/fs.h


def _temporary_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}{_MARK}{uuid.uuid4().hex[:12]}")


def _not_yet_locked(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.replace(_MARK, _UNLOCKED_MARK))


@contextlib.contextmanager
def _held(temporary: Path, make: Callable[[Path], object]) -> Iterator[None]:
    """Make `temporary` and hold a lock on it, by which `sweep` in any process, or container, sees that it is in use.

    It gets the name that `sweep` looks for only once it is locked. The lock goes when this process does.
    """
    unnoticed = _not_yet_locked(temporary)
    make(unnoticed)
    handle = os.open(unnoticed, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then there is none to protect it
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unnoticed, temporary)
        yield
    finally:
        os.close(handle)
        _remove(unnoticed)
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` when the block ends without an error.

    An existing `destination` is exchanged with the new folder in one step. On an error, Ctrl-C included,
    nothing is left behind. OSError when the folder cannot be made or moved.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    sweep(destination.parent)
    folder = _temporary_name(destination)
    with _held(folder, Path.mkdir):
        yield folder
        try:
            os.rename(folder, destination)  # works when it is absent or empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(folder, destination)


@contextlib.contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A path to write to, which becomes `destination` (replacing it) when the block ends without an error.

    OSError when it cannot be made or moved.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    sweep(destination.parent)
    temporary = _temporary_name(destination)
    with _held(temporary, Path.touch):
        yield temporary
        os.replace(temporary, destination)


def write_bytes(destination: Path, data: bytes) -> None:
    """Write a whole file by rename."""
    with new_file(destination) as temporary:
        temporary.write_bytes(data)


def check_writable(destination: Path) -> None:
    """OSError when `destination` could not be written in the end; asked before the work, and leaves nothing."""
    parent = next(folder for folder in destination.resolve().parents if folder.exists())
    if os.path.ismount(destination):
        raise OSError(errno.EBUSY, "a mount point cannot be replaced; choose a folder inside", str(destination))
    probe = parent / _not_yet_locked(_temporary_name(destination)).name
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(parent)) from None  # not the probe's name, which says nothing


def sweep(folder: Path) -> None:
    """Remove what processes that no longer live left unfinished in `folder`."""
    for path in (*folder.glob(f".*{_MARK}*"), *folder.glob(f".*{_UNLOCKED_MARK}*")):
        with contextlib.suppress(OSError):  # locked by its process, or gone meanwhile
            if _UNLOCKED_MARK in path.name and time.time() - path.stat().st_mtime < _STALE_S:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; afterwards `new` is the former `old`.

    renameat2 does it in one step on Linux. Where it is missing (other systems, some network file systems)
    two renames do, between which the destination is absent for a moment but never half there.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = _temporary_name(old)
    try:
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)
    except BaseException:  # Ctrl-C too: the old folder must get its name back, unless the new one has it already
        if not old.exists():
            os.rename(aside, old)
        else:
            shutil.rmtree(aside, ignore_errors=True)
        raise
