"""Reading a small file that somebody else wrote: a plain one, of a size that such a file can have."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rxdeploy.errors import InputError

MOST_BYTES = 64 << 20  # of what has no limit of its own: a calibration.json of resnext50 has 0.6 MB


def read_plain(path: Path, what: str, most: int = MOST_BYTES) -> bytes:
    """The file's content; `what` begins the errors.

    InputError for what is not there, cannot be read, is no plain file or has more than `most` bytes. It is opened
    before it is looked at, so nothing can be put in its place meanwhile, and without waiting: a pipe that nobody
    writes to would take for ever, and so would a device.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise InputError(f"{what}: not a plain file")
            if facts.st_size > most:
                raise InputError(f"{what}: {facts.st_size:,} bytes, more than the {most:,} that such a file may have")
            return file.read(most)
    except FileNotFoundError:
        raise InputError(f"{what}: no such file") from None
    except IsADirectoryError:  # Python will not make a file of it
        raise InputError(f"{what}: not a plain file") from None
    except OSError as error:
        raise InputError(f"{what}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a NUL in it
        raise InputError(f"{what}: cannot be read: {error}") from None
