"""What stages have computed, kept by what went in, so that nothing unchanged is computed twice.

An entry is a folder named after its stage and the digest of everything that determines the result. Two
builds at once share the work: the second waits for the first. Entries are checked against their digests
before they are used, and the least recently used go when the cache outgrows its limit.

A cache that cannot be written is read all the same: what it lacks is computed into a folder that goes with the build.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rxdeploy import atomic
from rxdeploy.engines.bundle import sha256_of
from rxdeploy.errors import InputError, missing_module

log = logging.getLogger("rxdeploy.cache")

FOLDER_VARIABLE = "RXDEPLOY_CACHE"
LIMIT_VARIABLE = "RXDEPLOY_CACHE_LIMIT_GB"
DEFAULT_LIMIT_GB = 20.0
_ENTRY = "entry.json"
_CALIBRATING = "calibrating"  # what interrupted calibrations are to go on from
_GIVEN_UP_S = 30 * 24 * 3600  # after which nobody will
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def cache_folder() -> Path:
    """Where the cache is: $RXDEPLOY_CACHE, or the platform's place for caches (on Linux ~/.cache/rxdeploy)."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    try:
        import platformdirs
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    return platformdirs.user_cache_path("rxdeploy")


def cache_limit() -> int:
    """The size in bytes above which old entries go: $RXDEPLOY_CACHE_LIMIT_GB (10^9 bytes each), by default 20."""
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
        if not 0 <= limit < float("inf"):
            raise ValueError
    except ValueError:
        raise InputError(f"{LIMIT_VARIABLE}={text}: must be a number of gigabytes, 0 or more") from None
    return int(limit * 1e9)


def recipe_digest(**ingredients: Any) -> str:
    """sha256 of named JSON values: the identity of a computation."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A finished stage: `facts` for small results, files in `folder` for large ones."""

    folder: Path
    facts: dict[str, Any]
    reused: bool


