"""Everything that needs an NVIDIA GPU, in one command: parity, the `gpu` tests, and speed against PyTorch.

    python benchmarks/gpu_acceptance.py

builds fp32, fp16 and int8 bundles of the three models (or loads those under --bundles), compares what each plan gives
with ONNX Runtime on the CPU, runs `pytest -m gpu`, and times the plan against PyTorch eager, torch.compile
(max-autotune, which captures CUDA graphs) and ONNX Runtime's CUDA provider, in turns within one run, on arrays that
lie on the device. It needs no network, and uses what is installed; what is not is listed with the reason. Writes
results/gpu-GPUNAME.json and .md. Exit codes: 0 done, 1 a check failed, 3 no GPU.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import RESULTS
from numpy.typing import NDArray

import rxdeploy
from rxdeploy import atomic
from rxdeploy.bench import counts as counting
from rxdeploy.bench import machine
from rxdeploy.bench.layers import layer_times
from rxdeploy.cache import open_cache
from rxdeploy.calibration.options import CalibrationOptions
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.engines.bundle import MODEL, Manifest, open_bundle
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions, Profile
from rxdeploy.errors import EnvironmentLacks, RxDeployError
from rxdeploy.export.samples import noise, photographs
from rxdeploy.export.synthetic import synthetic_weights
from rxdeploy.export.validate import LIMITS, deviation, validation_samples, within
from rxdeploy.pipeline import Pipeline, Request

MODELS = ("gluon_resnext50_32x4d", "gluon_resnext101_32x4d", "gluon_resnext101_64x4d")
PRECISIONS = ("fp32", "fp16", "int8")
ROUNDS = 5  # in which the contestants take turns
LAYER_SECONDS = 1.0

Rival = Callable[[], object]  # enqueues one batch


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--precisions", default=",".join(PRECISIONS), show_default=True)
@click.option("--batches", default="1,32,128", show_default=True)
@click.option("--seconds", default=0.4, show_default=True, help="Of each contestant in each of the five rounds.")
@click.option("--groups", default="auto,native", show_default=True, help="As `rxdeploy build --groups`, or tune.")
@click.option("--bundles", type=click.Path(path_type=Path, file_okay=False), help="Use the bundles in this folder.")
@click.option("--tests/--no-tests", default=True, help="Run `pytest -m gpu` too.")
@click.option("--layers/--no-layers", default=True, help="Time the layers too.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
def main(
    models: str,
    precisions: str,
    batches: str,
    seconds: float,
    groups: str,
    bundles: Path | None,
    tests: bool,
    layers: bool,
    output: Path,
) -> None:
    """Check and measure what needs an NVIDIA GPU."""
    driver = find_driver()
    if driver.problem:
        click.echo(f"error: nothing was run: {driver.problem}; this is for a machine with an NVIDIA GPU", err=True)
        sys.exit(3)
    sizes = tuple(int(size) for size in batches.split(","))
    report: dict[str, Any] = {"machine": machine.facts(), "versions": _versions(), "gpu tests": None, "bundles": []}
    stem = output / f"gpu-{re.sub(r'[^a-z0-9]+', '-', driver.gpus[0].name.lower()).strip('-')}"
    failed = False
    if tests:
        report["gpu tests"] = run_tests()
        failed |= report["gpu tests"]["exit code"] != 0
        _write(stem, report)
    for path in _bundles(bundles, models.split(","), precisions.split(","), groups.split(","), sizes):
        manifest = open_bundle(path).manifest
        about = {"model": manifest.model, "precision": manifest.precision, "groups": groups_of(manifest)}
        row = {**about, **examine(path, sizes, seconds, layers)}
        report["bundles"].append(row)
        failed |= row.get("parity", {}).get("passed") is not True
        _write(stem, report)  # after each: a run that is cut off leaves what it has measured
    click.echo(f"written: {stem}.json, {stem}.md")
    sys.exit(int(failed))


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": None, "torch's CUDA": None, "cupy": None}
    with contextlib.suppress(ImportError):
        import torch

        found |= {"torch": torch.__version__, "torch's CUDA": torch.version.cuda}
    with contextlib.suppress(ImportError):
        import cupy

        found["cupy"] = cupy.__version__
    return found


def run_tests() -> dict[str, Any]:
    """The exit code and last lines of the tests that need a GPU."""
    click.echo("pytest -m gpu")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    click.echo("\n".join(lines[-15:]))
    return {"exit code": done.returncode, "summary": lines[-15:]}


def _bundles(
    given: Path | None, models: list[str], precisions: list[str], groups: list[str], sizes: tuple[int, ...]
) -> Iterator[Path]:
    """The folder of each bundle, built here unless they are given; of graphs that are alike only the first."""
    if given is not None:
        yield from sorted(path.parent for path in given.glob("*/manifest.json"))
        return
    profiles = (*(Profile(size, size, size) for size in sizes), Profile(1, 8, max(sizes)))
    for model in models:
        for precision in precisions:
            seen: set[str] = set()
            for packing in groups:
                path = Path("gpu-acceptance") / f"{model}-{precision}-{packing}"
                click.echo(f"building {path}")
                card, options = find_card(model), EngineOptions(profiles=profiles)
                request = Request(
                    card,
                    precision,
                    "uint8",
                    weights="synthetic",
                    engine=options,
                    calibration=_calibration(card, path.parent) if precision == "int8" else None,
                    groups="auto" if packing == "tune" else packing,
                    tune=packing == "tune",
                )
                with open_cache() as cache:
                    built = Pipeline(request, cache).build(path, overwrite=True)
                digest = built.manifest.files[MODEL].sha256
                if digest not in seen:
                    yield path
                seen.add(digest)


def groups_of(manifest: Manifest) -> str:
    """How the grouped convolutions of a bundle are packed."""
    tuning = manifest.tuning
    if not tuning or not tuning.groups:
        return "own groups"
    widths = ", ".join(map(str, sorted(set(tuning.groups.values()))))
    return f"groups of {widths}{' by measurement' if tuning.tuned else ''}"


def _calibration(card: ModelCard, folder: Path) -> CalibrationOptions:
    """Of the photographs, turned and mirrored, and noise: as good as any for weights that were made up."""
    photos = photographs(card)
    turned = [view for each in (photos, photos[:, :, ::-1]) for view in (each, each[:, ::-1], each.swapaxes(1, 2))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{card.name}-calibration.npz"
    np.savez(path, images=np.concatenate([*turned, noise(card, 8, 1)]))
    return CalibrationOptions(data=path, method="mse")


def examine(path: Path, sizes: tuple[int, ...], seconds: float, layers: bool) -> dict[str, Any]:
    """Parity, speed and layers of one bundle; what was not possible, with the reason."""
    try:
        session = rxdeploy.load(path, "tensorrt")
    except EnvironmentLacks as error:
        click.echo(f"{path}: {error}")
        return {"plan": None, "why not": str(error)}
    with session:
        row: dict[str, Any] = {"plan": session.description, "parity": parity(session)}
        click.echo(f"{path}: {row['parity']}")
        row["speed"] = [race(session, size, seconds) for size in sizes]
        if layers:
            row["layers"] = [_layers(session, size) for size in sizes]
    return row


def parity(session: rxdeploy.Session) -> dict[str, Any]:
    """How far the plan's logits are from those of the same model on ONNX Runtime on the CPU."""
    card, precision = find_card(session.bundle.manifest.model), session.bundle.manifest.precision
    images = validation_samples(card).images
    limits = LIMITS[precision]
    with rxdeploy.load(session.bundle.path, "cpu") as cpu:
        figures = deviation(session.run(images), cpu.run(images), limits.tie)
    return {**figures, "limit": limits.relative_l2, "passed": within(figures, limits)}


