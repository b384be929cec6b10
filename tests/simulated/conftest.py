"""Tests of the GPU paths on a simulated GPU: a CUDA driver made of threads, and a TensorRT made of ONNX Runtime.

They run in a process of their own, which tests/test_simulated.py starts: its libcuda.so.1 is the simulated one.
By hand, from the repository's root; files and options of pytest may follow, or ``--`` and any other command::

    python tests/simulated/run.py

SIM_GPUS, SIM_MEMORY (bytes), SIM_DELAY_US, SIM_SEED and SIM_COMPUTE_CAPABILITY (8.9) set the simulation up;
`set_option` of standin.driver changes most of it in a running one.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rxdeploy.cards import ModelCard
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.options import EngineOptions, Profile

HERE = bool(os.environ.get("RXDEPLOY_SIMULATED_GPU"))
collect_ignore_glob = [] if HERE else ["*"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "misuse: expects the simulated driver to count misuse")


if HERE:
    from standin import driver, kernel
    from standin.gate import Gate
    from standin.plan import VERSIONS, make_plan


@pytest.fixture(scope="module")
def steady_garbage() -> Iterator[None]:
    """No garbage is collected on a stream's thread, where the driver takes no calls; and it is collected fast here."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def gate() -> Iterator[Callable[[Any, int], Gate]]:
    """gate(gpu, stream); all are open in the end."""
    gates: list[Gate] = []

    def shut(gpu: Any, stream: int) -> Gate:
        gates.append(Gate(gpu, stream))
        return gates[-1]

    yield shut
    for each in gates:
        each.open()


@pytest.fixture
def counters() -> Callable[[str], int]:
    """counters("live_streams"): one of the counters in driver.c; those of what happened count from the test's start."""
    names = ("allocations", "graph_launches", "copies", "pageable_copies", "host_funcs", "misuse", "abandoned")
    start = {name: driver.count(name) for name in names}
    return lambda name: driver.count(name) - start.get(name, 0)


