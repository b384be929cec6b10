"""The predictions file: JSON lines, a header and then a line for each image, written as the evaluation goes.

While it is being written it is called FILE.partial, and the same evaluation goes on from there after an interruption;
once it is whole it is renamed to FILE. docs/evaluation.md has the format.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import msgspec

from rxdeploy import atomic
from rxdeploy.errors import InputError, from_os_error, printable

KIND: Literal["rxdeploy predictions"] = "rxdeploy predictions"
_MOST_DIFFERENT = 3  # differing facts to name in an error


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the predictions are of: two files with the same header can only differ in how far they are."""

    kind: Literal["rxdeploy predictions"] = KIND
    schema: Literal[1] = 1
    model: str
    precision: str
    bundle: str  # the manifest's digest
    device: str  # Session.description
    data: str  # Dataset.fingerprint of the images
    images: int  # to be evaluated, those that cannot be decoded among them


class Predicted(msgspec.Struct, frozen=True):
    """What the model made of one image."""

    image: str  # the item's name
    sha256: str  # of the image's bytes; of an array: see rxdeploy.datasets
    label: int
    top: tuple[int, ...]  # the five most probable classes (all, of fewer), best first
    probability: float  # of the first

    @property
    def right(self) -> bool:
        """Whether the most probable class is the image's."""
        return self.top[0] == self.label


class Skipped(msgspec.Struct, frozen=True):
    """An image that could not be decoded."""

    image: str
    reason: str


class _Line(msgspec.Struct):
    """Either of them, as it stands in the file."""

    image: str
    sha256: str | None = None
    label: int | None = None
    top: tuple[int, ...] = ()
    probability: float | None = None
    skipped: str | None = None

    def read(self) -> Predicted | Skipped:
        if self.skipped is not None:
            return Skipped(self.image, self.skipped)
        if self.sha256 is None or self.label is None or self.probability is None or not self.top:
            raise ValueError(f"the line of {self.image} lacks a key")
        return Predicted(self.image, self.sha256, self.label, self.top, self.probability)


class PredictionsFile:
    """A predictions file, new, half done or whole; use it in a `with`.

    `done` holds what it had when it was opened; `whole` says whether that is everything, so that nothing may be added.
    InputError for a file of another evaluation, one that another process is writing, and one that is something else.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.header = header
        self.done: dict[str, Predicted] = {}
        self.skipped: list[Skipped] = []
        self.whole = path.exists()
        self._file: IO[bytes] | None = None
        if path.is_dir():
            raise InputError(f"predictions {path}: is a folder; give a file name")
        try:
            if self.whole:
                self._read(path, path.read_bytes())
            else:
                self._open_partial()
        except OSError as error:
            self.close()
            raise from_os_error(error, f"predictions {path}") from None
        except InputError:
            self.close()
            raise

    def __enter__(self) -> PredictionsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file; what was added stays."""
        if self._file:
            self._file.close()

    def add(self, predictions: Sequence[Predicted]) -> None:
        """Append predictions, so that they are not lost when the process is."""
        self._write(b"".join(msgspec.json.encode(prediction) + b"\n" for prediction in predictions))

    def finish(self, skipped: Sequence[Skipped]) -> None:
        """Add the images that were left out, and give the file its name."""
        lines = (_Line(image=left_out.image, skipped=left_out.reason) for left_out in skipped)
        self._write(b"".join(_short(line) + b"\n" for line in lines))
        try:
            os.replace(self.partial, self.path)
        except OSError as error:
            raise from_os_error(error, f"predictions {self.path}") from None

    def _write(self, data: bytes) -> None:
        assert self._file, "a whole predictions file takes no more"
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise from_os_error(error, f"predictions {self.partial}") from None

    def _open_partial(self) -> None:
        atomic.check_writable(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("a+b")
        self._lock()
        self._file.seek(0)
        data = self._file.read()
        # The process may have been killed in the middle of a line.
        kept = data[: data.rfind(b"\n") + 1]
        if kept:
            self._read(self.partial, kept)
            self._file.truncate(len(kept))
        else:
            self._file.truncate(0)
            self._write(msgspec.json.encode(self.header) + b"\n")

    def _lock(self) -> None:
        assert self._file
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"predictions {self.partial}: another process is writing it; choose another file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _read(self, path: Path, data: bytes) -> None:
        first, *lines = data.splitlines() or [b""]
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            self._check(path, msgspec.json.decode(first, type=Header))
            return self._read_lines(path, lines)
        raise InputError(f"predictions {path}: exists and is no predictions file; choose another name")

    def _check(self, path: Path, found: Header) -> None:
        keys = [key for key in self.header.__struct_fields__ if getattr(found, key) != getattr(self.header, key)]
        if not keys:
            return
        of = "; ".join(
            f"its {key} is {printable(str(getattr(found, key)))}, not {getattr(self.header, key)}"
            for key in keys[:_MOST_DIFFERENT]
        )
        raise InputError(
            f"predictions {path}: they are of another bundle, device or data ({of}); choose another name, or delete it"
        )

    def _read_lines(self, path: Path, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines, start=2):
            try:
                found = msgspec.json.decode(line, type=_Line).read()
            except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
                raise InputError(
                    f"predictions {path}: line {number} is damaged: {error}; delete it to start again"
                ) from None
            if isinstance(found, Skipped):
                self.skipped.append(found)
            else:
                self.done[found.image] = found


def _short(line: _Line) -> bytes:
    return msgspec.json.encode({"image": line.image, "skipped": line.skipped})
