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
from rxdeploy.errors import InputError, RxDeployError, from_os_error, printable

KIND: Literal["rxdeploy predictions"] = "rxdeploy predictions"
_MOST_DIFFERENT = 3  # differing facts to name in an error
_LONGEST_LINE = 1 << 20  # bytes; what has longer ones is some other file


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
    InputError for a file of another evaluation, one that another process is writing, one that was cut off after it
    was whole, and one that is something else.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.done: dict[str, Predicted] = {}
        self.skipped: list[Skipped] = []
        self._file: IO[bytes] | None = None
        try:
            if path.is_dir():
                raise InputError(f"predictions {path}: is a folder; give a file name")
            self.partial = path.with_name(path.name + ".partial")
            self.whole = path.exists()
            for there in (path, self.partial):
                if there.exists() and not there.is_file():
                    raise InputError(f"predictions {there}: exists and is no plain file; choose another name")
            if self.whole:
                with path.open("rb") as file:
                    self._read(path, file)
            else:
                self._open_partial()
        except BaseException as error:
            with contextlib.suppress(RxDeployError):
                self.close()
            if isinstance(error, OSError):
                raise from_os_error(error, f"predictions {path}") from None
            raise

    def __enter__(self) -> PredictionsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A full disk fails the last write and then closing too: the first error is the one to show.
        with contextlib.suppress(RxDeployError) if error else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Let others have the file; what was added stays."""
        file, self._file = self._file, None
        if file:
            try:
                file.close()
            except OSError as error:
                raise from_os_error(error, f"predictions {self.partial}") from None

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
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise from_os_error(error, f"predictions {self.partial}") from None

    def _open_partial(self) -> None:
        atomic.check_writable(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open(
            "ab", buffering=0
        )  # unbuffered: nothing is left that closing could fail to write
        self._lock()
        with self.partial.open("rb") as file:
            kept = self._read(self.partial, file)
        self._file.truncate(kept)
        if not kept:
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

    def _read(self, path: Path, file: IO[bytes]) -> int:
        """Take in what the file has; how many of its bytes are to be kept when it is gone on from."""
        first = file.readline(_LONGEST_LINE)
        if not self.whole and not first.endswith(b"\n") and len(first) < _LONGEST_LINE:
            return 0  # killed within the header
        self._check(path, self._header(path, first))
        kept, lines = len(first), 0
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=2):
            if not self.whole and not line.endswith(b"\n"):
                break  # killed within the line
            found = _decoded(path, number, line)
            if isinstance(found, Predicted):
                self.done[found.image] = found
            elif self.whole:
                self.skipped.append(found)
            else:
                break  # killed while it was finished: what could not be decoded is tried again, and written again
            kept += len(line)
            lines += 1
        if self.whole:
            self._check_complete(lines)
        return kept

    def _header(self, path: Path, line: bytes) -> Header:
        try:
            return msgspec.json.decode(line, type=Header)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise InputError(f"predictions {path}: exists and is no predictions file; choose another name") from None

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

    def _check_complete(self, lines: int) -> None:
        """InputError when a whole file has not one line for each image."""
        images = len(self.done.keys() | {skipped.image for skipped in self.skipped})
        if images < self.header.images:
            raise InputError(
                f"predictions {self.path}: it has {images} of its {self.header.images} images, so it was cut off; "
                f"rename it to {self.partial.name} to go on from there, or delete it to start again"
            )
        if not images == lines == self.header.images:
            raise InputError(
                f"predictions {self.path}: it has {lines} lines for {self.header.images} images, so it is damaged; "
                "delete it to start again"
            )


def _decoded(path: Path, number: int, line: bytes) -> Predicted | Skipped:
    try:
        return msgspec.json.decode(line, type=_Line).read()
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"predictions {path}: line {number} is damaged: {error}; delete it to start again") from None


def _short(line: _Line) -> bytes:
    return msgspec.json.encode({"image": line.image, "skipped": line.skipped})
