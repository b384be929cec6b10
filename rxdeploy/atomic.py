"""Files and folders that appear by rename: whole, or not at all.

Everything is written under a temporary name beside its destination, locked by the process that writes it, so that
what a killed process left behind can be told from what is being written, and swept by the next one. What is durable is
on the disk before it has its name, and has it there before what it replaces goes: after a power cut too, there is the
old one or the new one. The cache, whose entries are checked before they are used, does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_MARK = ".rxdeploy-tmp-"
_ASIDE_MARK = ".rxdeploy-old-"  # of a folder that makes room for the new one of its name
_ABANDONED_S = 7 * 24 * 3600  # after which a temporary is nobody's, on a file system that has no locks to tell by
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)  # of a file system that cannot do it for such a file
_AT_FDCWD = -100  # from fcntl.h: paths are relative to the working directory
_RENAME_EXCHANGE = 2  # from linux/fs.h


def _temporary_name(destination: Path, mark: str = _MARK) -> Path:
    return destination.with_name(f".{destination.name}{mark}{uuid.uuid4().hex[:12]}")


@contextlib.contextmanager
def _held(destination: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary for `destination`, by `make`, with a lock by which `sweep` in any process, or container, sees that it
    is in use. The lock goes when this process does, and the temporary at the end of the block.
    """
    temporary, handle = _temporary_name(destination), None
    try:
        while handle is None:
            temporary = _temporary_name(destination)
            make(temporary)
            handle = _first_lock(temporary)
        yield temporary
    finally:
        if handle is not None:
            os.close(handle)
        _remove(temporary)


def _first_lock(temporary: Path) -> int | None:
    """The lock on what was made a moment ago; None when a `sweep` came first, which took it for a dead process's."""
    try:
        handle = _open(temporary)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # the sweeper has it, and removes it
        os.close(handle)
        return None
    except OSError:
        return handle  # a file system without locks: `sweep` goes by the time there
    if not temporary.exists():
        os.close(handle)
        return None
    return handle


def _open(path: Path) -> int:
    """A handle to lock by: over NFS, which makes flock a lock of the server's, only one that may write will do."""
    return os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder and all that is in it, is on the disk."""
    for each in (*path.rglob("*"), path):
        if not each.is_symlink():
            _fsync(os.open(each, os.O_RDONLY | os.O_NOFOLLOW))


def _names_to_disk(*paths: Path) -> None:
    """The same for names that were given, before what one of them replaces goes."""
    for path in paths:
        try:
            handle = os.open(path.parent, os.O_RDONLY)
        except OSError:
            continue  # a folder to write to, and not to read: nothing can be told of it
        _fsync(handle)


def _fsync(handle: int) -> None:
    """Wait for what was opened, and close it."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(handle)


def _make_parents(destination: Path) -> list[Path]:
    """The folders above `destination` that were not there, and now are."""
    made = [folder for folder in destination.parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    return made


@contextlib.contextmanager
def new_folder(destination: Path, durable: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` when the block ends without an error.

    An existing `destination` is exchanged with the new folder in one step. On an error, Ctrl-C included,
    nothing is left behind. OSError when the folder cannot be made or moved.
    """
    above = _make_parents(destination)
    sweep(destination.parent)
    with _held(destination, Path.mkdir) as folder:
        yield folder
        if durable:
            _to_disk(folder)
        try:
            os.rename(folder, destination)  # works when it is absent or empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(folder, destination)
        if durable:
            _names_to_disk(destination, *above)


@contextlib.contextmanager
def new_file(destination: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write to, which becomes `destination` (replacing it) when the block ends without an error.

    OSError when it cannot be made or moved.
    """
    above = _make_parents(destination)
    sweep(destination.parent)
    with _held(destination, Path.touch) as temporary:
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, destination)
        if durable:
            _names_to_disk(destination, *above)


def write_bytes(destination: Path, data: bytes) -> None:
    """Write a whole file by rename."""
    with new_file(destination) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A folder of this user's alone in the system's place for temporary files, gone at the end of the block.

    Unlike tempfile's it does not stay for ever when the process is killed: the next one sweeps it.
    """
    parent = Path(tempfile.gettempdir())
    sweep(parent)
    with _held(parent / f"rxdeploy-{purpose}", lambda path: path.mkdir(0o700)) as folder:
        yield folder


def discard(path: Path) -> None:
    """Remove a file or folder, out of its name first: a reader finds it whole or not at all. OSError when it stays."""
    doomed = _temporary_name(path)
    os.rename(path, doomed)
    _remove(doomed)


def check_writable(destination: Path) -> None:
    """OSError when `destination` could not be written in the end; asked before the work, and leaves nothing."""
    parent = next(folder for folder in destination.resolve().parents if folder.exists())
    if os.path.ismount(destination):
        raise OSError(errno.EBUSY, "a mount point cannot be replaced; choose a folder inside", str(destination))
    probe = _temporary_name(parent / destination.name)
    try:
        probe.mkdir()
        with contextlib.suppress(FileNotFoundError):  # swept by another process
            probe.rmdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(parent)) from None  # not the probe's name, which says nothing


def sweep(folder: Path) -> None:
    """Remove what processes that no longer live left unfinished in `folder`, and undo a half-made exchange."""
    for path in (*folder.glob(f".*{_MARK}*"), *folder.glob(f".*{_ASIDE_MARK}*")):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            handle = _open(path)
            try:
                if _abandoned(handle):
                    if _ASIDE_MARK in path.name:
                        _restore(path)
                    _remove(path)
            finally:
                os.close(handle)


def _abandoned(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here (NFS has none for folders): a writer may live on any host
        return time.time() - os.fstat(handle).st_mtime > _ABANDONED_S
    return True


def _restore(aside: Path) -> None:
    """Give a folder that was moved aside its name back, unless the new one has it."""
    destination = aside.with_name(aside.name[1:].rpartition(_ASIDE_MARK)[0])
    with contextlib.suppress(OSError):
        if not os.path.lexists(destination):
            os.rename(aside, destination)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; afterwards `new` is the former `old`.

    renameat2 does it in one step on Linux. Where it is missing (other systems, some network file systems)
    two renames do, between which the destination is absent for a moment but never half there; after a kill in that
    moment `sweep` gives the old one its name back.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = _temporary_name(old, _ASIDE_MARK)
    handle = _open(old)
    try:
        with contextlib.suppress(OSError):  # as in `_held`: no `sweep` is to take it while this process lives
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)
    except BaseException:  # Ctrl-C too: the old folder must get its name back, unless the new one has it already
        if not old.exists():
            os.rename(aside, old)
        else:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(handle)