class Cache:
    """A cache folder. Entries that this object has handed out are safe from eviction until `close`."""

    def __init__(self, folder: Path, limit: int, force: bool = False) -> None:
        self.folder = folder
        self.limit = limit
        self._force = force  # compute everything once more, and keep that
        self._made: set[str] = set()
        self._in_use: list[IO[bytes]] = []
        self._scratch = contextlib.ExitStack()
        self._writing: Path | None = None  # where new entries go, once that is known

    def close(self) -> None:
        """Let go of the entries handed out, and evict what is over the limit."""
        for file in self._in_use:
            file.close()
        self._in_use.clear()
        self._scratch.close()
        self._writing = None
        self._evict()

    @property
    def writing(self) -> Path:
        """The folder for what is new: the cache's own, or while that is read-only, one that `close` removes."""
        if self._writing is None:
            self._writing = self.folder
            if not self._writable():
                log.warning(
                    "the cache %s cannot be written: what it has is used, nothing is added; set %s to another folder",
                    *(self.folder, FOLDER_VARIABLE),
                )
                self._writing = self._scratch.enter_context(atomic.scratch_folder("cache"))
        return self._writing

    def _writable(self) -> bool:
        """Whether there is leave to write; asked without writing, as a full disk can still be read from."""
        parts = [self.folder / part for part in ("locks", "stages")]
        try:
            for part in parts:
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in _READ_ONLY:
                return False
            raise
        return all(os.access(part, os.W_OK | os.X_OK) for part in parts)

    def stage(self, name: str, key: str, produce: Callable[[Path], dict[str, Any]], verify: bool = True) -> Entry:
        """The entry for `name` and `key`; `produce` fills a folder and returns the facts when there is none.

        `verify` checks every file's digest first; leave it out when only the facts are wanted. While one
        process produces an entry, others that want it wait.
        """
        folder = self.writing / "stages" / f"{name}-{key[:40]}"
        lock = self.writing / "locks" / f"{folder.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(lock, name):
            if not (self._force and folder.name not in self._made):
                for place in dict.fromkeys((folder, self.folder / "stages" / folder.name)):
                    entry = self._lookup(place, verify)
                    if entry is not None:
                        return entry
            with atomic.new_folder(folder, durable=False) as new:
                facts = produce(new)
                files = {path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(new.iterdir())}
                body = json.dumps({"facts": facts, "files": files})
                (new / _ENTRY).write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
                # Held before it has its name: another process's eviction could come first.
                self._in_use.append((new / _ENTRY).open("rb"))
                fcntl.flock(self._in_use[-1], fcntl.LOCK_SH)
            self._made.add(folder.name)
            return Entry(folder, json.loads(body)["facts"], reused=False)  # as a later build will see them

    def _lookup(self, folder: Path, verify: bool) -> Entry | None:
        """The entry in `folder`, held against eviction, or None when there is none or it is damaged."""
        try:
            file = (folder / _ENTRY).open("rb")
        except (FileNotFoundError, PermissionError):
            return None
        with contextlib.suppress(OSError):  # a file system without locks: then nothing there is evicted either
            fcntl.flock(file, fcntl.LOCK_SH)
        try:
            digest, _, body = file.read().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                raise ValueError(f"{file.name} is damaged")
            record = json.loads(body)
            for name, (size, sha256) in record["files"].items():
                path = folder / name
                if path.stat().st_size != size or (verify and sha256_of(path) != sha256):
                    raise ValueError(f"{path} is damaged")
            with contextlib.suppress(OSError):  # read-only
                os.utime(folder / _ENTRY)
            entry = Entry(folder, record["facts"], reused=folder.name not in self._made)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Altered, of another version's format, or evicted since it was opened: it has to be made again.
            file.close()
            return None
        self._in_use.append(file)
        return entry

    def _evict(self) -> None:
        """Remove least recently used entries until the rest fits, passing over those in use."""
        if not (self.folder / "stages").is_dir():
            return
        self._sweep()
        entries = []
        for folder in (self.folder / "stages").glob("[!.]*"):  # not what is being written
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_size for path in folder.iterdir())
                record = folder / _ENTRY
                entries.append((record.stat().st_mtime if record.exists() else 0.0, size, folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= self.limit:
                return
            if _remove_unused(folder):
                total -= size

    def _sweep(self) -> None:
        """Remove what killed processes left, and what calibrations were to go on from that nobody came back to."""
        for part in ("stages", "timing"):
            atomic.sweep(self.folder / part)
        for folder in (self.folder / _CALIBRATING).glob("*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if time.time() - folder.stat().st_mtime > _GIVEN_UP_S:
                    shutil.rmtree(folder, ignore_errors=True)
            atomic.sweep(folder)

    def usage(self) -> dict[str, int]:
        """Stage results and their size in bytes, to which the limit applies, and the size of downloaded weights."""
        usage = {"stage_results": 0, "stage_bytes": 0, "weights_bytes": 0}
        for part in ("stages", "weights"):
            for path in (self.folder / part).rglob("*"):
                with contextlib.suppress(OSError):  # another process may be evicting it
                    usage["stage_results"] += path.name == _ENTRY
                    size = path.stat().st_size if path.is_file() else 0
                    usage["stage_bytes" if part == "stages" else "weights_bytes"] += size
        return usage

    def clear(self) -> None:
        """Remove everything that is not in use by another process."""
        self._sweep()
        for folder in sorted((self.folder / "stages").glob("[!.]*")):
            _remove_unused(folder)
        for path in sorted((self.folder / "weights").glob("*")):
            _remove_unlocked(path)
        for name in ("timing", _CALIBRATING):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _remove_unlocked(path: Path) -> None:
    """Remove a downloaded file, or what there is of it, unless it is being downloaded; its lock file stays."""
    from filelock import FileLock, Timeout

    if path.suffix == ".lock":
        return
    name = path.name.removesuffix(".json").removesuffix(".part")
    with contextlib.suppress(Timeout), FileLock(path.with_name(f"{name}.lock"), timeout=0):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _waiting_lock(path: Path, stage: str) -> Iterator[None]:
    """An exclusive lock that says so when it has to wait. The kernel frees it when its holder is killed."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another build is at the stage %s of the same model; waiting for its result", stage)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_unused(folder: Path) -> bool:
    """Remove an entry unless some process holds it."""
    try:
        with (folder / _ENTRY).open("r+b") if (folder / _ENTRY).exists() else contextlib.nullcontext() as file:
            if file:  # an entry without its record is no entry, and nobody uses it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which over NFS wants a file that may be written
            atomic.discard(folder)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def open_cache(force: bool = False) -> Iterator[Cache]:
    """The user's cache, closed at the end of the block."""
    cache = Cache(cache_folder(), cache_limit(), force)
    try:
        yield cache
    finally:
        cache.close()
