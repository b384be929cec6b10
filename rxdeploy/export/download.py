"""Fetching the weights a card publishes: resumable, checked, and whole or not there at all.

Beside the destination live, while a download is unfinished, ``NAME.part`` (the bytes so far) and
``NAME.part.json`` (what they are the beginning of). The final name appears only by renaming a checked file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import msgspec

from rxdeploy import __version__
from rxdeploy.cards.card import ModelCard
from rxdeploy.engines.bundle import sha256_of
from rxdeploy.errors import EnvironmentLacks, InputError, from_os_error, missing_module

if TYPE_CHECKING:
    import httpx

Progress = Callable[[int, int | None], None]

ATTEMPTS = 5  # requests in one call, each going on where the last one broke off
BACKOFF_S = 1.0  # before the second attempt; doubles with each further one
RETRY_AFTER_LIMIT_S = 30.0  # the longest wait a server may ask for
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # between two pieces of data, not for the whole file
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})

_log = logging.getLogger("rxdeploy.export")


def fetch_weights(card: ModelCard, folder: Path, progress: Progress | None = None) -> Path:
    """The card's published weights file in `folder`, downloaded there unless it is there already.

    The file has the URL's last path component as its name and, whenever it exists under that name, the size
    and sha256 the card gives. Two processes asking at once do one download. An interrupted download, also one
    ended by Ctrl-C, is resumed by the next call.

    `progress(done, total)`, in bytes, is called when a response begins (with what an earlier attempt left)
    and as data arrives; `total` is None while unknown, and `done` falls to 0 when the server cannot resume.

    Raises InputError when the card has no URL, the folder cannot be written, or what the server has is not
    what the card describes; EnvironmentLacks for a network, a server, a disk or a package that fails us.
    """
    job = _job(card, folder, progress)
    try:
        if _is_whole(job):  # asked before locking, so that a cache on a read-only disk works
            return job.path
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(job):
            if not _is_whole(job):
                _remove_corrupt(job)
                _download(job)
                _finish(job)
    except OSError as error:
        raise from_os_error(error, f"fetching weights file {job.path.name} into {folder}") from error
    return job.path


@dataclass(frozen=True)
class _Job:
    """One file to fetch: where from, where to, and what it must be."""

    url: str
    path: Path
    file_size: int | None
    sha256_prefix: str
    progress: Progress

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.json")

    @property
    def lock(self) -> Path:
        return self.path.with_name(f"{self.path.name}.lock")

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def __str__(self) -> str:
        return f"weights file {self.path.name} from {self.url}"


class _Note(msgspec.Struct, frozen=True):
    """What a .part is the beginning of: the `validator` names the version of the file for If-Range."""

    url: str
    validator: Annotated[str, msgspec.Meta(pattern=r"^[ -~]+$")] | None


class _TryAgain(Exception):
    """This attempt failed in a way that the next one may not, after `wait` seconds at least."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def _job(card: ModelCard, folder: Path, progress: Progress | None) -> _Job:
    weights = card.weights
    if weights.url is None:
        raise InputError(f"card {card.name} gives no URL for its weights; pass --weights PATH")
    assert weights.sha256_prefix is not None, "a card with a url has a sha256_prefix (checked when it is loaded)"
    try:
        name = PurePosixPath(unquote(urlsplit(weights.url).path)).name
    except ValueError as error:
        raise InputError(f"card {card.name}: weights url {weights.url}: {error}") from None
    # The name comes from a file we did not write: it must not lead out of `folder`, on Windows neither.
    if not name.strip(".") or set(name) & set("\\:\0"):
        raise InputError(f"card {card.name}: weights url {weights.url}: its last part is no file name")
    return _Job(weights.url, folder / name, weights.file_size, weights.sha256_prefix, progress or (lambda *_: None))


