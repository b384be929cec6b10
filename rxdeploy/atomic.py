"""Files and folders that appear by rename: whole, or not at all.

Everything is written under a temporary name beside its destination, and a name tells which process writes
it, so that what a killed process left behind can be swept by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_MARK = ".rxdeploy-tmp-"
_AT_FDCWD = -100  # from fcntl.h: paths are relative to the working directory
_RENAME_EXCHANGE = 2  # from linux/fs.h


def _temporary_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}{_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` when the block ends without an error.

    An existing `destination` is exchanged with the new folder in one step. On an error, Ctrl-C included,
    nothing is left behind.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    sweep(destination.parent)
    folder = _temporary_name(destination)
    folder.mkdir()
    try:
        yield folder
        try:
            os.rename(folder, destination)  # works when it is absent or empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A path to write to, which becomes `destination` (replacing it) when the block ends without an error."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    sweep(destination.parent)
    temporary = _temporary_name(destination)
    try:
        yield temporary
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(destination: Path, data: bytes) -> None:
    """Write a whole file by rename."""
    with new_file(destination) as temporary:
        temporary.write_bytes(data)


def sweep(folder: Path) -> None:
    """Remove what processes that no longer live left unfinished in `folder`."""
    for path in folder.glob(f".*{_MARK}*"):
        pid = path.name.rpartition(_MARK)[2].partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; or no process id of this system
        pass
    return True


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
