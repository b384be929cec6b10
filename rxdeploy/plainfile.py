"""Reading a small file that somebody else wrote: a plain one, of a size that such a file can have."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from rxdeploy.errors import InputError

MOST_BYTES = 64 << 20  # of what has no limit of its own: a calibration.json of resnext50 has 0.6 MB


def open_plain(path: Path, flags: int = 0) -> BinaryIO:
    """Open a file for reading, without waiting; OSError, with EINVAL for what is no plain file.

    What lies at a path may be exchanged at any moment: what was opened is what is looked at, and read. `flags` are
    further ones of `os.open`.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file")
    return os.fdopen(handle, "rb")


def read_plain(path: Path, what: str, most: int = MOST_BYTES) -> bytes:
    """The file's content; `what` begins the errors.

    InputError for what is not there, cannot be read, is no plain file or has more than `most` bytes. A pipe that nobody
    writes to would take for ever, and so would a device.
    """
    try:
        with open_plain(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise InputError(f"{what}: {size:,} bytes, more than the {most:,} that such a file may have")
            return file.read(most)
    except FileNotFoundError:
        raise InputError(f"{what}: no such file") from None
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise InputError(f"{what}: not a plain file") from None
        raise InputError(f"{what}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a NUL in it
        raise InputError(f"{what}: cannot be read: {error}") from None
