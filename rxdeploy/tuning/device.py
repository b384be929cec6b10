"""The device that a model is tuned for: opens a graph on one of its engines, runs it, and says what its layers take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from rxdeploy import atomic
from rxdeploy.bench.counts import GraphCounts, count
from rxdeploy.bench.layers import layer_times
from rxdeploy.bench.machine import cores, instruction_sets, processor
from rxdeploy.bench.samples import sample_images
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.builder import Plan, Progress, build_plan, timing_cache
from rxdeploy.engines.bundle import Bundle, CpuSettings, Manifest, Tuning
from rxdeploy.engines.flavours import Flavour, installed_version
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime.batching import Batching
from rxdeploy.runtime.onnxrt import import_onnxruntime
from rxdeploy.runtime.session import Session

PROFILE_SECONDS = 0.3


class Opened(Protocol):
    """A graph that is ready to run."""

    def run(self, batch: int) -> object:
        """Compute a batch of that size."""

    def layers(self, batch: int) -> dict[str, float]:
        """Seconds that each convolution takes within the whole graph, by the name of its node."""


class Device(Protocol):
    """Where graphs are timed."""

    name: str
    engines: tuple[str, ...]

    def open(self, model: bytes, engine: str, settings: CpuSettings | None = None) -> Any:
        """A context manager that gives the graph, opened on that engine."""

    def facts(self) -> dict[str, Any]:
        """What a time measured here depends on, besides the graph."""


class _OpenedSession:
    def __init__(self, session: Session, model: Path) -> None:
        self._session, self._model = session, model
        self._images: dict[int, Any] = {}

    @functools.cached_property
    def _counts(self) -> GraphCounts:
        return count(self._model)

    def run(self, batch: int) -> object:
        if batch not in self._images:
            self._images[batch] = sample_images(self._session.bundle.manifest, batch)
        return self._session.engine.run(self._images[batch], None, None)

    def layers(self, batch: int) -> dict[str, float]:
        convolutions = {node.name for node in self._counts.nodes if node.op == "Conv"}
        found = layer_times(self._session, 0, self._counts, batch, PROFILE_SECONDS)
        seconds: dict[str, float] = {}
        for layer in found.layers:
            inside = convolutions.intersection(layer.nodes)
            if len(inside) == 1:  # of several nobody knows the shares
                name = inside.pop()
                seconds[name] = seconds.get(name, 0.0) + layer.seconds
        return seconds


@contextlib.contextmanager
def _opened(manifest: Manifest, files: dict[str, bytes], device: str) -> Iterator[_OpenedSession]:
    """A session on these files as a bundle."""
    with atomic.scratch_folder("tune") as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        digests = {name: bundles.file_digest(folder / name) for name in files}
        bundle = Bundle(folder, msgspec.structs.replace(manifest, files=digests))
        session = Session(bundle, device, None, Batching())
        try:
            yield _OpenedSession(session, folder / bundles.MODEL)
        finally:
            session.close()


class CpuDevice:
    """This machine's CPU, with the engines that are installed for it.

    `manifest` is of the bundle to be; `sizes` are the batch sizes that its engine is to be ready for.
    """

    def __init__(self, manifest: Manifest, sizes: tuple[int, ...]) -> None:
        self._manifest, self._sizes = manifest, sizes
        self.name = f"{processor()}, {cores()} cores"
        here = {"onnxruntime": installed_version(("onnxruntime", "onnxruntime-gpu")), "openvino": _openvino(manifest)}
        self._versions = {name: version for name, version in here.items() if version}
        self.engines = tuple(self._versions)

    @contextlib.contextmanager
    def open(self, model: bytes, engine: str, settings: CpuSettings | None = None) -> Iterator[Opened]:
        settings = settings or CpuSettings(engine=engine)  # type: ignore[arg-type]
        tuning = Tuning(
            tuned=True,
            device=self.name,
            cores=cores(),
            versions=self._versions,
            batch=self._sizes,
            groups={},
            passes=(),
            cpu=settings,
            report={},
        )
        manifest = msgspec.structs.replace(self._manifest, tuning=tuning)
        with _opened(manifest, {bundles.MODEL: model}, "cpu") as found:
            yield found

    def facts(self) -> dict[str, Any]:
        return {"device": self.name, "instruction_sets": instruction_sets(), "versions": self._versions}


def _openvino(manifest: Manifest) -> str | None:
    """OpenVINO's version, when it is here and computes what the model means."""
    return installed_version(("openvino",)) if manifest.for_integers else None


class PlanDevice:
    """The first GPU, on which every graph is built into a plan of its own."""

    engines: tuple[str, ...] = ("tensorrt",)

    def __init__(self, manifest: Manifest, flavour: Flavour, options: EngineOptions, cache: Path) -> None:
        gpu = find_driver().gpus[0]
        self.name = gpu.name
        self._manifest, self._flavour, self._options = manifest, flavour, options
        self._timings = timing_cache(cache, flavour, flavour.version(), gpu)

    def build(self, model: bytes, progress: Progress | None = None) -> Plan:
        """A plan of the graph."""
        return build_plan(model, self._flavour, self._options, progress, self._timings)

    @contextlib.contextmanager
    def open(self, model: bytes, engine: str, settings: CpuSettings | None = None) -> Iterator[Opened]:
        plan = self.build(model)
        target = msgspec.structs.replace(
            self._manifest.target, name=self._flavour.name, version=self._flavour.version(), gpu=self.name
        )
        manifest = msgspec.structs.replace(self._manifest, engine=plan.facts, target=target)
        with _opened(manifest, {bundles.MODEL: model, bundles.PLAN: plan.data}, "tensorrt") as found:
            yield found

    def facts(self) -> dict[str, Any]:
        driver = find_driver()
        version = {self._flavour.name: self._flavour.version()}
        options = self._options.as_facts()
        return {"device": self.name, "driver": driver.cuda_version, "versions": version, "options": options}


def device_for(
    manifest: Manifest, flavour: Flavour | None, options: EngineOptions, sizes: tuple[int, ...], cache: Path
) -> CpuDevice | PlanDevice:
    """Where the bundle is to be fast: the GPU for a plan, else the CPU.

    EnvironmentLacks when there is none, or no ONNX Runtime.
    """
    import_onnxruntime()  # by which what is tuned is checked, whatever it is tuned to: better now than in the end
    if flavour is None:
        return CpuDevice(manifest, sizes)
    if problem := find_driver().problem:
        raise EnvironmentLacks(
            f"tuning a plan needs the GPU that it is for: {problem}; build without --tune, and run "
            "`rxdeploy tune BUNDLE` on the machine with the GPU"
        )
    if flavour.version() is None:
        raise EnvironmentLacks(f"tuning a plan needs {flavour.name}; {flavour.install}")
    return PlanDevice(manifest, flavour, options, cache)