@contextlib.contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Hold the job's lock file.

    The empty lock file stays behind on purpose: a process that removed it could do so while a second one
    waits on it and a third one creates it anew, and then both would hold "the" lock.
    """
    try:
        import filelock
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    lock = filelock.FileLock(job.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _log.warning("weights file %s is being downloaded by another process; waiting for it", job.path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fault(job: _Job, path: Path) -> str | None:
    """In what way the file at `path` is not the one the card describes; None when it is that one."""
    size = path.stat().st_size
    if job.file_size not in (None, size):
        return f"it has {size} bytes, the card says {job.file_size}"
    if not (digest := sha256_of(path)).startswith(job.sha256_prefix):
        return f"sha256 begins {digest[: len(job.sha256_prefix)]}, the card says {job.sha256_prefix}"
    return None


def _is_whole(job: _Job) -> bool:
    try:
        return _fault(job, job.path) is None
    except FileNotFoundError:
        return False


def _remove_corrupt(job: _Job) -> None:
    if job.path.exists():
        _log.warning("weights file %s: %s; deleted, downloading it again", job.path, _fault(job, job.path))
        job.path.unlink()


def _finish(job: _Job) -> None:
    """Check the complete .part and give it its final name."""
    if fault := _fault(job, job.part):
        job.discard()
        raise InputError(f"{job}: {fault}; the download was deleted, try again or pass --weights PATH")
    with job.part.open("r+b") as file:  # writable, or Windows refuses to sync
        os.fsync(file.fileno())  # or a power cut could leave the final name with nothing in it
    os.replace(job.part, job.path)
    job.note.unlink(missing_ok=True)


def _download(job: _Job) -> None:
    """Bring the .part to its full length, in as many attempts as it takes but ATTEMPTS at most."""
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    with _client() as client:
        for attempt in range(ATTEMPTS):
            wait = 0.0
            try:
                return _attempt(job, client)
            except _TryAgain as error:
                reason, wait = str(error), error.wait
            except httpx.InvalidURL as error:
                raise InputError(f"{job}: not a URL: {error}") from None
            except httpx.RequestError as error:
                reason = str(error) or type(error).__name__
                if not _may_pass(error, first=attempt == 0):
                    break
            if attempt < ATTEMPTS - 1:
                _log.info("%s: %s; trying again", job, reason)
                time.sleep(max(wait, BACKOFF_S * 2**attempt))
    raise _unreachable(job, reason)


def _client() -> httpx.Client:
    import httpx

    # Sizes, offsets and digests are those of the file itself, so it must come unencoded.
    headers = {"User-Agent": f"rxdeploy/{__version__}", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        return httpx.Client(headers=headers, timeout=timeout, follow_redirects=True)
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise EnvironmentLacks(
            f"no HTTP client with this machine's settings: {error}; look at the environment variables HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        ) from error


def _may_pass(error: httpx.RequestError, first: bool) -> bool:
    """Whether another attempt makes sense.

    A server out of reach from the first attempt on means no network, no such name or a firewall: the user
    should hear at once. After an attempt that reached it, the same error is a glitch.
    """
    import httpx

    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return not first
    return isinstance(error, (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError))


def _unreachable(job: _Job, reason: str) -> EnvironmentLacks:
    kept = ""
    if size := _resume_point(job)[0]:
        kept = f"the first {size} bytes are kept in {job.part}, and the next try resumes there; "
    return EnvironmentLacks(
        f"{job}: download failed: {reason}; {kept}download the URL elsewhere and pass --weights PATH, "
        "or pass --weights synthetic to try without"
    )


def _attempt(job: _Job, client: httpx.Client) -> None:
    """One request for what the .part lacks. Returns with a complete .part, or raises."""
    offset, validator = _resume_point(job)
    if offset and offset == job.file_size:  # interrupted between the last byte and the rename
        return job.progress(offset, offset)
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    if offset and validator:
        headers["If-Range"] = validator
    with client.stream("GET", job.url, headers=headers) as response:
        if response.status_code == 200:  # from the beginning: first request, Range ignored, or file changed
            _refuse_other_size(job, response)
            _receive(job, response, 0)
        elif response.status_code == 206 and _continues(response, offset, validator):
            _receive(job, response, offset)
        elif response.status_code in (206, 416):
            _settle_unusable_range(job, response, offset)
        else:
            _raise_status(job, response)


def _resume_point(job: _Job) -> tuple[int, str | None]:
    """Bytes the .part has and the validator for If-Range; a .part of unknown or impossible content is removed."""
    try:
        size = job.part.stat().st_size
        note = msgspec.json.decode(job.note.read_bytes(), type=_Note)
    except (FileNotFoundError, msgspec.DecodeError):
        job.discard()
        return 0, None
    if note.url != job.url or (job.file_size is not None and size > job.file_size):
        job.discard()
        return 0, None
    return size, note.validator


def _validator(response: httpx.Response) -> str | None:
    """What names this version of the file: a strong ETag, else Last-Modified (RFC 9110, 13.1.5), else None.

    A server that gives neither is resumed on trust; the digest tells in the end.
    """
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    return validator if re.fullmatch("[ -~]+", validator) else None


def _content_range(response: httpx.Response) -> tuple[int | None, int | None]:
    """First byte and length of the whole file, as far as Content-Range tells (RFC 9110, 14.4)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", response.headers.get("Content-Range", ""))
    first, total = (None if group is None else int(group) for group in match.groups()) if match else (None, None)
    return first, total