@pytest.fixture(autouse=True)
def no_misuse(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which the driver or TensorRT was used wrongly, also where no one looked at the error.

    What is garbage when a test ends is freed then, and before the next one starts what a failed test has left.
    A test marked `misuse` must have misused something. The options of the simulation are put back.
    """
    gc.collect()
    gc.freeze()  # what lives on needs no looking through when this test ends, and that saves half of the time
    before = driver.count("misuse")
    options = {name: driver.option(name) for name in ("delay_us", "memory", "compute_capability")}
    yield
    gc.collect()
    for name, value in options.items():
        driver.set_option(name, value)
    times = driver.count("misuse") - before
    if request.node.get_closest_marker("misuse"):
        assert times, "the test expects misuse, and there was none"
    else:
        assert not times, f"misused {times} times; the latest: {driver.last_misuse()}"


@pytest.fixture
def context() -> Iterator[Any]:
    """Device 0's primary context, current on this thread. Whatever is made in it must be gone in the end."""
    from cuda.bindings import driver as cuda

    names = ("live_device_bytes", "live_pinned_bytes", "live_streams", "live_events", "live_graphs", "live_graph_execs")
    driver.check(cuda.cuInit(0))
    before = {name: driver.count(name) for name in names}
    made = driver.check(cuda.cuDevicePrimaryCtxRetain(0))
    driver.check(cuda.cuCtxPushCurrent(made))
    yield made
    left = {name: driver.count(name) - before[name] for name in names if driver.count(name) != before[name]}
    driver.check(cuda.cuCtxPopCurrent())
    driver.check(cuda.cuDevicePrimaryCtxRelease(0))
    assert not left, f"left alive: {left}"


@pytest.fixture
def dawdle() -> Callable[[int], None]:
    """dawdle(microseconds): how long, at most, every stream waits before each operation from now on."""
    return lambda microseconds: driver.set_option("delay_us", microseconds)


@pytest.fixture
def executions() -> deque[kernel.Execution]:
    """What engines have executed in this test so far: profile, batch size, whether from a CUDA graph."""
    kernel.executions.clear()
    return kernel.executions


@pytest.fixture
def model(make_card: Callable[..., ModelCard], random_weights: Callable[..., Any]) -> Callable[..., bytes]:
    """model(card, input_kind): the float32 ONNX model of a card, with random weights."""
    pytest.importorskip("torch", reason="the weights are drawn with torch")

    def build(card: ModelCard, input_kind: bundles.InputKind = "uint8") -> bytes:
        from rxdeploy.export.graph import build_graph, serialise

        return serialise(build_graph(card, random_weights(card), input_kind))

    return build


@pytest.fixture
def bundle_with_plan(
    make_card: Callable[..., ModelCard], model: Callable[..., bytes], tmp_path: Path
) -> Callable[..., Path]:
    """Writes a bundle of a small fp32 model with a plan of the stand-in, and gives its folder.

    ``bundle_with_plan(flavour="tensorrt_rtx", version=None, profiles=((1, 8, 32),), input_kind="uint8", **more)``;
    `more` goes to standin's make_plan. `card` changes the card (keywords of make_card), `plan` is used instead of
    the plan that would be made, `gpu` is the one it was built on, `claims` replace what the manifest's `engine` says.
    """

    def build(
        flavour: str = "tensorrt_rtx",
        version: str | None = None,
        profiles: Sequence[tuple[int, int, int]] = ((1, 8, 32),),
        input_kind: bundles.InputKind = "uint8",
        *,
        card: dict[str, Any] | None = None,
        plan: bytes | None = None,
        gpu: str | None = None,
        claims: dict[str, Any] | None = None,
        **more: Any,
    ) -> Path:
        made = make_card(**(card or {}))
        onnx = model(made, input_kind)
        if plan is None:
            plan = make_plan(onnx, flavour=flavour, version=version, profiles=profiles, **more)
        options = EngineOptions(
            profiles=tuple(Profile(*sizes) for sizes in profiles),
            version_compatible=more.get("version_compatible", False),
        )
        target = flavour.replace("_", "-")
        engine = {"flavour": target, "version": version or VERSIONS[flavour], "warnings": 0, **options.as_facts()}
        manifest = _manifest(made, input_kind, engine | (claims or {}), gpu)
        number = sum(path.name.startswith("bundle-") for path in tmp_path.iterdir())
        files: dict[str, Path | bytes] = {bundles.MODEL: onnx, bundles.PLAN: plan}
        return bundles.write_bundle(tmp_path / f"bundle-{number}", manifest, files, overwrite=False).path

    return build


def _manifest(
    card: ModelCard, input_kind: bundles.InputKind, engine: dict[str, Any], gpu: str | None
) -> bundles.Manifest:
    """As the pipeline writes it."""
    from rxdeploy.export.architecture import count_multiply_adds, count_parameters, resnext

    size, classes = card.input.image_size, card.architecture.num_classes
    batch = min(sizes["min"] for sizes in engine["profiles"]), max(sizes["max"] for sizes in engine["profiles"])
    inputs = {
        "uint8": bundles.Tensor(name="image", dtype="uint8", layout="NHWC", shape=(None, size, size, 3), batch=batch),
        "float32": bundles.Tensor(
            name="input", dtype="float32", layout="NCHW", shape=(None, 3, size, size), batch=batch
        ),
    }
    return bundles.Manifest(
        schema=bundles.SCHEMA,
        model=card.name,
        precision="fp32",
        target=bundles.TargetFacts(name=engine["flavour"], version=engine["version"], reason="a test", gpu=gpu),
        weights=bundles.WeightsOrigin(kind="synthetic", source="test", sha256=None),
        card=bundles.card_facts(card),
        counts=bundles.Counts(
            parameters=count_parameters(resnext(card)), multiply_adds=count_multiply_adds(resnext(card))
        ),
        preprocessing=card.input,
        normalisation_in_graph=input_kind == "uint8",
        num_classes=classes,
        inputs=(inputs[input_kind],),
        outputs=(bundles.Tensor(name="logits", dtype="float32", layout="NC", shape=(None, classes), batch=batch),),
        validation={},
        engine=engine,
        tools={},
        command=("rxdeploy", "build", card.name, "--fp32", "--target", engine["flavour"]),
        files={},
    )
