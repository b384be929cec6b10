"""fetch_weights against a local HTTP server that can misbehave in every way the real ones do.

The reference is always the server's own bytes and its record of what it was asked and what it sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import logging
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rxdeploy import __version__
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.cards.card import Weights
from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.export import download
from rxdeploy.export.download import fetch_weights

CONTENT = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "net-0123abcd.pth"


@dataclasses.dataclass
class Request:
    path: str
    headers: dict[str, str]  # names in lower case
    status: int = 0
    sent: int = 0  # bytes of body


class Site:
    """What the server has and how it behaves; lists are used up, one entry a request."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.etag: str | None = '"v1"'
        self.last_modified: str | None = None
        self.ranges = True  # answer Range with 206
        self.if_range = True  # and heed If-Range
        self.range_shift = 0  # begin so many bytes after the one asked for
        self.length = True  # send Content-Length
        self.statuses: list[int] = []  # answer these first
        self.retry_after: str | None = None
        self.drops: list[int | None] = []  # drop the connection after so many bytes of body
        self.stalls: list[float] = []  # wait so many seconds in the middle of the body
        self.hold: threading.Event | None = None  # wait for it in the middle of the body
        self.requests: list[Request] = []

    def body(self, asked: str | None, if_range: str | None) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for a Range header, as RFC 9110 has it."""
        headers = {"ETag": self.etag or "", "Last-Modified": self.last_modified or ""}
        headers = {name: value for name, value in headers.items() if value}
        current = not self.if_range or if_range in (None, self.etag, self.last_modified)
        if not (asked and self.ranges and current):
            return 200, self.content, headers
        first, total = int(asked.removeprefix("bytes=").removesuffix("-")) + self.range_shift, len(self.content)
        if first >= total:
            return 416, b"", headers | {"Content-Range": f"bytes */{total}"}
        return 206, self.content[first:], headers | {"Content-Range": f"bytes {first}-{total - 1}/{total}"}


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        request = Request(self.path, {name.lower(): value for name, value in self.headers.items()})
        site.requests.append(request)
        if self.path.startswith("/moved/"):
            return self.answer(request, 302, {"Location": self.path.removeprefix("/moved")})
        if site.statuses:
            extra = {"Retry-After": site.retry_after} if site.retry_after else {}
            return self.answer(request, site.statuses.pop(0), {"Content-Length": "0", **extra})
        status, body, headers = site.body(request.headers.get("range"), request.headers.get("if-range"))
        if site.length:
            headers["Content-Length"] = str(len(body))
        self.answer(request, status, headers)
        drop = site.drops.pop(0) if site.drops else None
        pieces = body[: len(body) // 2], body[len(body) // 2 :]
        self.send(request, pieces[0] if drop is None else body[:drop])
        if drop is None:
            if site.stalls:
                time.sleep(site.stalls.pop(0))
            if site.hold:
                site.hold.wait(10)
            self.send(request, pieces[1])

    def answer(self, request: Request, status: int, headers: dict[str, str]) -> None:
        request.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, request: Request, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.wfile.flush()
            request.sent += len(data)
        except OSError:
            pass  # the client left

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def server(site: Site) -> Iterator[str]:
    handler = type("BoundHandler", (Handler,), {"site": site})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        if site.hold:
            site.hold.set()
        httpd.shutdown()
        thread.join()


@pytest.fixture
def card(server: str) -> ModelCard:
    return card_for(f"{server}/releases/{NAME}")


@pytest.fixture(autouse=True)
def quick_and_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_S", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def card_for(url: str, file_size: int | None = len(CONTENT), sha256: str = SHA256[:8]) -> ModelCard:
    weights = Weights(url=url, file_size=file_size, sha256_prefix=sha256)
    return msgspec.structs.replace(find_card("gluon_resnext50_32x4d"), weights=weights)


def left_in(folder: Path) -> set[str]:
    """Names in `folder`, but for the empty lock file, which stays by design."""
    return {path.name for path in folder.iterdir() if not (path.suffix == ".lock" and path.stat().st_size == 0)}


def interrupt_after(count: int) -> Callable[[int, int | None], None]:
    """A progress callback during which Ctrl-C is pressed once `count` bytes have come."""

    def progress(done: int, total: int | None) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def interrupted(card: ModelCard, folder: Path) -> int:
    """Fetch, press Ctrl-C on the way, and return how many bytes the .part then has."""
    with pytest.raises(KeyboardInterrupt):
        fetch_weights(card, folder, interrupt_after(1))
    assert left_in(folder) == {f"{NAME}.part", f"{NAME}.part.json"}
    part = (folder / f"{NAME}.part").read_bytes()
    assert 0 < len(part) < len(CONTENT)
    return len(part)


def asked_ranges(site: Site) -> list[str | None]:
    return [request.headers.get("range") for request in site.requests]


def assert_fetched(path: Path, folder: Path) -> None:
    assert path == folder / NAME
    assert path.read_bytes() == CONTENT
    assert left_in(folder) == {NAME}


def test_download_into_a_new_folder(card: ModelCard, site: Site, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    folder = tmp_path / "not" / "there" / "yet"
    path = fetch_weights(card, folder, lambda done, total: calls.append((done, total)))
    assert_fetched(path, folder)
    assert calls[0] == (0, len(CONTENT))
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert calls == sorted(calls)
    (request,) = site.requests
    assert request.headers["user-agent"] == f"rxdeploy/{__version__}"
    assert request.headers["accept-encoding"] == "identity"
    assert "range" not in request.headers and "if-range" not in request.headers


def test_cached_file_is_not_requested_again(card: ModelCard, site: Site, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch_weights(card, tmp_path) == tmp_path / NAME
    assert site.requests == []
    assert [path.name for path in tmp_path.iterdir()] == [NAME]  # not even a lock: the folder may be read-only


@pytest.mark.parametrize(
    ("old", "reason"),
    [(OTHER, f"sha256 begins {hashlib.sha256(OTHER).hexdigest()[:8]}"), (CONTENT[:-1], "it has 299999 bytes")],
    ids=["other bytes", "too short"],
)
def test_corrupt_cached_file_is_fetched_again_and_said_so(
    card: ModelCard, tmp_path: Path, caplog: pytest.LogCaptureFixture, old: bytes, reason: str
) -> None:
    (tmp_path / NAME).write_bytes(old)
    with caplog.at_level(logging.WARNING, "rxdeploy.export"):
        assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    (record,) = caplog.records
    assert record.name == "rxdeploy.export" and record.levelno == logging.WARNING
    assert reason in record.getMessage() and str(tmp_path / NAME) in record.getMessage()


def test_dropped_connections_are_resumed_within_a_call(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.drops = [100_000, 0, 50_000]
    calls: list[int] = []
    assert_fetched(fetch_weights(card, tmp_path, lambda done, total: calls.append(done)), tmp_path)
    assert asked_ranges(site) == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert [request.headers.get("if-range") for request in site.requests] == [None, '"v1"', '"v1"', '"v1"']
    assert [request.sent for request in site.requests] == [100_000, 0, 50_000, 150_000]
    assert calls.count(100_000) == 3  # as the last data of the first attempt, and where two more begin
    assert calls == sorted(calls)


def test_a_connection_that_keeps_breaking_is_given_up_and_resumed_by_the_next_call(
    card: ModelCard, site: Site, tmp_path: Path
) -> None:
    site.drops = [1000] * download.ATTEMPTS
    with pytest.raises(EnvironmentLacks) as caught:
        fetch_weights(card, tmp_path)
    kept = 1000 * download.ATTEMPTS
    assert len(site.requests) == download.ATTEMPTS
    assert f"{kept} bytes are kept in {tmp_path / NAME}.part" in str(caught.value)
    assert "--weights PATH" in str(caught.value) and str(card.weights.url) in str(caught.value)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:kept]
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site)[-1] == f"bytes={kept}-"


def test_ctrl_c_leaves_a_part_that_the_next_call_resumes(card: ModelCard, site: Site, tmp_path: Path) -> None:
    size = interrupted(card, tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:size]
    calls: list[tuple[int, int | None]] = []
    assert_fetched(fetch_weights(card, tmp_path, lambda *call: calls.append(call)), tmp_path)
    assert asked_ranges(site) == [None, f"bytes={size}-"]
    assert site.requests[1].status == 206 and site.requests[1].sent == len(CONTENT) - size
    assert calls[0] == (size, len(CONTENT))


def test_ctrl_c_after_the_last_byte_needs_no_further_request(card: ModelCard, site: Site, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch_weights(card, tmp_path, interrupt_after(len(CONTENT)))
    assert left_in(tmp_path) == {f"{NAME}.part", f"{NAME}.part.json"}
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert len(site.requests) == 1


def test_resume_by_last_modified_when_the_etag_is_weak(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.etag, site.last_modified = 'W/"v1"', "Wed, 21 Oct 2015 07:28:00 GMT"
    size = interrupted(card, tmp_path)
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert site.requests[1].headers["if-range"] == site.last_modified
    assert site.requests[1].sent == len(CONTENT) - size


def test_resume_without_any_validator(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.etag = None
    size = interrupted(card, tmp_path)
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert "if-range" not in site.requests[1].headers
    assert site.requests[1].sent == len(CONTENT) - size


def test_server_that_ignores_range_starts_over(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.ranges = False
    size = interrupted(card, tmp_path)
    calls: list[int] = []
    assert_fetched(fetch_weights(card, tmp_path, lambda done, total: calls.append(done)), tmp_path)
    assert asked_ranges(site) == [None, f"bytes={size}-"]
    assert site.requests[1].status == 200 and calls[0] == 0


@pytest.mark.parametrize("if_range", [True, False], ids=["If-Range heeded", "If-Range ignored"])
def test_file_that_changed_between_calls_starts_over(
    card: ModelCard, site: Site, tmp_path: Path, if_range: bool
) -> None:
    site.content, site.etag, site.if_range = OTHER, '"v0"', if_range
    size = interrupted(card, tmp_path)
    site.content, site.etag = CONTENT, '"v1"'
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert site.requests[1].headers["if-range"] == '"v0"'
    assert asked_ranges(site) == [None, f"bytes={size}-"] + [None] * (not if_range)


def test_range_other_than_the_one_asked_for_starts_over(card: ModelCard, site: Site, tmp_path: Path) -> None:
    size = interrupted(card, tmp_path)
    site.range_shift = 100
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site) == [None, f"bytes={size}-", None]


def test_part_of_another_url_is_not_resumed(card: ModelCard, server: str, site: Site, tmp_path: Path) -> None:
    site.content = OTHER
    interrupted(card_for(f"{server}/older/{NAME}"), tmp_path)
    site.content = CONTENT
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site) == [None, None]


@pytest.mark.parametrize(
    ("part", "note"),
    [
        (CONTENT + b"more", b'{"url": "URL", "validator": "\\"v1\\""}'),
        (CONTENT[:1000], None),
        (CONTENT[:1000], b'{"url": "URL", "valid'),
        (CONTENT[:1000], b"\xff\xfe"),
        (CONTENT[:1000], b'{"url": "URL", "validator": "a\\nb"}'),
    ],
    ids=["too long", "no note", "half a note", "not text", "no header value"],
)
def test_unusable_part_is_discarded(
    card: ModelCard, site: Site, tmp_path: Path, part: bytes, note: bytes | None
) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(part)
    if note is not None:
        (tmp_path / f"{NAME}.part.json").write_bytes(note.replace(b"URL", str(card.weights.url).encode()))
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site) == [None]


def test_416_means_done_when_the_part_is_the_whole_file(server: str, site: Site, tmp_path: Path) -> None:
    card = card_for(f"{server}/{NAME}", file_size=None)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights(card, tmp_path, interrupt_after(len(CONTENT)))
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert [request.status for request in site.requests] == [200, 416]


def test_416_starts_over_when_the_file_got_shorter(server: str, site: Site, tmp_path: Path) -> None:
    card = card_for(f"{server}/{NAME}", file_size=None)
    site.content, site.etag = CONTENT + b"more", None
    with pytest.raises(KeyboardInterrupt):
        fetch_weights(card, tmp_path, interrupt_after(len(CONTENT) + 4))
    site.content = CONTENT
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert [request.status for request in site.requests] == [200, 416, 200]


def test_size_unknown_to_card_and_server(server: str, site: Site, tmp_path: Path) -> None:
    site.length = False
    calls: list[tuple[int, int | None]] = []
    card = card_for(f"{server}/{NAME}", file_size=None, sha256=SHA256)
    assert_fetched(fetch_weights(card, tmp_path, lambda *call: calls.append(call)), tmp_path)
    assert calls[0] == (0, None) and calls[-1] == (len(CONTENT), None)


def test_end_without_content_length_is_noticed_by_the_cards_size(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.length, site.drops = False, [100_000]
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site) == [None, "bytes=100000-"]


def test_digest_mismatch_leaves_nothing(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.content = OTHER
    with pytest.raises(InputError) as caught:
        fetch_weights(card, tmp_path)
    got = hashlib.sha256(OTHER).hexdigest()[:8]
    assert f"weights file {NAME} from {card.weights.url}: sha256 begins {got}, the card says {SHA256[:8]}" in str(
        caught.value
    )
    assert "deleted" in str(caught.value) and "--weights PATH" in str(caught.value)
    assert left_in(tmp_path) == set()


def test_other_size_is_refused_before_the_download(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.content = CONTENT + b"more"
    calls: list[int] = []
    with pytest.raises(InputError, match="offers 300004 bytes, the card says 300000"):
        fetch_weights(card, tmp_path, lambda done, total: calls.append(done))
    assert calls == [] and left_in(tmp_path) == set() and len(site.requests) == 1


def test_other_size_found_at_the_end_leaves_nothing(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.content, site.length = CONTENT + b"more", False
    with pytest.raises(InputError, match="it has 300004 bytes, the card says 300000; the download was deleted"):
        fetch_weights(card, tmp_path)
    assert left_in(tmp_path) == set()


def test_endless_body_is_cut_short(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.content, site.length = CONTENT * 20, False
    with pytest.raises(InputError) as caught:
        fetch_weights(card, tmp_path)
    match = re.search(r"it has (\d+) bytes", str(caught.value))
    assert match and len(CONTENT) < int(match[1]) < 2 * len(CONTENT)


def test_bytes_are_on_disk_before_the_name(card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            calls.append(name)
            real(*args)

        return call

    monkeypatch.setattr(os, "fsync", recorded("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", recorded("replace", os.replace))
    fetch_weights(card, tmp_path)
    assert calls == ["fsync", "replace"]


def test_page_in_place_of_the_file_does_not_cost_the_part(card: ModelCard, site: Site, tmp_path: Path) -> None:
    size = interrupted(card, tmp_path)
    site.content, site.etag = b"<html>please log in</html>", None
    with pytest.raises(InputError, match="offers 26 bytes"):
        fetch_weights(card, tmp_path)
    site.content, site.etag = CONTENT, '"v1"'
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site)[-1] == f"bytes={size}-"


def test_404_is_said_at_once(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.statuses = [404]
    with pytest.raises(EnvironmentLacks, match=r"HTTP 404 Not Found.*--weights PATH.*--weights synthetic") as caught:
        fetch_weights(card, tmp_path)
    assert str(card.weights.url) in str(caught.value)
    assert "kept" not in str(caught.value)  # nothing came, so nothing is
    assert len(site.requests) == 1 and left_in(tmp_path) == set()


def test_server_errors_pass(card: ModelCard, site: Site, tmp_path: Path) -> None:
    site.statuses = [500, 429, 503]
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert [request.status for request in site.requests] == [500, 429, 503, 200]


def test_server_errors_that_stay_keep_the_part(card: ModelCard, site: Site, tmp_path: Path) -> None:
    size = interrupted(card, tmp_path)
    site.statuses = [502] * download.ATTEMPTS
    with pytest.raises(EnvironmentLacks, match=f"HTTP 502 Bad Gateway; the first {size} bytes are kept"):
        fetch_weights(card, tmp_path)
    assert len(site.requests) == 1 + download.ATTEMPTS
    assert left_in(tmp_path) == {f"{NAME}.part", f"{NAME}.part.json"}


def test_waits_double_and_the_servers_wish_counts(
    card: ModelCard, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download, "BACKOFF_S", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    site.statuses = [500] * download.ATTEMPTS
    with pytest.raises(EnvironmentLacks):
        fetch_weights(card, tmp_path)
    assert waits == [1, 2, 4, 8]
    waits.clear()
    site.statuses, site.retry_after = [429, 503], "7"
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert waits == [7, 7]


def test_stalled_connection_times_out_and_is_resumed(
    card: ModelCard, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.2)
    site.stalls = [0.6]
    assert_fetched(fetch_weights(card, tmp_path), tmp_path)
    assert asked_ranges(site) == [None, "bytes=150000-"]


def test_redirect_is_followed_and_resumed_through(server: str, site: Site, tmp_path: Path) -> None:
    site.drops = [100_000]
    assert_fetched(fetch_weights(card_for(f"{server}/moved/{NAME}"), tmp_path), tmp_path)
    assert [request.path for request in site.requests] == [f"/moved/{NAME}", f"/{NAME}"] * 2
    assert asked_ranges(site) == [None, None, "bytes=100000-", "bytes=100000-"]


def test_proxy_of_the_environment_is_used(
    server: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server)
    url = f"http://weights.invalid/{NAME}"
    assert_fetched(fetch_weights(card_for(url), tmp_path), tmp_path)
    assert [request.path for request in site.requests] == [url]


def test_unusable_proxy_setting_names_the_variables(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:70")
    with pytest.raises(EnvironmentLacks, match="HTTP_PROXY"):
        fetch_weights(card, tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "weights.invalid"])
def test_nothing_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def getaddrinfo(name: str, *args: Any, **options: Any) -> list[Any]:
        if name == "weights.invalid":  # as without a network; the test itself must not ask one
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return original(name, *args, **options)

    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited for a server that is not there"))
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://{host}:{unused.getsockname()[1]}/{NAME}"
        with pytest.raises(
            EnvironmentLacks, match=r"(refused|not known).*--weights PATH.*--weights synthetic"
        ) as caught:
            fetch_weights(card_for(url), tmp_path)
    assert url in str(caught.value) and left_in(tmp_path) == set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s in vain"
        time.sleep(0.01)


def fetch_in_another_process(card: ModelCard, folder: Path) -> subprocess.Popen[bytes]:
    program = (
        "import sys; from pathlib import Path\n"
        "from rxdeploy.cards.card import load_card\n"
        "from rxdeploy.export.download import fetch_weights\n"
        "fetch_weights(load_card(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    toml = find_card("gluon_resnext50_32x4d").beside("gluon_resnext50_32x4d.toml").read_text()
    for key in ("url", "file_size", "sha256_prefix"):
        value = msgspec.json.encode(getattr(card.weights, key)).decode()
        toml, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", toml)
        assert count == 1
    path = folder.parent / f"{folder.name}.toml"
    path.write_text(toml)
    root = Path(download.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-c", program, path, folder], env=environment)


@pytest.mark.parametrize("first", ["thread", "process"])
def test_two_at_once_do_one_download(
    card: ModelCard, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    folder = tmp_path / "cache"
    site.hold = threading.Event()
    process = fetch_in_another_process(card, folder) if first == "process" else None
    threads = [threading.Thread(target=fetch_weights, args=(card, folder)) for _ in range(1 if process else 2)]
    if not process:
        threads[0].start()
    wait_until(lambda: len(site.requests) == 1)  # the first is in the middle of its download
    threads[-1].start()
    wait_until(lambda: "waiting for it" in caplog.text)
    site.hold.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    if process:
        assert process.wait(10) == 0
    assert_fetched(folder / NAME, folder)
    assert len(site.requests) == 1


def test_killed_process_leaves_a_part_that_is_resumed(card: ModelCard, site: Site, tmp_path: Path) -> None:
    folder, half = tmp_path / "cache", len(CONTENT) // 2
    site.hold = threading.Event()
    process = fetch_in_another_process(card, folder)
    part = folder / f"{NAME}.part"
    # The last piece may still be in the writer's buffer, which a killed process takes along.
    wait_until(lambda: part.exists() and part.stat().st_size > half // 2)
    process.kill()
    process.wait(10)
    site.hold.set()
    size = part.stat().st_size
    assert part.read_bytes() == CONTENT[:size] and not (folder / NAME).exists()
    assert_fetched(fetch_weights(card, folder), folder)
    assert asked_ranges(site) == [None, f"bytes={size}-"]


def test_file_in_place_of_the_folder(card: ModelCard, site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(InputError, match=f"fetching weights file {NAME} into {tmp_path / 'cache'}"):
        fetch_weights(card, tmp_path / "cache")
    assert site.requests == []


def test_unwritable_folder(card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(InputError, match="Permission denied"):
        fetch_weights(card, tmp_path / "cache")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, whose every write fails, is Linux's")
def test_full_disk(card: ModelCard, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    (tmp_path / f"{NAME}.part.json").write_bytes(msgspec.json.encode({"url": card.weights.url, "validator": None}))
    with pytest.raises(EnvironmentLacks, match=r"No space left on device.*free some room"):
        fetch_weights(card, tmp_path)
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("module", ["httpx", "filelock"])
def test_missing_package_names_the_extra(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentLacks, match=rf"{module} is not installed.*rxdeploy\[build\]"):
        fetch_weights(card, tmp_path)


def test_card_without_url(tmp_path: Path) -> None:
    card = msgspec.structs.replace(find_card("gluon_resnext50_32x4d"), weights=Weights())
    with pytest.raises(InputError, match="--weights PATH"):
        fetch_weights(card, tmp_path)


@pytest.mark.parametrize("end", ["", "..", "%2e%2e", "a/%2E%2E", "..%5Cevil.pth", "c:evil.pth", "nul%00.pth"])
def test_url_cannot_name_a_file_outside_the_folder(server: str, site: Site, tmp_path: Path, end: str) -> None:
    with pytest.raises(InputError, match="no file name"):
        fetch_weights(card_for(f"{server}/{end}"), tmp_path / "cache")
    assert site.requests == [] and list(tmp_path.iterdir()) == []


def test_url_that_is_none(tmp_path: Path) -> None:
    for url in (f"http://[broken/{NAME}", f"http://127.0.0.1:port/{NAME}"):
        with pytest.raises(InputError, match=re.escape(url)):
            fetch_weights(card_for(url), tmp_path)
