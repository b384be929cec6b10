"""The C++ example service against a Python server (uvicorn) with the Python runtime, at the same load on loopback.

An open loop: requests come at the moments of a Poisson process, whatever the server does. Both servers stand ready; at
each rate they are asked in turns, a few seconds each. The client is cpp/bench/load, whose own cost is in the results.
Needs `make cpp-test`'s release build with the service, and uvicorn, uvloop and httptools. Writes results/service.json;
the cases that are not asked for are kept in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import click
import numpy as np
import onnxruntime
from machine import RESULTS, save
from PIL import Image

import rxdeploy
from rxdeploy.cache import open_cache
from rxdeploy.cards import find_card
from rxdeploy.errors import InputError, RxDeployError
from rxdeploy.pipeline import Pipeline, Request
from rxdeploy.runtime import Batching, Rejected
from rxdeploy.runtime.preprocess import open_rgb, transform

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "rxdeploy/export/photos/cat.jpg"
CONNECTIONS = 64
QUEUE = 256
JPEG, FRAME = "image/jpeg", "application/octet-stream"


@dataclass(frozen=True)
class Case:
    """What is asked of a model, and how often a second."""

    model: str
    kind: str  # the media type
    rates: tuple[int, ...]


DIGITS, RESNEXT = "digits_resnext14_8x8d", "gluon_resnext50_32x4d"
CASES = {
    "digits-frames": Case(DIGITS, FRAME, (500, 1000, 2000, 4000)),
    "digits-jpeg": Case(DIGITS, JPEG, (100, 200, 400, 800)),
    "resnext50-frames": Case(RESNEXT, FRAME, (10, 20, 30)),
    "resnext50-jpeg": Case(RESNEXT, JPEG, (10, 20, 30)),
}


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Only these. [default: all]")
@click.option("--rate", "rates", multiple=True, type=int, help="Instead of the case's rates, requests a second.")
@click.option("--rounds", default=3, show_default=True, help="Of each server at each rate.")
@click.option("--seconds", default=2.5, show_default=True, help="Of each round.")
@click.option("--build", default=str(ROOT / "cpp/build/release"), type=click.Path(path_type=Path), show_default=True)
@click.option("--bundles", type=click.Path(path_type=Path), help="Folder to keep the bundles in. [default: a new one]")
def main(
    names: tuple[str, ...], rates: tuple[int, ...], rounds: int, seconds: float, build: Path, bundles: Path | None
) -> None:
    """Measure; a few lines for each case and rate."""
    for name in ("uvicorn", "uvloop", "httptools"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"the Python server needs {name}; pip install uvicorn uvloop httptools")
    for program in ("examples/service", "bench/load"):
        if not (build / program).exists():
            raise SystemExit(f"{build / program} is not built; `make cpp-test` builds it (docs/cpp.md)")
    path = RESULTS / "service.json"
    result = json.loads(path.read_text())["cases"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names or CASES:
            case = CASES[name]
            bundle = bundle_of(case.model, bundles or Path(temporary))
            result[name] = measure(case, rates or case.rates, rounds, seconds, build, bundle, Path(temporary))
            for level in result[name]["levels"]:
                click.echo(f"{name} {level['rate']}/s: " + in_words(level))
    setting = {"connections": CONNECTIONS, "queue": QUEUE, "python_server": server_versions()}
    click.echo(save("service", {"setting": setting, "cases": result}))


def server_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("uvicorn", "uvloop", "httptools", "Pillow")}


def bundle_of(model: str, folder: Path) -> Path:
    output = folder / f"{model}-fp32"
    if not output.exists():
        weights = {} if model == DIGITS else {"weights": "synthetic"}
        request = Request(find_card(model), "fp32", "uint8", target="onnxruntime", **weights)
        with open_cache() as cache:
            Pipeline(request, cache).build(output)
    return output


def in_words(level: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {each['answers_per_second']:.0f}/s p50 {each['p50_ms']:.2f} p99 {each['p99_ms']:.2f} ms, "
        f"server {each['server_cpu_ms_a_request']:.2f} ms CPU, client {each['client_share_of_a_core']:.2f} of a core"
        for name, each in level["servers"].items()
    )


# Measuring


def measure(
    case: Case, rates: tuple[int, ...], rounds: int, seconds: float, build: Path, bundle: Path, folder: Path
) -> dict[str, Any]:
    body, path = folder / "body", "/classify?k=5"
    if case.kind == JPEG:
        body.write_bytes(PHOTO.read_bytes())
        with Image.open(PHOTO) as image:
            size = image.size
    else:
        side = find_card(case.model).input.image_size
        size = side, side
        image = open_rgb(PHOTO).resize(size)
        body.write_bytes(image.tobytes())
        path += f"&width={side}&height={side}"
    with contextlib.ExitStack() as stack:
        servers = {
            "cpp": stack.enter_context(serve([build / "examples/service", bundle, *cpp_options()])),
            "python": stack.enter_context(serve([sys.executable, Path(__file__).resolve(), bundle], PYTHON_SERVER)),
        }

        def ask(name: str, rate: int, round_: int, length: float) -> dict[str, Any]:
            port, process = servers[name]
            before = cpu_seconds(process)
            command = [build / "bench/load", port, path, case.kind, body, rate, length, CONNECTIONS, round_]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            return found | {"server_cpu_s": cpu_seconds(process) - before}

        for name in servers:
            ask(name, max(rates[0] // 2, 1), 99, 1.0)  # warm
        levels = []
        for rate in rates:
            seen: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            for round_ in range(rounds):
                order = list(servers) if round_ % 2 == 0 else list(servers)[::-1]
                for name in order:
                    seen[name].append(ask(name, rate, round_, seconds))
            levels.append(
                {"rate": rate, "servers": {name: middle(found) for name, found in seen.items()}} | ratios(seen)
            )
    facts = asdict(case) | {"rates": list(rates), "image": list(size), "bytes": body.stat().st_size}
    return facts | {"rounds": rounds, "seconds": seconds, "date": time.strftime("%Y-%m-%d"), "levels": levels}


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the counts, medians of the rest."""
    summed = {key: sum(each[key] for each in rounds) for key in ("offered", "answered", "other_statuses", "unanswered")}
    keys = ("answers_per_second", "p50_ms", "p90_ms", "p99_ms", "max_ms")
    answered = max(summed["answered"], 1)
    return (
        summed
        | {key: statistics.median(each[key] for each in rounds) for key in keys}
        | {
            "server_cpu_ms_a_request": 1000 * sum(each["server_cpu_s"] for each in rounds) / answered,
            "client_late_p99_ms": statistics.median(each["client"]["late_p99_ms"] for each in rounds),
            "client_cpu_us_a_request": statistics.median(each["client"]["cpu_us_a_request"] for each in rounds),
            "client_share_of_a_core": statistics.median(each["client"]["share_of_a_core"] for each in rounds),
        }
    )