def race(session: rxdeploy.Session, size: int, seconds: float) -> dict[str, Any]:
    """Images a second of each contestant at one batch size: medians of rounds in which they take turns."""
    manifest = session.bundle.manifest
    image_size = manifest.preprocessing.image_size
    images = np.random.default_rng(size).integers(0, 256, (size, image_size, image_size, 3), np.uint8)
    row: dict[str, Any] = {"batch": size, "ms": {}, "spread": {}, "not run": {}}
    with contextlib.ExitStack() as held:
        contestants = {}
        for name, make in _contestants(session, images, held).items():
            try:
                contestants[name] = _Contestant(make())
                contestants[name].run(seconds)
            except Exception as error:  # any library's: the others go on
                row["not run"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                contestants.pop(name, None)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, contestant in contestants.items():
                times[name].append(contestant.run(seconds))
    for name, found in times.items():
        median = statistics.median(found)
        row["ms"][name] = median * 1000
        row["spread"][name] = (max(found) - min(found)) / median
    return row


@dataclass
class _Entry:
    """A contestant: `enqueue` starts a batch, `wait` waits for all."""

    enqueue: Rival
    wait: Callable[[], object]


class _Contestant:
    """Times a contestant: enough batches to fill the time, enqueued one after the other, waited for once."""

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry
        self._count = 3
        self.run(0.0)  # compiles, captures

    def run(self, seconds: float) -> float:
        """Seconds a batch."""
        self._entry.wait()
        begin = time.perf_counter()
        for _ in range(self._count):
            self._entry.enqueue()
        self._entry.wait()
        each = (time.perf_counter() - begin) / self._count
        self._count = max(3, int(seconds / each)) if seconds else self._count
        return each


def _contestants(
    session: rxdeploy.Session, images: NDArray[np.uint8], held: contextlib.ExitStack
) -> dict[str, Callable[[], _Entry]]:
    entries: dict[str, Callable[[], _Entry]] = {
        "rxdeploy, on the device": lambda: _on_device(session, images),
        "rxdeploy, copies included": lambda: _Entry(lambda: session.run(images), lambda: None),
        "rxdeploy, copies overlapped": lambda: _overlapped(session, images),
        "ONNX Runtime CUDA": lambda: _on_device(held.enter_context(rxdeploy.load(session.bundle.path, "cuda")), images),
        "torch eager, channels_last": lambda: _torch(session, images, compiled=False),
        "torch.compile max-autotune, channels_last": lambda: _torch(session, images, compiled=True),
    }
    return entries


def _on_device(session: rxdeploy.Session, images: NDArray[np.uint8]) -> _Entry:
    gpu = session.gpu
    if gpu is None:
        raise EnvironmentLacks("it has no access to the device's memory")
    stream = gpu.stream()
    source = gpu.empty(images.shape, np.uint8)
    source.fill(images)
    target = gpu.empty((len(images), session.bundle.manifest.num_classes), np.float32)
    return _Entry(lambda: session.run(source, out=target, stream=stream), stream.synchronize)


def _overlapped(session: rxdeploy.Session, images: NDArray[np.uint8]) -> _Entry:
    """Batches through `map`, of which the next is under way when one is done."""

    def enqueue() -> None:
        next(results)

    def forever() -> Iterator[NDArray[np.uint8]]:
        while True:
            yield images

    results = session.map(forever())
    return _Entry(enqueue, lambda: None)


def _torch(session: rxdeploy.Session, images: NDArray[np.uint8], compiled: bool) -> _Entry:
    """PyTorch's module with the same weights, on normalised images that lie on the device already."""
    import torch

    from rxdeploy.export.reference import reference_module
    from rxdeploy.runtime.preprocess import normalise

    if not torch.cuda.is_available():
        raise EnvironmentLacks("this PyTorch has no CUDA, or finds no GPU")
    manifest = session.bundle.manifest
    if manifest.weights.kind != "synthetic":
        raise EnvironmentLacks("it is given synthetic weights only")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as the plans
    card = find_card(manifest.model)
    module = reference_module(card, synthetic_weights(card, int(manifest.weights.source.partition(":")[2] or 0)))
    dtype = torch.float32 if manifest.precision == "fp32" else torch.float16
    module = module.to(device="cuda", dtype=dtype, memory_format=torch.channels_last)
    x = torch.from_numpy(normalise(images, card.input.mean, card.input.std)).to(device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    run = torch.compile(module, mode="max-autotune") if compiled else module

    def enqueue() -> None:
        with torch.inference_mode():
            run(x)

    return _Entry(enqueue, torch.cuda.synchronize)


def _layers(session: rxdeploy.Session, size: int) -> dict[str, Any]:
    """Seconds and multiply-adds by kind of layer, of which the grouped convolutions are one."""
    try:
        counts = counting.count(session.bundle.path / MODEL)
        times = layer_times(session, 0, counts, size, LAYER_SECONDS)
    except RxDeployError as error:
        return {"batch": size, "why not": str(error)}
    return {
        "batch": size,
        "total_ms": times.total * 1000,
        "method": times.method,
        "kinds": {
            kind: {
                "ms": sum(layer.seconds for layer in layers) * 1000,
                "multiply_adds": sum(layer.multiply_adds for layer in layers),
            }
            for kind, layers in times.rows().items()
        },
    }


def _write(stem: Path, report: dict[str, Any]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(stem.with_suffix(".json"), (json.dumps(report, indent=2) + "\n").encode())
    atomic.write_bytes(stem.with_suffix(".md"), markdown(report).encode())


def markdown(report: dict[str, Any]) -> str:
    """The report for people: a table of parity, one of speed, one of layers."""
    facts = report["machine"]
    gpus = ", ".join(gpu["name"] for gpu in facts["gpus"])
    versions = ", ".join(f"{k} {v}" for k, v in {**facts["versions"], **report["versions"]}.items() if v)
    lines = [f"# {gpus}, {facts['date']}", "", f"{facts['processor']}, {facts['system']}; {versions}.", ""]
    if tests := report["gpu tests"]:
        lines += [f"`pytest -m gpu`: exit code {tests['exit code']}: {(tests['summary'] or ['no output'])[-1]}", ""]
    lines += ["| model | precision | relative L2 to ONNX Runtime on CPU | limit | passed |", "|---|---|---|---|---|"]
    for row in report["bundles"]:
        figures = row.get("parity")
        cells = (
            (f"{figures['relative_l2']:.1e}", f"{figures['limit']:g}", "yes" if figures["passed"] else "NO")
            if figures
            else (f"not run: {row['why not']}", "-", "-")
        )
        lines.append(f"| {row['model']} | {row['precision']}, {row['groups']} | {' | '.join(cells)} |")
    lines += ["", "Images a second (median of rounds; in brackets, times the fastest PyTorch of the run):", ""]
    lines += ["| model | precision | batch | contestant | images/s | ms | |", "|---|---|---|---|---|---|---|"]
    for row in report["bundles"]:
        for speed in row.get("speed", ()):
            lines += _speed_lines(row, speed)
    lines += ["", "| model | precision | batch | kind | ms | share of time | share of multiply-adds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in report["bundles"]:
        for layers in row.get("layers", ()):
            lines += _layer_lines(row, layers)
    return "\n".join(lines) + "\n"


def _speed_lines(row: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    where = f"| {row['model']} | {row['precision']}, {row['groups']} | {speed['batch']} |"
    rival = min((ms for name, ms in speed["ms"].items() if name.startswith("torch")), default=None)
    lines = [
        f"{where} {name} | {speed['batch'] / ms * 1000:.0f} | {ms:.3f} | {f'({rival / ms:.2f})' if rival else ''} |"
        for name, ms in speed["ms"].items()
    ]
    return lines + [f"{where} {name} | not run | - | {why} |" for name, why in speed["not run"].items()]


def _layer_lines(row: dict[str, Any], layers: dict[str, Any]) -> list[str]:
    where = f"| {row['model']} | {row['precision']}, {row['groups']} | {layers['batch']} |"
    if "why not" in layers:
        return [f"{where} not run: {layers['why not']} | - | - | - |"]
    total = sum(kind["multiply_adds"] for kind in layers["kinds"].values()) or 1
    whole = layers["total_ms"]
    return [
        f"{where} {name} | {kind['ms']:.3f} | {kind['ms'] / whole:.1%} | {kind['multiply_adds'] / total:.1%} |"
        for name, kind in layers["kinds"].items()
    ]


if __name__ == "__main__":
    main()