def _continues(response: httpx.Response, offset: int, validator: str | None) -> bool:
    """Whether a 206 goes on exactly where the .part ends, in the same version of the file.

    If-Range asks the server to see to the version, but not every server knows If-Range.
    """
    now = _validator(response)
    same_version = now == validator or now is None or validator is None
    return same_version and _content_range(response)[0] == offset


def _settle_unusable_range(job: _Job, response: httpx.Response, offset: int) -> None:
    """Return when the .part is the whole file already; else remove it and have the next attempt start over."""
    total = _content_range(response)[1]
    if response.status_code == 416 and offset and total == offset and job.file_size in (None, total):
        return job.progress(offset, offset)
    job.discard()
    raise _TryAgain(f"the server cannot go on at byte {offset} (HTTP {response.status_code})")


def _refuse_other_size(job: _Job, response: httpx.Response) -> None:
    """Raise before the first byte when the whole file on the server has another size than the card says.

    An earlier .part stays: a page of some proxy, sent in place of the file, is no reason to lose it.
    """
    offered = _content_length(response)
    if None not in (offered, job.file_size) and offered != job.file_size:
        raise InputError(
            f"{job}: the server offers {offered} bytes, the card says {job.file_size}; nothing was downloaded, "
            "correct the card or pass --weights PATH"
        )


def _content_length(response: httpx.Response) -> int | None:
    length = response.headers.get("Content-Length")
    return None if length is None else int(length)


def _raise_status(job: _Job, response: httpx.Response) -> None:
    reason = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
    if response.status_code not in TRANSIENT_STATUS:
        raise _unreachable(job, reason)
    asked = response.headers.get("Retry-After", "")  # seconds; the other form, a date, we leave to the backoff
    raise _TryAgain(reason, min(float(asked), RETRY_AFTER_LIMIT_S) if re.fullmatch("[0-9]+", asked) else 0.0)


def _receive(job: _Job, response: httpx.Response, start: int) -> None:
    """Write the response's body into the .part from byte `start` on."""
    length = _content_length(response)
    total = job.file_size if job.file_size is not None or length is None else start + length
    with job.part.open("ab" if start else "wb") as file:
        if not start:  # after emptying the .part: the note never speaks of bytes of another version
            job.note.write_bytes(msgspec.json.encode(_Note(job.url, _validator(response))))
        done = start
        job.progress(done, total)
        for chunk in response.iter_raw():  # of no fixed size: what has arrived is written, not held back
            file.write(chunk)
            done += len(chunk)
            if total is not None and done > total:
                return  # too long, as _finish will say
            job.progress(done, total)
    if total is not None and done < total:
        raise _TryAgain(f"the connection ended after {done} of {total} bytes")