def ratios(seen: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Python's over C++'s, medians over the rounds."""
    pairs = list(zip(seen["python"], seen["cpp"], strict=True))

    def ratio(key: str) -> float:
        return statistics.median(python[key] / cpp[key] if cpp[key] else float("inf") for python, cpp in pairs)

    return {"python_over_cpp": {key: ratio(key) for key in ("answers_per_second", "p50_ms", "p99_ms", "server_cpu_s")}}


def cpu_seconds(process: int) -> float:
    """Of a process so far, in user and kernel mode: Linux, fields 14 and 15 of /proc/PID/stat."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpp_options() -> list[str]:
    return ["--device", "cpu", "--port", "0", "--queue", str(QUEUE)]


@contextlib.contextmanager
def serve(command: list[Any], environment: dict[str, str] | None = None) -> Iterator[tuple[int, int]]:
    """A server's port and process, when it has said that it listens."""
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    given = os.environ | {"RXDEPLOY_ONNXRUNTIME": str(library)} | (environment or {})
    with subprocess.Popen(list(map(str, command)), env=given, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.match(r"http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                raise SystemExit(f"{command[0]} did not start")
            yield int(found[1]), process.pid
        finally:
            process.send_signal(signal.SIGTERM)


# The Python server: this file again, started with PYTHON_SERVER in its environment

PYTHON_SERVER = {"RXDEPLOY_BENCH_SERVER": "1"}


def python_server(bundle: Path) -> None:
    """One process of uvicorn on uvloop with httptools, an ASGI application without a framework."""
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import uvicorn

    batching = Batching(queue_size=QUEUE, when_full="reject")
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    cores = len(os.sched_getaffinity(0))
    with rxdeploy.load(bundle, "onnxruntime", batching=batching) as session, ThreadPoolExecutor(cores) as decoders:
        session.prepare([1])
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(application(session, decoders), loop="uvloop", http="httptools", log_level="warning")
        uvicorn.Server(config).run(sockets=[listening])


def application(session: rxdeploy.Session, decoders: Any) -> Callable[..., Any]:
    inputs = session.bundle.manifest.preprocessing
    shorter = int(inputs.image_size / inputs.crop_pct)

    def prepared(image: Image.Image) -> np.ndarray:
        return transform(image, inputs.image_size, inputs.crop_pct, inputs.interpolation)

    def from_jpeg(body: bytes) -> np.ndarray:
        return prepared(open_rgb(Path("the body"), body))

    def from_frame(body: bytes, width: int, height: int) -> np.ndarray:
        return prepared(Image.frombuffer("RGB", (width, height), body, "raw", "RGB", 0, 1))

    async def classify(scope: dict[str, Any], body: bytes) -> bytes:
        query = parse_qs(scope["query_string"].decode())
        loop = asyncio.get_running_loop()
        if dict(scope["headers"]).get(b"content-type") == JPEG.encode():
            image = await loop.run_in_executor(decoders, from_jpeg, body)
        else:
            width, height = int(query["width"][0]), int(query["height"][0])
            if (width, height) == (shorter, shorter):  # nothing to resize: quicker than to hand it over
                image = from_frame(body, width, height)
            else:
                image = await loop.run_in_executor(decoders, from_frame, body, width, height)
        logits = await session.submit_async(image)
        [best] = session.top(logits[None], int(query["k"][0]))
        return json.dumps({"predictions": [asdict(each) for each in best]}).encode()

    async def app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            raise RuntimeError("only http is served")  # no lifespan events
        body = io.BytesIO()
        while True:
            message = await receive()
            body.write(message.get("body", b""))
            if not message.get("more_body"):
                break
        try:
            status, answer = 200, await classify(scope, body.getvalue())
        except Rejected as error:
            status, answer = 503, str(error).encode()
        except (InputError, KeyError, ValueError) as error:
            status, answer = 400, str(error).encode()
        except RxDeployError as error:
            status, answer = 500, str(error).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


if __name__ == "__main__":
    if os.environ.get("RXDEPLOY_BENCH_SERVER"):
        python_server(Path(sys.argv[1]))
    else:
        main()
