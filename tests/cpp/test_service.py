"""The example service over its socket: its answers against the Python runtime's, its refusals, its load, its end.

Skipped where it is not built. RXDEPLOY_CPP_LIBRARY names the library beside whose examples it lies, as in the other
tests here; nothing is loaded into this process, so that it may be one with a sanitizer.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.engines import bundle as bundles
from rxdeploy.errors import InputError
from rxdeploy.runtime import onnxrt
from rxdeploy.runtime.preprocess import open_rgb, to_rgb, transform
from rxdeploy.runtime.session import load

httpx = pytest.importorskip("httpx", reason="the tests of the service need httpx")

ROOT = Path(__file__).parents[2]
PHOTOS = sorted((ROOT / "rxdeploy/export/photos").glob("*.jpg"))
LIBRARY = Path(os.environ.get("RXDEPLOY_CPP_LIBRARY") or ROOT / "cpp/build/release/librxdeploy.so")
SERVICE = LIBRARY.parent / "examples/service"
JPEG, FRAME = {"Content-Type": "image/jpeg"}, {"Content-Type": "application/octet-stream"}
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
SIZE = 64  # of the digits model's images
NO_TIME = 180.0  # seconds that a test waits for what comes at once, on a machine that may be busy
Build = Callable[..., Path]


@dataclass
class Running:
    """A service, and how to ask it."""

    process: subprocess.Popen[str]
    port: int
    client: Any

    def classify(self, body: bytes, headers: dict[str, str], **parameters: Any) -> Any:
        return self.client.post("/classify", content=body, headers=headers, params=parameters)

    def logits(self, body: bytes, headers: dict[str, str] = JPEG, **parameters: Any) -> NDArray[np.float32]:
        """All of them, in the order of the classes."""
        answer = self.classify(body, headers, k=10, **parameters)
        assert answer.status_code == 200, answer.text
        found = sorted((p["index"], p["logit"]) for p in answer.json()["predictions"])
        assert [index for index, _ in found] == list(range(10))
        return np.array([logit for _, logit in found], np.float32)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), NO_TIME)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="session")
def serve(build_bundle: Build, onnxruntime_library: bytes) -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """``with serve("--queue", 4) as service``: one of the digits model on a free port; it must end well."""
    if not SERVICE.exists():
        pytest.skip("the example service is not built; `make cpp-test` builds it")
    bundle = build_bundle("fp32")
    suppressions = f"suppressions={ROOT}/cpp/tests/tsan.supp"
    environment = os.environ | {"RXDEPLOY_ONNXRUNTIME": os.fsdecode(onnxruntime_library), "TSAN_OPTIONS": suppressions}

    @contextlib.contextmanager
    def start(*options: object, ends: bool = True) -> Iterator[Running]:
        command = [SERVICE, bundle, "--device", "cpu", "--port", 0, "--threads", 1, *options]
        with subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None and process.stderr is not None
                first = process.stdout.readline()
                assert first, process.stderr.read()
                port = int(re.match(r"http://127\.0\.0\.1:(\d+)/", first)[1])  # type: ignore[index]
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=NO_TIME, trust_env=False) as client:
                    yield Running(process, port, client)
                    if ends:
                        process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=NO_TIME)
                assert process.returncode == 0, errors
            finally:
                process.kill()

    return start


@pytest.fixture(scope="module")
def service(serve: Callable[..., Any]) -> Iterator[Running]:
    with serve("--max-pixels", 2_000_000, "--max-body", 3_000_000, "--timeout", 2) as running:
        yield running


@pytest.fixture(scope="module")
def python(build_bundle: Build) -> Iterator[Callable[[Image.Image], NDArray[np.float32]]]:
    """What the Python runtime gives for an upright RGB image, alone in its batch and on one thread."""
    bundle = bundles.open_bundle(build_bundle("fp32"))
    inputs = bundle.manifest.preprocessing
    engine = onnxrt.OnnxEngine(bundle, "cpu", settings=bundles.CpuSettings(threads=1))

    def logits(image: Image.Image) -> NDArray[np.float32]:
        prepared = transform(image, inputs.image_size, inputs.crop_pct, inputs.interpolation)
        found = engine.run(prepared[None], None, None)
        assert isinstance(found, np.ndarray)
        return found[0]

    yield logits
    engine.close()


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def picture(width: int = 83, height: int = 71, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise on gradients: every pixel counts, and chroma has edges for the upsampling to show."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 160, width)[None, :, None] * np.ones((height, 1, channels))
    samples = (slope + rng.integers(0, 96, (height, width, channels))).astype(np.uint8)
    return Image.fromarray(samples if channels > 1 else samples[..., 0], mode if channels == 4 else None)


def decoded(data: bytes) -> Image.Image:
    return open_rgb(Path("image.jpg"), data)


# Answers


def test_photographs(service: Running, build_bundle: Build, python: Callable[..., Any]) -> None:
    """Labels, classes and probabilities of `classify`, and its logits bit for bit."""
    with load(build_bundle("fp32"), "cpu") as session:
        expected = [found.predictions or () for found in session.classify(PHOTOS, 5)]
    for path, best in zip(PHOTOS, expected, strict=True):
        data = path.read_bytes()
        found = service.classify(data, JPEG).json()["predictions"]
        assert [(p["index"], p["label"]) for p in found] == [(p.index, p.label) for p in best]
        assert np.allclose([p["probability"] for p in found], [p.probability for p in best], rtol=1e-4)
        assert np.array_equal(service.logits(data), python(decoded(data)))


def test_digits(service: Running, python: Callable[..., Any]) -> None:
    """The digits that the model is for, as JPEG of both kinds."""
    datasets = pytest.importorskip("sklearn.datasets")
    for digit in datasets.load_digits().images[:20]:
        image = Image.fromarray((digit * 15.9375).astype(np.uint8)).resize((SIZE, SIZE))
        for data in (jpeg(image), jpeg(image.convert("RGB"))):
            found, expected = service.logits(data), python(decoded(data))
            assert np.array_equal(found, expected)
            assert np.argsort(-found, kind="stable").tolist() == np.argsort(-expected, kind="stable").tolist()


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1, "quality": 30}])
def test_samplings(service: Running, python: Callable[..., Any], sampling: str, options: dict[str, Any]) -> None:
    """All ways to store chroma, at sizes that end within a block."""
    for size in ((83, 71), (64, 64), (9, 130)):
        data = jpeg(picture(*size), subsampling=sampling, **options)
        assert np.array_equal(service.logits(data), python(decoded(data)))


def test_tall_chroma(service: Running, python: Callable[..., Any]) -> None:
    """4:4:0, which Pillow does not write: 4:2:2 with its factors exchanged has as many blocks at 64 x 64."""
    data = jpeg(picture(SIZE, SIZE), subsampling="4:2:2")
    tall = data.replace(b"\x03\x01\x21\x00", b"\x03\x01\x12\x00", 1)
    assert tall != data
    assert np.array_equal(service.logits(tall), python(decoded(tall)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours(service: Running, python: Callable[..., Any], mode: str) -> None:
    data = jpeg(picture(mode=mode))
    assert np.array_equal(service.logits(data), python(decoded(data)))


def test_colours_without_conversion(service: Running, python: Callable[..., Any]) -> None:
    """RGB stored as it is."""
    data = jpeg(picture(), keep_rgb=True)
    assert np.array_equal(service.logits(data), python(decoded(data)))


@pytest.mark.parametrize("orientation", range(10))
def test_orientation(service: Running, python: Callable[..., Any], orientation: int) -> None:
    """EXIF's in both byte orders and XMP's, which counts where EXIF says none."""
    image, upright = picture(), decoded(jpeg(picture(), quality=90))
    xmp = b'<rdf:Description tiff:Orientation="%d"/>' % orientation
    seen = []
    for endian in "<>":
        exif = Image.Exif()
        exif.endian = endian
        exif[0x0112] = orientation
        seen.append(jpeg(image, quality=90, exif=exif.tobytes()))
    seen.append(jpeg(image, quality=90, xmp=xmp))
    other = Image.Exif()
    other[0x0110] = "a camera"
    seen.append(jpeg(image, quality=90, exif=other.tobytes(), xmp=xmp))
    seen.append(jpeg(image, quality=90, exif=exif.tobytes(), xmp=b"tiff:Orientation>3<"))
    for data in seen:
        assert np.array_equal(service.logits(data), python(decoded(data)))
    turned = not np.array_equal(service.logits(seen[0]), python(upright))
    assert turned == (2 <= orientation <= 8)


def test_damaged_files(service: Running, python: Callable[..., Any]) -> None:
    """Cut and altered files: refused where Pillow refuses them, otherwise the same pixels."""
    rng = random.Random(1)
    sources = [
        jpeg(picture(), quality=80),
        jpeg(picture(mode="L")),
        jpeg(picture(), progressive=True),
        jpeg(picture(mode="CMYK"), restart_marker_rows=1),
    ]
    outcomes = {True: 0, False: 0}
    for turn in range(400):
        data = bytearray(sources[turn % len(sources)])
        if turn % 3 == 0:
            del data[rng.randrange(len(data)) :]
        elif turn % 3 == 1:
            del data[-1 - rng.randrange(6) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        answer = service.classify(bytes(data), JPEG, k=10)
        outcomes[answer.status_code == 200] += 1
        try:
            image = decoded(bytes(data))
        except InputError:
            assert answer.status_code == 400, (turn, answer.text)
            continue
        if answer.status_code == 400 and stricter(answer.json()["error"]):
            continue
        found = {p["index"]: p["logit"] for p in answer.json().get("predictions", ())}
        expected = dict(enumerate(python(image).tolist()))
        assert found == expected, (turn, answer.text)
    assert min(outcomes.values()) > 50


def stricter(error: str) -> bool:
    """What Debian's libjpeg-turbo refuses, or the service's limits, where Pillow's newer one goes on."""
    return "allowed" in error


LAYOUTS = {"rgb": "RGB", "bgr": "RGB", "rgba": "RGBA", "bgra": "RGBA", "grey": "L"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(SIZE, SIZE), (97, 80)])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("how", ["query", "headers"])
def test_frames(
    service: Running, python: Callable[..., Any], layout: str, size: tuple[int, int], padding: int, how: str
) -> None:
    """Every layout, with and without padding, at the model's own size and at another."""
    image = picture(*size, mode=LAYOUTS[layout])
    samples = np.asarray(image).reshape(size[1], size[0], -1)
    if layout.startswith("bgr"):
        samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    rows = np.pad(samples.reshape(size[1], -1), ((0, 0), (0, padding)), constant_values=99)
    said = {"width": size[0], "height": size[1], "format": layout}
    if padding:
        said["stride"] = rows.shape[1]
    expected = python(to_rgb(image))
    if how == "query":
        assert np.array_equal(service.logits(rows.tobytes(), FRAME, **said), expected)
    else:
        headers = FRAME | {f"X-{name.title()}": str(value) for name, value in said.items()}
        assert np.array_equal(service.logits(rows.tobytes(), headers), expected)


def test_chunked_and_pipelined(service: Running) -> None:
    """A body in pieces, and two requests sent together, are answered in order."""
    data = PHOTOS[0].read_bytes()
    whole = service.classify(data, JPEG).json()
    pieces = (data[i : i + 1000] for i in range(0, len(data), 1000))
    assert service.client.post("/classify", content=pieces, headers=JPEG).json() == whole
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(data)
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with service.connect() as connection:
        connection.sendall(request + data + request + data + last)
        answers = everything(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(json.dumps(whole["predictions"][0]["logit"]).encode()) == 2


def test_top_k(service: Running) -> None:
    data = PHOTOS[0].read_bytes()
    every = service.classify(data, JPEG, k=1000).json()["predictions"]
    assert len(every) == 10
    assert sum(p["probability"] for p in every) == pytest.approx(1, abs=1e-12)
    assert service.classify(data, JPEG).json()["predictions"] == every[:5]
    assert service.classify(data, JPEG, k=1).json()["predictions"] == every[:1]


# Refusals


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def refused(answer: Any, status: int, *words: str) -> None:
    """One sentence, and the status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error and "\n" not in error
    for word in words:
        assert word in error


OK_FRAME = {"width": 4, "height": 4}


@pytest.mark.parametrize(
    ("body", "headers", "parameters", "word"),
    [
        (b"", JPEG, {}, "the file ends too early"),
        (b"hello, world", JPEG, {}, "JPEG"),
        (PHOTOS[0].read_bytes()[:5000], JPEG, {}, "the file ends too early"),
        (PHOTOS[0].read_bytes(), JPEG, {"k": 0}, "k is not a whole number from 1"),
        (PHOTOS[0].read_bytes(), JPEG, {"k": "five"}, "k is not a whole number"),
        (PHOTOS[0].read_bytes(), JPEG, {"deadline_ms": -3}, "deadline_ms"),
        (bytes(48), FRAME, {"height": 4}, "width is missing"),
        (bytes(48), FRAME, OK_FRAME | {"width": 0}, "width is not"),
        (bytes(48), FRAME, OK_FRAME | {"width": "4.0"}, "width is not"),
        (bytes(48), FRAME, OK_FRAME | {"height": 99999999999999999999}, "height is not"),
        (bytes(48), FRAME, {"width": 65535, "height": 65535}, "2000000 allowed"),
        (bytes(48), FRAME, OK_FRAME | {"format": "yuv"}, "format is none of"),
        (bytes(47), FRAME, OK_FRAME, "47 bytes"),
        (bytes(49), FRAME, OK_FRAME, "49 bytes"),
        (bytes(48), FRAME, OK_FRAME | {"stride": 11}, "stride"),
        (bytes(48), FRAME, OK_FRAME | {"stride": -12}, "stride"),
        (bytes(48), FRAME, OK_FRAME | {"format": "rgba"}, "48 bytes"),
        (bytes(3 * 65535), FRAME, {"width": 65535, "height": 1}, "too long and narrow"),
    ],
)
def test_bad_input(service: Running, body: bytes, headers: dict[str, str], parameters: dict, word: str) -> None:
    refused(service.classify(body, headers, **parameters), 400, word)
    assert service.classify(bytes(48), FRAME, **OK_FRAME).status_code == 200


def test_bombs(service: Running) -> None:
    """A small file that says it is large is refused by its head; so is one with scans without end."""
    data = bytearray(jpeg(picture()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"
    refused(service.classify(bytes(data), JPEG), 400, "65500 x 65500 pixels", "2000000 allowed")
    progressive = jpeg(picture(1000, 1000, "L"), progressive=True, quality=5)
    scan = progressive.rindex(b"\xff\xda")
    endless = progressive[:-2] + progressive[scan:-2] * 2000
    began = time.monotonic()
    service.classify(endless[:2_900_000], JPEG)  # whatever it says: some of these scans are wrong
    assert time.monotonic() - began < NO_TIME


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 404),
        ("POST", "/classify/../etc", JPEG, 404),
        ("GET", "/classify", {}, 405),
        ("PUT", "/classify", JPEG, 405),
        ("POST", "/metrics", JPEG, 405),
        ("POST", "/classify", {"Content-Type": "image/png"}, 415),
        ("POST", "/classify", {}, 415),
        ("POST", "/classify", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("POST", "/classify", JPEG | {"Content-Encoding": "gzip"}, 415),
        ("POST", "/classify", JPEG | {"Range": "bytes=0-3"}, 400),
    ],
)
def test_wrong_requests(service: Running, method: str, path: str, headers: dict[str, str], status: int) -> None:
    refused(service.client.request(method, path, headers=headers, content=b"x" if method != "GET" else None), status)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"GET\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (HEAD + b"\r\n", 411),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n", 413),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5x\r\n\r\nhello", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 400),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\nhello", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + bytes(65536) + b"\r\n") * 60, 413),
        (HEAD + b"Content-Length: 500\r\n\r\nno more comes", 400),  # within --timeout
    ],
)
def test_broken_requests(service: Running, sent: bytes, status: int) -> None:
    """One answer, and the connection is closed."""
    with service.connect() as connection:
        connection.sendall(sent)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"Connection: close\r\n" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_trickle(service: Running) -> None:
    """A request that comes byte by byte has no more time than another."""
    with service.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < NO_TIME:
                connection.sendall(b"x")
                time.sleep(0.02)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if connection.recv(1000):
                        break
                connection.setblocking(True)
        assert time.monotonic() - began < NO_TIME / 2


def test_hang_up(service: Running) -> None:
    """Clients that leave in the middle cost nothing."""
    for sent in (b"", b"POST /cl", HEAD + b"Content-Length: 100\r\n\r\nxx"):
        with service.connect() as connection:
            connection.sendall(sent)
    assert service.client.get("/health").json()["status"] == "ok"


# Load


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + NO_TIME
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def begun(service: Running, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Connections with a request each that is on its way: the last byte of its body is still to come."""
    inside = "rxdeploy_http_requests_inside"
    connections = [stack.enter_context(service.connect()) for _ in range(count)]
    for connection in connections:
        connection.sendall(request_bytes()[:-1])
    wait_for(lambda: service.metric(inside) == count)
    return connections


def test_overload(serve: Callable[..., Any]) -> None:
    """The fifth of four that may be on their way is refused, and they do not notice."""
    with serve("--queue", 4, "--timeout", 600) as service, contextlib.ExitStack() as stack:
        connections = begun(service, 4, stack)
        for _ in range(3):
            answer = service.classify(bytes(48), FRAME, **OK_FRAME)
            refused(answer, 503, "4 requests are on their way")
            assert answer.headers["retry-after"] == "1"
        for connection in connections:
            connection.sendall(b"\0")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        wait_for(lambda: service.metric("rxdeploy_http_requests_inside") == 0)
        assert service.classify(bytes(48), FRAME, **OK_FRAME).status_code == 200
        assert service.metric('rxdeploy_http_answers_total{status="503"}') == 3


def test_more_connections(serve: Callable[..., Any]) -> None:
    """A connection that there is no thread for is told so, and those that are served do not notice."""
    with serve("--connections", 2) as service:
        service.client.get("/health")
        with service.connect() as second, service.connect() as third:
            answer = everything(third)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert service.client.get("/health").status_code == 200
            second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert everything(second).startswith(b"HTTP/1.1 200 ")


def test_deadline(serve: Callable[..., Any]) -> None:
    """A large image takes longer to decode than it has; a small one in time is answered."""
    large, small = jpeg(picture().resize((3000, 2000))), jpeg(picture())
    with serve("--deadline-ms", 60_000) as service:
        refused(service.classify(large, JPEG, deadline_ms=1), 504, "deadline")
        assert service.classify(small, JPEG, deadline_ms=60_000).status_code == 200
        assert service.classify(large, JPEG).status_code == 200
    with serve("--deadline-ms", 1) as service:
        refused(service.classify(large, JPEG), 504, "deadline")


def test_many_callers(serve: Callable[..., Any], python: Callable[..., Any]) -> None:
    """Everybody gets the answer to his own picture, whoever else is in the batch."""
    images = [picture(seed=seed) for seed in range(24)]
    files = [jpeg(image, quality=95) for image in images]
    expected = [python(decoded(data)) for data in files]
    assert len({logits.tobytes() for logits in expected}) == len(images)
    with serve("--max-delay-ms", 20, "--max-batch", 16) as service, ThreadPoolExecutor(12) as pool:
        for found, right in zip(pool.map(service.logits, files * 4), expected * 4, strict=True):
            assert np.allclose(found, right, rtol=1e-4, atol=1e-5)
        batches = service.metric("rxdeploy_batch_size_count")
        assert 0 < batches < len(files) * 4  # some were computed together


# The end


def request_bytes(close: bool = False) -> bytes:
    head = b"POST /classify?width=4&height=4 HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
    return head + (b"Connection: close\r\n" if close else b"") + b"Content-Length: 48\r\n\r\n" + bytes(48)


def test_begun_requests_are_answered(serve: Callable[..., Any]) -> None:
    """What was on its way when the signal came is read, queued, computed and answered; nobody listens any more."""
    with serve("--timeout", 600, "--max-delay-ms", 100, ends=False) as service, contextlib.ExitStack() as stack:
        connections = begun(service, 16, stack)
        idle = stack.enter_context(service.connect())
        service.process.send_signal(signal.SIGINT)
        wait_for(lambda: not listens(service))
        assert everything(idle) == b""
        for connection in connections:
            connection.sendall(b"\0")
        for connection in connections:
            answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 200 OK"), answer
            assert b"Connection: close" in answer
        assert service.process.wait(NO_TIME) == 0


def listens(service: Running) -> bool:
    try:
        service.connect().close()
    except ConnectionRefusedError:
        return False
    return True


def test_term_under_load(serve: Callable[..., Any]) -> None:
    """Every request that was sent on an open connection before the signal has its answer."""
    sent: list[list[float]] = [[] for _ in range(12)]
    answered: list[int] = [0] * 12
    with serve("--queue", 64, ends=False) as service:

        def caller(number: int) -> None:
            with service.connect() as connection, contextlib.suppress(ConnectionError):
                while True:
                    connection.sendall(request_bytes())
                    sent[number].append(time.monotonic())
                    answer = b""
                    while b'"predictions"' not in answer:
                        piece = connection.recv(65536)
                        if not piece:
                            assert not answer, "half an answer"
                            return
                        answer += piece
                    assert answer.startswith(b"HTTP/1.1 200 OK")
                    answered[number] += 1

        with ThreadPoolExecutor(12) as pool:
            callers = [pool.submit(caller, number) for number in range(12)]
            wait_for(lambda: min(answered) > 20)
            moment = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            for future in callers:
                future.result()
        assert service.process.wait(NO_TIME) == 0
    for number, moments in enumerate(sent):
        before = sum(each < moment for each in moments)
        assert before <= answered[number] <= len(moments)


def test_grace(serve: Callable[..., Any]) -> None:
    """During the grace /health sends load balancers away, and who comes all the same is served.

    A second signal ends it at once.
    """
    with serve("--grace", 600, ends=False) as service:
        with service.connect() as open_before:
            open_before.sendall(request_bytes())
            assert open_before.recv(65536).startswith(b"HTTP/1.1 200 OK")
            service.process.send_signal(signal.SIGTERM)
            wait_for(lambda: service.client.get("/health").status_code == 503)
            assert service.client.get("/health").json()["status"] == "draining"
            answer = service.classify(bytes(48), FRAME, **OK_FRAME)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            open_before.sendall(request_bytes())
            assert everything(open_before).startswith(b"HTTP/1.1 200 OK")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(NO_TIME) == 128 + signal.SIGTERM
        service.process.returncode = 0  # what `serve` wants to see


def test_metrics(serve: Callable[..., Any]) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    with serve() as service:
        for _ in range(3):
            service.classify(bytes(48), FRAME, **OK_FRAME)
        service.classify(bytes(47), FRAME, **OK_FRAME)
        answer = service.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in parser.text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    assert samples["rxdeploy_http_answers_total", "200"] == 3
    assert samples["rxdeploy_http_answers_total", "400"] == 1
    assert samples["rxdeploy_http_requests_inside",] == 0
    assert samples["rxdeploy_images_total",] >= 3


def test_start(serve: Callable[..., Any], build_bundle: Build, tmp_path: Path) -> None:
    """What keeps it from starting is said in one sentence, with the exit codes of `rxdeploy`."""
    bundle = build_bundle("fp32")

    def fails(*arguments: object) -> tuple[int, str]:
        done = subprocess.run([SERVICE, *map(str, arguments)], capture_output=True, text=True, timeout=NO_TIME)
        return done.returncode, done.stderr

    with serve() as service:
        status, error = fails(bundle, "--port", service.port)
        assert status == 1 and "is the port taken?" in error and error.count("\n") == 1
    assert fails()[0] == 2
    assert fails(bundle, "--queue", "many") == (2, "--queue: many cannot be used\n")
    assert fails(bundle, "--frames", "3")[0] == 2
    status, error = fails(tmp_path, "--port", 0)
    assert status == 2 and error.count("\n") == 1
    status, error = fails(bundle, "--port", 0, "--trusted-key", tmp_path / "absent.pub")
    assert (status, error) == (2, f"key {tmp_path / 'absent.pub'}: no such file\n")


def test_threads_end(serve: Callable[..., Any]) -> None:
    """Connections that come and go leave no thread and no descriptor behind."""
    with serve("--connections", 8) as service:

        def held() -> tuple[int, int]:
            folder = Path(f"/proc/{service.process.pid}")
            return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

        service.classify(bytes(48), FRAME, **OK_FRAME)
        service.client.close()
        descriptors, threads = held()

        def visit() -> None:
            for _ in range(20):
                with service.connect() as connection:
                    connection.sendall(request_bytes(close=True))
                    everything(connection)

        visitors = [threading.Thread(target=visit) for _ in range(6)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join()
        wait_for(lambda: held()[0] <= descriptors)
        assert held()[1] <= threads
